"""Memory and start-up time of a process that trains from a token store: python -m bench.token_store STORE MODEL STEPS

`measure` builds a store of any size from one small store, and reads it in a fresh process (this module's command line), so
that the peak memory is that of reading alone.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import ROOT
from common.errors import UserError
from data.batches import collate, plan_training
from data.dealing import Dealer, one_per_token
from data.reader import Reader
from data.token_store import STORE_FILE, checksums_file, documents_file, tokens_file
from data.tokens import load_tokenizer

SEQUENCE_LENGTH = 2048
WINDOWS_PER_STEP = 64
MICRO_BATCH = 8


def measure(store: Path, copies: int, directory: Path, model: str, steps: int) -> dict:
    """Repeat `store` `copies` times in the new `directory`, and return `read_steps` of it from a fresh process."""
    repeat_store(store, copies, directory)
    command = [sys.executable, "-m", "bench.token_store", str(directory.resolve()), model, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise UserError(f"reading {directory} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def repeat_store(store: Path, copies: int, out: Path) -> None:
    """Write a store `out` that contains `store` `copies` times. Its shards are hard links and take no space on disk."""
    out.mkdir()
    content = json.loads((store / STORE_FILE).read_text(encoding="utf-8"))
    shards = content["shards"]
    for number in range(copies * len(shards)):
        for name in (tokens_file, documents_file, checksums_file):
            os.link(store / name(number % len(shards)), out / name(number))
    content |= {"shards": shards * copies, "files": content["files"] * copies}
    content |= {name: content[name] * copies for name in ("tokens", "documents")}
    (out / STORE_FILE).write_text(json.dumps(content), encoding="utf-8")


def read_steps(store: Path, model: str, steps: int) -> dict:
    """Open a store, plan an epoch, and make the micro-batches of its first `steps` steps and the batch of a middle step.

    The batch of the middle step is what resuming from a checkpoint needs. Returns times in seconds and memory in bytes.
    """
    tokenizer = load_tokenizer(model)
    memory_before = peak_memory()
    start = time.perf_counter()
    corpus = Reader(tokenizer, len(tokenizer), SEQUENCE_LENGTH, "drop").training((str(store),), ())
    plan = plan_training(corpus, 1, 0, global_examples=WINDOWS_PER_STEP)
    plan.batch(0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    plan.batch(plan.num_steps // 2)
    middle = time.perf_counter() - start
    start, tokens, dealer = time.perf_counter(), 0, Dealer(MICRO_BATCH * SEQUENCE_LENGTH, one_per_token)
    for step in range(min(steps, plan.num_steps)):
        for items in dealer.deal(plan.batch(step).items, corpus, 1).of_rank(0):
            tokens += collate(items, corpus).input_ids.numel()
    return {
        "tokens": sum(source.store.num_tokens for source in corpus.sources),
        "steps": plan.num_steps,
        "first_batch_s": first,
        "middle_batch_s": middle,
        "tokens_read": tokens,
        "tokens_per_s": tokens / (time.perf_counter() - start),
        "before": memory_before,
        "peak": peak_memory(),
    }


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux: KiB


def _environment() -> dict[str, str]:
    """The environment of a process that finds this repository from any working directory."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


if __name__ == "__main__":
    print(json.dumps(read_steps(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
