"""What the experiment compares: the sizes it can have, and its arms."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from configs.config import Config
from configs.load import load_config, override

METHODS = ("full", "lora")  # each with a config and learning rates of its own


@dataclass(frozen=True)
class Size:
    """One size of the experiment.

    configs: method -> config file. settings: method -> overrides of its runs. profile, style, examples, splits: of make_reports.py; the splits are train, validation and those
    of `tests`, of which only the first is scored. overrides: of every run. rates: method -> learning rates that the sweep
    tries from low to high, as written on the command line. shots: examples before the
    prompts of the base model. replay: share of the target tokens. new_tokens: of the extended vocabulary.
    """

    configs: dict[str, str]
    settings: dict[str, tuple[str, ...]]
    profile: str
    examples: int
    splits: tuple[float, ...]
    test: str
    rates: dict[str, tuple[str, ...]]
    style: str = "long"
    overrides: tuple[str, ...] = ()
    shots: int = 4
    replay: float = 0.05
    replay_documents: int = 128
    replay_tokens: int = 256
    new_tokens: int = 200
    ewc: tuple[str, ...] = ("ewc.strength=10", "ewc.documents=64", "ewc.batch=4")
    alphas: tuple[str, ...] = ("0.5", "0.7", "0.85")  # weights of the tuned model in the averages with the base
    shares: tuple[float, ...] = (
        0.1,
        0.3,
    )  # of the training examples, for the learning curve; 1 are the arms themselves


SIZES = {
    # 400 reports are 50 steps of 8, about 62,000 tokens a run.
    "quickstart": Size(
        configs={"full": "configs/quickstart.py", "lora": "configs/quickstart.py"},
        settings={"full": (), "lora": ("lora.rank=64",)},
        profile="quickstart",
        examples=544,
        splits=(400 / 544, 40 / 544, 104 / 544),
        test="test",
        rates={"full": ("1.5e-4", "3e-4", "6e-4"), "lora": ("5e-4", "1e-3", "2e-3", "4e-3")},
        overrides=("run.eval_every=25", "run.save_every=0"),
    ),
    # 4,898 reports are 613 steps of 8, about 2.3 million tokens a run. It has not been run.
    "laptop": Size(
        configs={"full": "configs/xbrl_laptop.py", "lora": "configs/xbrl_lora_laptop.py"},
        settings={"full": (), "lora": ()},
        profile="full",
        style="short",
        examples=5500,
        splits=(0.89, 0.055, 0.055),
        test="test",
        rates={"full": ("3e-4", "6e-4", "1.2e-3"), "lora": ("5e-4", "1e-3", "2e-3")},
        overrides=("run.eval_every=100", "run.save_every=100"),
        replay_documents=1000,
    ),
    # The reference: 5,500 reports, 3 epochs of 64 a step. Needs 8 GPUs; it has not been run.
    "full": Size(
        configs={"full": "configs/xbrl.py", "lora": "configs/xbrl_lora.py"},
        settings={"full": (), "lora": ()},
        profile="full",
        examples=5500,
        splits=(0.89, 0.055, 0.055),
        test="test",
        rates={"full": ("1e-5", "2e-5", "4e-5"), "lora": ("1e-4", "2e-4", "4e-4")},
        replay_documents=4000,
        replay_tokens=512,
        new_tokens=2000,
        ewc=("ewc.strength=10", "ewc.documents=1024"),
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to train. method: whose config and learning rate it takes. overrides: of its runs. low: at the next lower
    rate of the sweep, so that its first seed is trained already.
    """

    name: str
    words: str
    method: str
    overrides: tuple[str, ...] = ()
    low: bool = False


