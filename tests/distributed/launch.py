"""Start train_worker.py on N processes and read what its runs left."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

WORKER = Path(__file__).with_name("train_worker.py")

HANGS_AFTER = 400  # seconds; a guard against a collective that one rank skips, far above what the runs take


def start(folder: Path, name: str, world_size: int, runs: list[dict]) -> subprocess.Popen:
    """Processes that do `runs` in turn; world size 0 is plain python, without torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"{name}.json"
    plan.write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    command = [*torchrun, str(WORKER), str(plan)] if world_size else [sys.executable, str(WORKER), str(plan)]
    output = (folder / f"{name}.out").open("w")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def launch(folder: Path, name: str, world_size: int, runs: list[dict]) -> str:
    """Wait for the runs; the exit codes they promise (`expect`, 0 by default) are checked on every rank."""
    process = start(folder, name, world_size, runs)
    try:
        process.wait(timeout=HANGS_AFTER)
    except subprocess.TimeoutExpired:
        process.kill()
    output = (folder / f"{name}.out").read_text()
    for number, run in enumerate(runs):
        for rank in range(max(1, world_size)):
            code = folder / f"{name}.{number}.rank{rank}.exit"
            assert code.is_file(), f"run {number} ({run}) never ended on rank {rank}:\n{output[-6000:]}"
            assert int(code.read_text()) == run.get("expect", 0), (
                f"run {number} ({run}), rank {rank}:\n{output[-6000:]}"
            )
    return output


def rows(run: Path, key: str = "train/loss") -> dict[int, dict]:
    """metrics.jsonl by step: the rows that hold `key`. Fails where a step stands twice."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if key in row:
            assert row["step"] not in found, f"step {row['step']} stands twice in {run}"
            found[row["step"]] = row
    return found


def weights(run: Path) -> dict:
    """The exported tensors."""
    return load_file(run / "export" / "model.safetensors")


def largest_difference(a: dict, b: dict) -> float:
    """Over all tensors of two exports; infinite where either is not finite."""
    assert a.keys() == b.keys()
    worst = max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
    return worst if worst == worst else float("inf")


def relative_difference(a: dict[int, dict], b: dict[int, dict], key: str) -> float:
    """The largest relative difference of a curve over all steps."""
    assert a.keys() == b.keys()
    return max(abs(a[step][key] - b[step][key]) / abs(a[step][key]) for step in a)
