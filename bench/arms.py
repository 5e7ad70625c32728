"""The arms: what each needs, in which settings it runs, and how it is started."""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import ours
from bench.spec import Spec

NOT_INSTALLED = "not installed: pip install -r requirements-bench.txt"


@dataclass(frozen=True)
class Arm:
    """One line of the table. module: the file of bench/ that runs a peer; None: our own train.py."""

    key: str  # for --arms
    name: str
    module: str | None
    needs: tuple[str, ...] = ()  # packages
    settings: tuple[str, ...] = ("parity", "matched", "defaults")
    ranks: int = 1
    packed: bool = False
    completed: bool = False
    lacks: str = ""  # the feature whose lack excuses a difference in parity

    def missing(self) -> bool:
        """Whether a package that it needs is not installed."""
        return any(importlib.util.find_spec(name) is None for name in self.needs)

    def command(self, spec: Spec) -> list[str]:
        """Write what the run is told, and return its command."""
        if self.module is None:
            return ours.command(spec, self.ranks)
        return [sys.executable, "-m", f"bench.{self.module}", str(spec.write())]

    def rows(self, spec: Spec) -> tuple[Path, Callable[[str], dict | None]]:
        """Where its steps are written, and how a line is read."""
        if self.module is None:
            return ours.rows_file(spec), lambda text: ours.read_row(text, spec)
        return spec.rows, json.loads


OURS = "ours"  # what the others are compared with
HUGGING_FACE = ("accelerate",)
TRL = ("trl", "datasets", "accelerate")
LITGPT = ("litgpt", "lightning")

ARMS = (
    Arm("ours", OURS, None),
    Arm("ours-2", "ours, 2 ranks", None, ranks=2),
    Arm("trainer", "transformers.Trainer", "trainer", HUGGING_FACE),
    Arm("trainer-flat", "transformers.Trainer, flattened", "trainer", HUGGING_FACE, ("parity", "matched"), packed=True),
    Arm("trl", "TRL SFTTrainer", "trl", TRL),
    Arm("trl-packed", "TRL SFTTrainer, packed", "trl", TRL, packed=True),
    Arm("litgpt", "LitGPT full", "litgpt", LITGPT, lacks="no tied embedding and head, no gradient clipping"),
    Arm("litgpt-completed", "LitGPT full, both added by us", "litgpt", LITGPT, ("parity",), completed=True),
)