@dataclass(frozen=True)
class Experiment:
    """An experiment in a directory. seeds: how many; processes: of every launch."""

    size: Size
    out: Path
    data: Path  # the directory of the reports
    seeds: int = 3
    processes: int = 1
    base: str = field(init=False)
    rows: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", load_config(self.size.configs["full"], []).model.path)
        object.__setattr__(self, "rows", self.out / "steps.jsonl")

    def split(self, name: str) -> Path:
        """The examples of a split."""
        return self.data / f"{name}.jsonl"

    @property
    def topics(self) -> Path:
        """General text that comes with Python, for replay and the Fisher diagonal."""
        return self.out / "replay" / "topics.jsonl"

    @property
    def samples(self) -> Path:
        """Text that the base model wrote, for replay."""
        return self.out / "replay" / "self.jsonl"

    @property
    def vocabulary(self) -> Path:
        """The base model with new tokens."""
        return self.out / "vocabulary"

    def arms(self) -> list[Arm]:
        """The arms that are trained, the two of the question first."""
        size = self.size

        def replay(file: Path) -> str:
            return f"data.mix=replay:{size.replay:g}:{file}"

        return [
            Arm("full", "full fine-tuning", "full"),
            Arm("lora", "LoRA, rank 64 on all linear layers", "lora"),
            Arm("vocabulary", "full, with new tokens", "full", (f"model.path={self.vocabulary}",)),
            Arm("replay-topics", "full, with 5% general text", "full", (replay(self.topics),)),
            Arm("replay-self", "full, with 5% text of the base model itself", "full", (replay(self.samples),)),
            Arm(
                "replay-ewc",
                "full, with 5% general text and EWC",
                "full",
                (replay(self.topics), *size.ewc, f"ewc.data={self.topics}"),
            ),
            Arm("low-lr", "full, at the next lower learning rate", "full", low=True),
        ]

    def overrides(self, arm: Arm, rate: str, seed: int, share: float = 1.0, steps: int = 0) -> list[str]:
        """The overrides of one run on the command line of train.py. rate: as `rate_of` gives it.

        With a share of the examples below 1, they are seen so often that the run has `steps` steps like the others.
        """
        train = self.split("train") if share == 1 else self.subset(share)
        mix = [] if any(text.startswith("data.mix=") for text in arm.overrides) else ["data.mix=none"]
        repeated = [] if share == 1 else [f"optimizer.epochs={steps}", f"optimizer.max_steps={steps}"]
        return [
            f"data.train={train}",
            f"data.validation={self.split('validation')}",
            *mix,
            *("run.eval_general=False", "forgetting.max_kl=none", "forgetting.strict=false", "run.keep_last=1"),
            *self.size.overrides,
            *self.size.settings[arm.method],
            *arm.overrides,
            *repeated,
            f"optimizer.learning_rate={rate}",
            f"run.seed={seed}",
            f"run.directory={self.out}",
            f"run.name={self.run(arm, rate, seed, share).name}",
        ]

    def rate_of(self, arm: Arm, chosen: str) -> str:
        """The learning rate of an arm, from the one that was chosen for its method; a third of it if none was lower."""
        if not arm.low:
            return chosen
        tried = self.size.rates[arm.method]
        place = tried.index(chosen)
        return tried[place - 1] if place else f"{float(chosen) / 3:.4g}"

    def run(self, arm: Arm, rate: str, seed: int, share: float = 1.0) -> Path:
        """The directory of a run, named after what trains: another rate of the sweep is a run of `full`."""
        name = arm.method if arm.low else arm.name
        return self.out / f"{name}{'' if share == 1 else f'-{100 * share:g}pc'}-lr{rate}-s{seed}"

    def average(self, alpha: str, seed: int) -> Path:
        """The model whose weights are (1 - alpha) x base + alpha x full."""
        return self.out / f"average-a{alpha}-s{seed}"

    def subset(self, share: float) -> Path:
        """The file with a share of the training examples."""
        return self.out / "data" / f"train-{100 * share:g}pc.jsonl"

    def config(self, arm: Arm, overrides: list[str]) -> Config:
        """The resolved config of a run. Raises UserError if a setting is refused."""
        return _resolved(self.size.configs[arm.method], tuple(overrides))


@functools.cache  # the steps are listed anew before each of them
def _resolved(file: str, overrides: tuple[str, ...]) -> Config:
    return override(load_config(file, []), overrides)
