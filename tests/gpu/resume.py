"""Stop, kill and resume train.py on all devices, bitwise: python -m tests.gpu.resume CASE OUT FOLDER RANKS tiny|full

One run goes straight through. Another with the same settings (run.deterministic) is ended after its first checkpoint, started
again, and must export the same weights to the bit. CASE: `signal` ends it with SIGTERM, `kill` with SIGKILL to all processes,
`asynchronous` is `kill` with run.async_save, so that a save may be under way.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.gpu.parity import SMOLLM2
from tests.tiny import write_chat_file, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY, END_AFTER = 30, 8, 11
TIMEOUT = 240.0  # seconds of one run


def prepare(folder: Path, size: str) -> Path:
    """Write model, data and config once; return the config."""
    config = folder / "config.py"
    if config.is_file():
        return config
    folder.mkdir(parents=True, exist_ok=True)
    model = SMOLLM2.resolve() if SMOLLM2.is_dir() and size == "full" else folder / "model"
    if model == folder / "model":
        write_tiny_model(model, **({"vocab_size": 32768, "hidden": 768, "layers": 12} if size == "full" else {}))
    write_chat_file(folder / "train.jsonl", 8 * STEPS)
    config.write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(model)!r}),
    data=Data(({str(folder / "train.jsonl")!r},), sequence_length=512, cache=None),
    batch=Batch(global_examples=8, micro_batch=1),
    optimizer=Optimizer(1e-4, max_steps={STEPS}),
    run=Run("straight", directory={str(folder / "runs")!r}, deterministic=True, save_every={SAVE_EVERY}, keep_last=1, log_every=1),
)
""")
    return config


def start(config: Path, ranks: int, log: Path, *overrides: str) -> subprocess.Popen:
    """Start train.py on `ranks` processes, in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "train.py", str(config), *overrides]
    with open(log, "a", encoding="utf-8") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


@contextmanager
def ended_at_last(process: subprocess.Popen) -> Iterator[None]:
    """Whatever happens inside, no process of the run outlives it."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a run that must succeed."""
    with ended_at_last(process):
        code = process.wait(TIMEOUT)
    if code:
        raise SystemExit(f"train.py ended with {code}: {log.read_text(encoding='utf-8')[-1500:]}")


def end(process: subprocess.Popen, run: Path, number: int) -> int:
    """Send the signal `number` once step END_AFTER is logged. Returns the last logged step, STEPS if it came too late."""
    metrics, begin = run / "metrics.jsonl", time.monotonic()
    with ended_at_last(process):
        while process.poll() is None and last_step(metrics) < END_AFTER:
            if time.monotonic() - begin > TIMEOUT:
                raise SystemExit(f"step {END_AFTER} was not reached in {TIMEOUT:.0f} s")
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, number)
        process.wait(TIMEOUT)
    return last_step(metrics)


def last_step(metrics: Path) -> int:
    """The last training step in a file of metrics; 0 without one."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.is_file() else []
    return max((json.loads(line)["step"] for line in lines if '"train/loss"' in line), default=0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted((run / "export").glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def main() -> None:
    case, out, folder, ranks, size = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    folder = folder.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the runs are ended too
    config = prepare(folder, size)
    straight, ended, log = folder / "runs" / "straight", folder / "runs" / case, folder / f"{case}.log"
    if not (straight / "export").is_dir():
        finish(start(config, ranks, log), log)
    options = [f"run.name={case}", *(["run.async_save=True"] if case == "asynchronous" else [])]
    step = end(start(config, ranks, log, *options), ended, signal.SIGTERM if case == "signal" else signal.SIGKILL)
    finish(start(config, ranks, log, *options), log)
    resumed = "resumed from" in log.read_text(encoding="utf-8")
    first, second = weights(straight), weights(ended)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    ok = resumed and step < STEPS and not different and first.keys() == second.keys()
    text = f"ended after step {step} of {STEPS} on {ranks} rank{'s' if ranks > 1 else ''}, "
    text += "resumed" if resumed else "not resumed from a checkpoint"
    text += f"; {len(first) - len(different)} of {len(first)} tensors equal to the bit"
    out.write_text(json.dumps({"ok": ok, "text": text, "step": step, "different": different}), encoding="utf-8")


if __name__ == "__main__":
    main()
