"""Speed of building a token store, compared with the `tokenizers` library alone on the same texts and cores."""

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data.text_pieces import BATCH_CHARACTERS, batch_pieces, make_encoder, read_pieces
from data.token_build import build_store

CHARACTERS = 2**25  # of text to measure on
ROUNDS = 3


@dataclass(frozen=True)
class Times:
    """The shortest of several rounds. Wall time can only be lengthened by other programs on the machine."""

    seconds: float
    cpu_seconds: float


def compare_with_tokenizers(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    """Time `encode_batch_fast`, the fastest call of the library, and a whole build in turn; returns a line to print.

    Both get the first CHARACTERS characters of the files. On a machine that is busy all the time, compare the CPU times.
    """
    num_batches = max(1, CHARACTERS // BATCH_CHARACTERS)
    texts = [
        [piece.text for piece in batch] for batch in itertools.islice(batch_pieces(read_pieces(files)), num_batches)
    ]
    if not texts:
        raise UserError("there is no text in the files")
    megabytes = sum(len(text.encode()) for batch in texts for text in batch) / 1e6
    encoder = make_encoder(tokenizer)

    def encode() -> None:
        for batch in texts:
            encoder.encode_batch_fast(batch, add_special_tokens=False)

    with tempfile.TemporaryDirectory(prefix="tokens-") as folder:
        sample = Path(folder) / "sample.jsonl"
        write_sample(sample, texts)
        encoder.encode_batch_fast(texts[0][:64], add_special_tokens=False)  # starts the threads of the library
        library, build = [], []
        for number in range(ROUNDS):
            library.append(time_call(encode))
            store = Path(folder) / str(number)
            build.append(time_call(lambda store=store: build_store([sample], tokenizer, store)))
    alone, built = shortest(library), shortest(build)
    return (
        f"{megabytes:.0f} MB of text, best of {ROUNDS}: tokenizers alone {megabytes / alone.seconds:.2f} MB/s, the whole "
        f"build {megabytes / built.seconds:.2f} MB/s: {alone.seconds / built.seconds:.0%}; in CPU time "
        f"{alone.cpu_seconds:.1f} s and {built.cpu_seconds:.1f} s: {alone.cpu_seconds / built.cpu_seconds:.0%}"
    )


def time_call(call: Callable[[], object]) -> Times:
    """Wall time and CPU time of a call, over all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def shortest(rounds: list[Times]) -> Times:
    """The shortest wall time and the shortest CPU time, not necessarily of the same round."""
    return Times(min(t.seconds for t in rounds), min(t.cpu_seconds for t in rounds))


def write_sample(path: Path, texts: list[list[str]]) -> None:
    """Write the texts that are not empty as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for text in itertools.chain.from_iterable(texts):
            if text:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
