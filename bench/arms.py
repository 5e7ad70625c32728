"""The trainers under comparison ("arms"): the packages each one needs, the settings it runs in, and how it is started."""

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
    """One trainer in one configuration: one line of the table."""

    key: str  # for --arms
    name: str
    module: str | None  # the module in bench/ that runs another trainer; None: our own train.py
    packages: tuple[str, ...] = ()  # required packages, by module
    settings: tuple[str, ...] = ("parity", "matched", "skewed", "defaults")
    ranks: int = 1
    packed: bool = False
    with_missing_features: bool = False
    on_request: bool = False  # runs only if --arms names it
    missing_features: str = ""  # what the trainer lacks; excuses a difference in parity

    def lacks_packages(self) -> bool:
        """Whether a required package is not installed."""
        return any(importlib.util.find_spec(name) is None for name in self.packages)

    def distributions(self) -> tuple[str, ...]:
        """The required packages by the names under which they are installed."""
        return tuple(DISTRIBUTIONS.get(name, name) for name in self.packages)

    def command(self, spec: Spec) -> list[str]:
        """Write the input files of the run and return its command."""
        if self.module is None:
            return ours.command(spec, self.ranks)
        return [sys.executable, "-m", f"bench.{self.module}", str(spec.write())]

    def step_rows(self, spec: Spec) -> tuple[Path, Callable[[str], dict | None]]:
        """The file to which the run writes one line per step, and the function that parses a line."""
        if self.module is None:
            return ours.metrics_file(spec), lambda line: ours.read_row(line, spec)
        return spec.rows_file, json.loads


OURS = "ours"  # the reference of every comparison
HUGGING_FACE = ("accelerate",)
TRL = ("trl", "datasets", "accelerate")
LITGPT = ("litgpt", "lightning")
LITGPT_LACKS = "no tied embedding and head, no gradient clipping"
OLMO_CORE = ("olmo_core",)
DISTRIBUTIONS = {"olmo_core": "ai2-olmo-core"}  # where the name differs from that of the module

SAME_STEPS = ("parity", "matched", "skewed")
# In `skewed` Trainer and OLMo-core stand for those that pad; TRL and LitGPT would pad as much and take as long again.
NOT_SKEWED = ("parity", "matched", "defaults")

ARMS = (
    Arm("ours", OURS, None),
    Arm("ours-2", "ours, 2 ranks", None, ranks=2),
    Arm("ours-4", "ours, 4 ranks", None, ranks=4, on_request=True),
    Arm("trainer", "transformers.Trainer", "trainer", HUGGING_FACE),
    Arm("trainer-flat", "transformers.Trainer, flattened", "trainer", HUGGING_FACE, SAME_STEPS, packed=True),
    Arm("trl", "TRL SFTTrainer", "trl", TRL, NOT_SKEWED),
    Arm("trl-packed", "TRL SFTTrainer, packed", "trl", TRL, packed=True),
    Arm("litgpt", "LitGPT full", "litgpt", LITGPT, NOT_SKEWED, missing_features=LITGPT_LACKS),
    Arm("litgpt-completed", "LitGPT full, both added by us", "litgpt", LITGPT, ("parity",), with_missing_features=True),
    Arm("olmo-core", "OLMo-core", "olmo_core", OLMO_CORE, SAME_STEPS),
)
