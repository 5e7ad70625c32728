"""Tokenise text files into a token store, which training reads with flat memory: data.train=("OUT",) in a config.

FILES are .txt (one document each), .jsonl or .parquet with `text`, each also as .gz or .zst; EOS stands behind every
document. Killed at any moment, the same command goes on behind the last complete shard and gives the same bytes as an
uninterrupted run. `--benchmark` compares the speed with that of the `tokenizers` library alone on the same texts and cores.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import itertools
import json
import tempfile
import time

from tqdm import tqdm

from common.errors import UserError, run_script
from data.files import check_files
from data.text_pieces import BATCH_CHARACTERS, batch_pieces, make_encoder, read_pieces
from data.token_build import SHARD_TOKENS, build_store
from data.tokens import load_tokenizer
from model.architectures import check_not_a_run

BENCHMARK_CHARACTERS = 2**25
TURNS = 3


def benchmark(files: list[pathlib.Path], tokenizer: object) -> str:
    """`encode_batch_fast`, the library's fastest call, and a whole build, in turn, on the same first texts; a line.

    The best of each counts: what else runs on the machine only slows. CPU time tells where it runs all the time.
    """
    texts = [
        [one.text for one in batch]
        for batch in itertools.islice(
            batch_pieces(read_pieces(files)), max(1, BENCHMARK_CHARACTERS // BATCH_CHARACTERS)
        )
    ]
    if not texts:
        raise UserError("there is no text in the files")
    megabytes = sum(len(text.encode()) for batch in texts for text in batch) / 1e6
    encoder = make_encoder(tokenizer)
    alone, built = [], []  # (seconds, seconds of CPU time)
    with tempfile.TemporaryDirectory(prefix="tokens-") as folder:
        sample = pathlib.Path(folder) / "sample.jsonl"
        write_sample(sample, texts)
        encoder.encode_batch_fast(texts[0][:64], add_special_tokens=False)  # starts its threads
        for turn in range(TURNS):
            start = time.perf_counter(), time.process_time()
            for batch in texts:
                encoder.encode_batch_fast(batch, add_special_tokens=False)
            alone.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            start = time.perf_counter(), time.process_time()
            build_store([sample], tokenizer, pathlib.Path(folder) / str(turn))
            built.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    (alone, alone_cpu), (built, built_cpu) = (map(min, zip(*times, strict=True)) for times in (alone, built))
    return (
        f"{megabytes:.0f} MB of text, best of {TURNS}: tokenizers alone {megabytes / alone:.2f} MB/s, the whole build "
        f"{megabytes / built:.2f} MB/s: {alone / built:.0%}; in CPU time {alone_cpu:.1f} s and {built_cpu:.1f} s: "
        f"{alone_cpu / built_cpu:.0%}"
    )


def write_sample(path: pathlib.Path, texts: list[list[str]]) -> None:
    """The texts as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for text in itertools.chain.from_iterable(texts):
            if text:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILES", help="the texts, in this order")
    parser.add_argument("--model", required=True, help="model directory, or hub id, whose tokenizer is used")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the store")
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="a document that fills a shard closes it (%(default)s)"
    )
    parser.add_argument("--benchmark", action="store_true", help="measure on the first 32 MB, and build nothing")
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.benchmark:
        parser.error("--out is required")
    if arguments.shard_tokens < 1:
        raise UserError(f"--shard-tokens must be above 0, not {arguments.shard_tokens}")
    check_files(arguments.files)
    return arguments


def main() -> None:
    """Do what the command line asks for, and print it."""
    arguments = parse_arguments()
    check_not_a_run(arguments.model, "--model")
    tokenizer = load_tokenizer(arguments.model)
    if arguments.benchmark:
        print(benchmark(arguments.files, tokenizer))
        return
    size = sum(path.stat().st_size for path in arguments.files)
    with tqdm(desc="tokenise", total=size, unit="B", unit_scale=True, mininterval=0.5) as bar:
        store = build_store(arguments.files, tokenizer, arguments.out, arguments.shard_tokens, bar.update)
    print(
        f"{arguments.out}: {store['tokens']:,} tokens of {store['documents']:,} documents in {len(store['shards'])} shards, "
        f"{'uint16' if store['dtype'] == '<u2' else 'uint32'}, tokenizer {store['tokenizer'][:12]}"
    )


if __name__ == "__main__":
    run_script(main)
