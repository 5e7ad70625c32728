"""What a run records: metrics.jsonl, TensorBoard, lines on the terminal, and its provenance. Only rank 0 writes."""

import json
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from common.durable_files import write_durably, write_json


class RunLog:
    """Curves of one run, continued at `start_step` without duplicate rows. On other ranks every method is a no-op."""

    def __init__(self, directory: Path, rank: int, start_step: int, total_steps: int) -> None:
        self.enabled = rank == 0
        if not self.enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only on rank 0

        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        _drop_rows_after(self.path, start_step)
        self.file = self.path.open("a")
        # TensorBoard may hold later steps of a run that died before it saved them.
        self.tensorboard = SummaryWriter(directory / "tensorboard", purge_step=start_step + 1 if start_step else None)
        self.bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def row(self, step: int, values: dict[str, float]) -> None:
        """Add one row of curves. Names like `train/loss` are grouped by TensorBoard."""
        if self.enabled:
            self.file.write(json.dumps({"step": step} | values) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def evaluation(self, step: int, total_steps: int, figures: dict[str, float], is_best: bool) -> None:
        """Add the curves of an evaluation and print them in one line."""
        self.row(step, figures)
        values = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"step {step}/{total_steps} | {values}{' (best)' if is_best else ''}")

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.enabled:
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Flush and close all outputs."""
        if self.enabled:
            self.file.close()
            self.tensorboard.close()
            self.bar.close()


def write_provenance(directory: Path, config: dict) -> dict:
    """Write config.json (resolved config, command, commit, versions) and git.diff (uncommitted changes); returns the former."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    record = {
        "config": config,
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD") or "not a git checkout",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }
    write_json(directory / "config.json", record)
    write_durably(directory / "git.diff", _git("diff", "HEAD"))
    return record


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _drop_rows_after(path: Path, step: int) -> None:
    """Remove rows of steps that a resumed run will take again, and a last line that a kill cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    write_durably(path, "".join(line + "\n" for line in kept))


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, env=environment)
    except OSError:
        return ""
    return answer.stdout if arguments[0] == "diff" else answer.stdout.strip()
