"""What a run leaves to read: metrics.jsonl, TensorBoard, the lines on the terminal, and what produced them. Rank 0 writes."""

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

from distributed.checkpoint import write_durably


class RunLog:
    """Curves of one run, continued at `start_step` without double rows. On other ranks every method does nothing."""

    def __init__(self, directory: Path, rank: int, start_step: int, total_steps: int) -> None:
        self.on = rank == 0
        if not self.on:
            return
        # Imported here: only rank 0 pays for it.
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        _forget_rows_after(self.path, start_step)
        self.file = self.path.open("a")
        # What TensorBoard holds of later steps was written by a run that died before it saved them.
        self.tensorboard = SummaryWriter(directory / "tensorboard", purge_step=start_step + 1 if start_step else None)
        self.bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def row(self, step: int, values: dict[str, float]) -> None:
        """One row of curves; names like `train/loss` group them in TensorBoard."""
        if self.on:
            self.file.write(json.dumps({"step": step} | values) + "\n")
            self.file.flush()
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line on the terminal that leaves the progress bar whole."""
        if self.on:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.on:
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Flush and close the curves."""
        if self.on:
            self.file.close()
            self.tensorboard.close()
            self.bar.close()


def write_provenance(directory: Path, config: dict) -> dict:
    """`config.json`: the resolved config, git commit and versions; `git.diff`: what was not committed. Returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    record = {
        "config": config,
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD") or "not a git checkout",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }
    write_durably(directory / "config.json", json.dumps(record, indent=1))
    write_durably(directory / "git.diff", _git("diff", "HEAD"))
    return record


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held: allocated on its GPU, or resident on the host. GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _forget_rows_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill in the middle of the line
    write_durably(path, "".join(line + "\n" for line in kept))


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, env=environment)
    except OSError:
        return ""
    return answer.stdout if arguments[0] == "diff" else answer.stdout.strip()
