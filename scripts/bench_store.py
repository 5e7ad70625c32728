"""Memory and start-up of reading token stores of several sizes: what a training process pays for a large corpus.

FILES are tokenised once; a larger store names their shards again and again (hard links), which are the bytes that the same
texts written out so often would give. For each size a fresh process opens the store, plans an epoch, makes the micro-batches
of the first steps, and of one in the middle as a resume does, and reports its peak memory.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time

from common.errors import UserError, run_script
from data.batches import collate, micro_batches, plan_training
from data.files import check_files
from data.sources import Reader
from data.token_build import build_store
from data.token_store import STORE_FILE, documents_file, tokens_file
from data.tokens import load_tokenizer

SEQUENCE_LENGTH = 2048
WINDOWS_PER_STEP = 64


def repeated(store: pathlib.Path, times: int, out: pathlib.Path) -> None:
    """A store that holds all of `store` so many times, without another byte on disk."""
    out.mkdir()
    content = json.loads((store / STORE_FILE).read_text(encoding="utf-8"))
    shards = content["shards"]
    for number in range(times * len(shards)):
        for name in (tokens_file, documents_file):
            os.link(store / name(number % len(shards)), out / name(number))
    content |= {"shards": shards * times, "files": content["files"] * times}
    content |= {name: content[name] * times for name in ("tokens", "documents")}
    (out / STORE_FILE).write_text(json.dumps(content), encoding="utf-8")


def read(store: pathlib.Path, model: str, steps: int) -> dict:
    """Bytes and seconds of a process that reads `steps` steps of an epoch and one more in its middle."""
    tokenizer = load_tokenizer(model)
    before = peak_memory()
    start = time.perf_counter()
    corpus = Reader(tokenizer, len(tokenizer), SEQUENCE_LENGTH, "drop").training((str(store),), ())
    plan = plan_training(corpus, 1, 0, SEQUENCE_LENGTH, global_examples=WINDOWS_PER_STEP)
    plan.batch(0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    plan.batch(plan.num_steps // 2)
    middle = time.perf_counter() - start
    start, tokens, targets = time.perf_counter(), 0, 0
    for step in range(min(steps, plan.num_steps)):
        for micro in micro_batches(plan.batch(step).rows, corpus, 0, 1, 8):
            batch = collate(micro, corpus)
            tokens, targets = tokens + batch.input_ids.numel(), targets + batch.target_ids.numel()
    return {
        "tokens": sum(source.store.num_tokens for source in corpus.sources),
        "steps": plan.num_steps,
        "first_batch_s": first,
        "middle_batch_s": middle,
        "tokens_read": tokens,
        "tokens_per_s": tokens / (time.perf_counter() - start),
        "before": before,
        "peak": peak_memory(),
    }


def peak_memory() -> int:
    """Bytes resident at most so far (kilobytes on Linux, bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILES", help="the texts, a few MB at least")
    parser.add_argument("--model", required=True, help="model directory, or hub id, whose tokenizer is used")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000], help="of text (default 10 1000)")
    parser.add_argument("--steps", type=int, default=100, help=f"to read, of {WINDOWS_PER_STEP} windows (default 100)")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)  # FILES is one store, in a fresh process
    arguments = parser.parse_args()
    if min(arguments.megabytes) < 1 or arguments.steps < 1:
        raise UserError("--megabytes and --steps must be above 0")
    return arguments


def main() -> None:
    """Do what the command line asks for, and print it."""
    arguments = parse_arguments()
    if arguments.read:
        print(json.dumps(read(arguments.files[0], arguments.model, arguments.steps)))
        return
    check_files(arguments.files)
    with tempfile.TemporaryDirectory(prefix="stores-") as folder:
        store, tokenizer = pathlib.Path(folder) / "store", load_tokenizer(arguments.model)
        built = build_store(arguments.files, tokenizer, store)
        size = sum(path.stat().st_size for path in arguments.files) / 1e6
        for megabytes in arguments.megabytes:
            larger = pathlib.Path(folder) / str(megabytes)
            times = max(1, round(megabytes / size))
            repeated(store, times, larger)
            command = [sys.executable, __file__, str(larger), "--model", arguments.model, "--read"]
            done = subprocess.run([*command, "--steps", str(arguments.steps)], capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"reading {larger} failed: {done.stderr.strip().splitlines()[-1]}")
            found = json.loads(done.stdout)
            print(
                f"{times * size:6.0f} MB of text, {found['tokens']:,} tokens in {times * len(built['shards'])} shards: peak "
                f"memory {found['peak'] / 2**20:.0f} MiB ({found['before'] / 2**20:.0f} before the store was opened); first "
                f"batch after {found['first_batch_s']:.3f} s, that of step {found['steps'] // 2} in "
                f"{found['middle_batch_s']:.3f} s; {found['tokens_read']:,} tokens read at {found['tokens_per_s']:,.0f} a second"
            )


if __name__ == "__main__":
    run_script(main)
