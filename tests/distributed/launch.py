"""Launch train_worker.py on N ranks, and read the files of its runs."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.processes import run_python, run_ranks
from tests.tiny import write_chat_file, write_tiny_model

WORKER = Path(__file__).with_name("train_worker.py")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CONFIG = """\
from configs.config import *

here = {folder!r}
config = Config(
    model=Model(here + "/model", compute_dtype="fp32"),
    data=Data((here + "/train.jsonl",), {validation}, sequence_length=256, cache=here + "/tokens", {data}),
    batch=Batch({batch}, micro_batch={micro_batch}),
    # A high learning rate without warm-up: with a small one, AdamW would hide a wrong gradient scale.
    optimizer=Optimizer({rate}, warmup_steps=0, {optimizer}),
    run=Run("base", directory=here + "/runs", check={check!r}, {run}),
    {more}
)
"""


def workplace(
    folder: Path,
    train: int,
    validation: int = 0,
    model: dict | None = None,
    data: str = "packing=False",
    batch: str = "global_examples=4",
    micro_batch: int = 1,
    rate: float = 1e-3,
    optimizer: str = "epochs=1",
    run: str = "keep_last=9",
    check: str = "off",
    more: str = "",
) -> Path:
    """Write a tiny model, `train` and `validation` chats and config.py to `folder`, and return it. Runs are in `folder`/runs.

    `data`, `batch`, `optimizer` and `run` are arguments of these sections of the config, as Python code; `more` is code for
    further sections.
    """
    write_tiny_model(folder / "model", **model or {})
    write_chat_file(folder / "train.jsonl", train)
    if validation:
        write_chat_file(folder / "validation.jsonl", validation, seed=1)
    held_out = '(here + "/validation.jsonl",)' if validation else "()"
    parts = {"data": data, "batch": batch, "micro_batch": micro_batch, "rate": rate, "optimizer": optimizer, "run": run}
    parts["check"] = check
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder), validation=held_out, more=more, **parts))
    return folder


def write_plan(folder: Path, name: str, runs: list[dict]) -> Path:
    """Write the list of runs for train_worker.py. Return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"{name}.json"
    plan.write_text(json.dumps(runs))
    return plan


def run_of(
    folder: Path, name: str, *overrides: str, plant: str | None = None, expect: int = 0, script: Path | None = None
) -> dict:
    """Describe a run of `folder`/config.py for `launch`. `expect` is its exit code, `script` an edited copy of train.py."""
    arguments = [str(folder / "config.py"), f"run.name={name}", *overrides]
    return {"arguments": arguments, "plant": plant, "expect": expect, "script": script and str(script)}


def launch(folder: Path, name: str, world_size: int, runs: list[dict]) -> str:
    """Run `runs` one after the other in a single launch. Return the output, which is also in NAME.out.

    World size 0 is plain python without a launcher. The ranks are forked (tests/processes.py). Checks the exit code of every
    run on every rank: `expect` of the run, 0 by default.
    """
    plan = write_plan(folder, name, runs)
    if world_size:
        process = run_ranks(world_size, WORKER, plan, **ENVIRONMENT)
    else:
        process = run_python(WORKER, plan, **ENVIRONMENT)
    output = process.stdout + process.stderr
    (folder / f"{name}.out").write_text(output)
    for number, run in enumerate(runs):
        for rank in range(max(1, world_size)):
            code = folder / f"{name}.{number}.rank{rank}.exit"
            assert code.is_file(), f"run {number} ({run}) never ended on rank {rank}:\n{output[-6000:]}"
            assert int(code.read_text()) == run.get("expect", 0), (
                f"run {number} ({run}), rank {rank}:\n{output[-6000:]}"
            )
    assert process.returncode == 0, output[-6000:]
    return output


def flip_bit(path: Path) -> None:
    """Flip a bit in the middle of a file, as a damaged disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rows(run: Path, key: str = "train/loss") -> dict[int, dict]:
    """Return the rows of metrics.jsonl that have `key`, by step. Fail if a step occurs twice."""
    rows_by_step = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if key in row:
            assert row["step"] not in rows_by_step, f"step {row['step']} occurs twice in {run}"
            rows_by_step[row["step"]] = row
    return rows_by_step


def weights(run: Path) -> dict:
    """Return the exported tensors by name."""
    return load_file(run / "export" / "model.safetensors")


def largest_difference(a: dict, b: dict) -> float:
    """Return the largest absolute difference between two exports over all tensors; infinite if a value is not finite."""
    assert a.keys() == b.keys()
    worst = torch.stack([(a[name].double() - b[name].double()).abs().max() for name in a]).max().item()
    return worst if math.isfinite(worst) else math.inf


def relative_difference(a: dict[int, dict], b: dict[int, dict], key: str) -> float:
    """Return the largest relative difference between two curves over all steps."""
    assert a.keys() == b.keys()
    return max(abs(a[step][key] - b[step][key]) / abs(a[step][key]) for step in a)


def assert_same_update(
    run: Path, reference: Path, limit: float = 1e-5, keys: tuple[str, ...] = ("train/loss", "train/grad_norm")
) -> None:
    """Check that two runs have equal steps, curves (relatively) and exported weights, up to `limit`. 0 means bitwise."""
    for key in keys:
        assert relative_difference(rows(reference, key), rows(run, key), key) <= limit, (run.name, key)
    assert largest_difference(weights(reference), weights(run)) <= limit, run.name
