"""Time of a run's first and second start, compared with the `tokenizers` library alone: python -m bench.start FILES --model MODEL

The library gets the same texts (chats as the template renders them), in batches, on the same cores, with `encode_batch_fast`,
its fastest call. It does nothing else: no reading, no rendering, no targets, no writing. Each measurement is made in a fresh
process, because a second one in the same process is up to 40% slower, and the three kinds alternate. On a machine that is busy
all the time, compare the CPU times.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from bench.measure import ROOT
from bench.tokenization import Times, shortest
from common.cores import available_cores
from common.errors import UserError, run_script
from data.encoding import ExampleEncoder
from data.examples import load_documents
from data.files import read_file
from data.text_pieces import make_encoder
from data.tokens import load_tokenizer

BATCH = 1024  # texts in one call of the library


KINDS = ("library", "first start", "second start")


def measure(kind: str, files: list[Path], tokenizer: PreTrainedTokenizerBase, sequence_length: int, cache: str) -> dict:
    """Time one of KINDS in this process. Returns the times in seconds, and what was done."""
    report, size = "", 0
    if kind == "library":
        encoder = ExampleEncoder(tokenizer)
        texts = [_text(encoder, example) for file in files for _, example in read_file(file)]
        size = sum(len(text.encode()) for text in texts)
        times = _time(lambda: _encode(make_encoder(tokenizer), texts))
    else:
        paths, found = tuple(map(str, files)), []
        times = _time(lambda: found.append(load_documents(paths, tokenizer, sequence_length, "truncate", cache=cache)))
        report = found[0].report
    return {"seconds": times.seconds, "cpu_seconds": times.cpu_seconds, "bytes": size, "report": report}


def compare_starts(arguments: argparse.Namespace) -> Iterator[str]:
    """Time each of KINDS in processes of their own, in turn. Yields lines to print."""
    times: dict[str, list[Times]] = {kind: [] for kind in KINDS}
    done: dict[str, dict] = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="tokens-") as cache:
            for kind in KINDS:
                command = [sys.executable, "-m", "bench.start", *map(str, arguments.files), "--model", arguments.model]
                command += ["--sequence-length", str(arguments.sequence_length), "--measure", kind, "--cache", cache]
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if run.returncode:
                    raise UserError(f"the measurement of the {kind} failed: {run.stderr.strip().splitlines()[-1]}")
                done[kind] = json.loads(run.stdout)
                times[kind].append(Times(done[kind]["seconds"], done[kind]["cpu_seconds"]))
    best = {kind: shortest(found) for kind, found in times.items()}
    megabytes = done["library"]["bytes"] / 1e6
    yield f"{megabytes:.1f} MB of text, {available_cores()} cores, best of {arguments.rounds} rounds"
    for kind, t in best.items():
        yield f"  {kind + ':':13} {t.seconds:6.2f} s ({megabytes / t.seconds:6.2f} MB/s), CPU time {t.cpu_seconds:6.2f} s"
    alone, first = best["library"], best["first start"]
    yield (
        f"  the first start reaches {alone.seconds / first.seconds:.0%} of the library's speed; in CPU time "
        f"{alone.cpu_seconds / first.cpu_seconds:.0%}"
    )
    yield from (f"  {line}" for line in done["first start"]["report"].split("\n"))


def _text(encoder: ExampleEncoder, example: dict) -> str:
    if "messages" in example:
        return encoder.template.render(example["messages"], example.get("tools"))
    return example.get("prompt", "") + example.get("completion", example.get("text", ""))


def _encode(library: Tokenizer, texts: list[str]) -> None:
    for start in itertools.count(0, BATCH):
        if not (batch := texts[start : start + BATCH]):
            return
        library.encode_batch_fast(batch, add_special_tokens=False)


def _time(call: Callable[[], object]) -> Times:
    """Wall time and CPU time of a call, over all threads and ended child processes."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    wall, before = time.perf_counter(), cpu()
    call()
    return Times(time.perf_counter() - wall, cpu() - before)


def main() -> None:
    """Read the command line and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILES", help="data files of any form")
    parser.add_argument("--model", required=True, help="model directory or hub id whose tokenizer is used")
    parser.add_argument("--sequence-length", type=int, default=2048, help="as data.sequence_length (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.files = [file.resolve() for file in arguments.files]
    arguments.model = str(Path(arguments.model).resolve()) if Path(arguments.model).exists() else arguments.model
    if arguments.measure is None:
        for line in compare_starts(arguments):
            print(line)
        return
    tokenizer = load_tokenizer(arguments.model)
    print(
        json.dumps(measure(arguments.measure, arguments.files, tokenizer, arguments.sequence_length, arguments.cache))
    )


if __name__ == "__main__":
    run_script(main)
