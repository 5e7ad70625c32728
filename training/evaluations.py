"""The evaluations of a run: which are due at a step, what they found, and which checkpoint is the best so far."""

import math
from collections.abc import Callable

from configs.config import Config
from configs.load import GENERAL, is_of_answers, parse_best_by
from data.sources import Corpus
from distributed.process_group import Ranks, read_on_first

Evaluate = Callable[[], dict | None]
"""Measures the model: the name of each curve -> its value; None if a signal cut it short. Every rank calls it."""


# The attributes of Evaluations that the manifest of a checkpoint keeps, plain JSON.
SAVED = (
    "evaluated",
    "validation",
    "loss",
    "base_loss",
    "best_by",
    "base_value",
    "best_value",
    "best_loss",
    "best_step",
)
SAVED += ("without_gain",)


class Evaluations:
    """What has been evaluated, by name of the evaluation ("validation", "forgetting"), and the best checkpoint.

    `run.best_by` is the criterion of the best. The base model is never the best, also where it is better. Every rank holds
    the same values, because `measure` gives all ranks the same figures.
    """

    def __init__(self, config: Config, validation: Corpus | None) -> None:
        self.functions: dict[str, Evaluate] = {}
        self.every, self.patience = config.run.eval_every, config.run.stop_after_no_gain
        # What a checkpoint keeps.
        self.evaluated: dict[str, int] = {}  # evaluation -> the last step at which it finished
        self.validation = [source.fingerprint for source in validation.sources] if validation else []
        self.best_by = criterion_of(config)
        self.curve = curve_of(self.best_by)
        self.is_judged = True  # False: by another criterion or other data; the step is evaluated again
        self.loss: float | None = None  # the last validation loss
        self.base_loss: float | None = None  # validation loss of the base model
        self.base_value: float | None = None  # what best_by is for the base model
        self.best_value: float | None = None  # the best of a trained checkpoint
        self.best_loss: float | None = None  # validation loss of that checkpoint
        self.best_step: int | None = None
        self.without_gain = 0  # evaluations of trained models since then

    def load_state_dict(self, saved: dict) -> list[str]:
        """Continue from what a manifest has. Returns lines for the user.

        With another criterion, or other validation data that it scores, no checkpoint is the best any more, and the step is
        evaluated again.
        """
        validation, best_by, changed = self.validation, self.best_by, []
        for name in SAVED:
            setattr(self, name, saved[name])
        if validation and validation != self.validation:
            changed += [] if best_by.startswith(GENERAL) else ["data.validation has changed"]
            self.validation, self.base_loss, self.best_loss = validation, None, None
            self.evaluated.pop("validation", None)
        if best_by != self.best_by:
            changed.append(f"run.best_by has changed ({self.best_by} -> {best_by})")
            self.best_by = best_by
            self.evaluated.pop(best_by.partition("/")[0], None)
        if not changed:
            return []
        self.base_value = self.best_value = self.best_loss = self.best_step = None
        self.without_gain, self.is_judged = 0, False
        return [f"{'; '.join(changed)}: the next evaluation is the first that counts"]

    def due(self, step: int, total_steps: int) -> list[str]:
        """The evaluations that are due at this step and have not finished at it: first, last, and every so many steps."""
        is_due = step in (0, total_steps) or (self.every > 0 and step % self.every == 0)
        return [name for name in self.functions if is_due and self.evaluated.get(name) != step]

    def measure(self, name: str, ranks: Ranks) -> dict | None:
        """The figures of an evaluation, those of rank 0 on every rank: all ranks decide by them. A collective."""
        figures = self.functions[name]()
        return read_on_first(lambda: figures, ranks)

    def finish(self, name: str, figures: dict, step: int, updates: int) -> bool:
        """Record an evaluation that finished at `step`; True if it found a trained model better than all before.

        updates: steps so far that changed the weights. Evaluations without a finite value of the criterion are not counted.
        """
        self.evaluated[name] = step
        loss, value = figures.get("validation/loss", math.nan), figures.get(self.curve, math.nan)
        if name == "validation":
            self.loss = loss if math.isfinite(loss) else None
        if updates == 0:  # still the base model, at step 0 or after skipped steps
            self.base_loss = loss if math.isfinite(loss) else self.base_loss
            self.base_value = value if math.isfinite(value) else self.base_value
            return False
        if not math.isfinite(value):
            return False
        improved = self.best_value is None or is_better(self.best_by, value, self.best_value)
        self.without_gain = 0 if improved else self.without_gain + 1
        if improved:
            self.best_value, self.best_step = value, step
            self.best_loss = self.loss if self.evaluated.get("validation") == step else None
        return improved

    @property
    def is_stalled(self) -> bool:
        """Whether run.stop_after_no_gain evaluations in a row have found nothing better; 0: never."""
        return 0 < self.patience <= self.without_gain

    def why_stalled(self, step: int) -> str:
        """Why a run has ended before its last step, in words."""
        if not self.is_stalled:
            return f"ended early after step {step}, by a condition of train.py"
        found = "1 evaluation has" if self.without_gain == 1 else f"{self.without_gain} evaluations in a row have"
        return (
            f"ended early after step {step}: {found} found nothing better than {best_in_words(self.best_by)}, "
            f"{self.best_value:.4g} at step {self.best_step}"
        )


def criterion_of(config: Config) -> str:
    """What run.best_by means in this config, "CURVE:DIRECTION ...": values of different texts cannot be compared."""
    curve, direction = parse_best_by(config.run.best_by)
    text = f"{curve}:{direction}"
    if is_of_answers(curve):
        text += f" of {config.run.eval_generate} answers"
        text += f" of at most {config.eval.max_new_tokens} tokens" if config.eval.max_new_tokens else ""
        text += f" by {config.eval.metric}" if config.eval.metric else ""
    return text


def curve_of(criterion: str) -> str:
    """The name of the curve in a criterion."""
    return criterion.partition(":")[0]


def is_better(criterion: str, value: float, other: float) -> bool:
    """Whether `value` is better than `other`; of two equal ones none is."""
    return value > other if criterion.partition(":")[2].startswith("max") else value < other


def best_in_words(criterion: str) -> str:
    """ "the lowest validation loss", "the highest validation/f1"."""
    curve = curve_of(criterion)
    extreme = "highest" if is_better(criterion, 1, 0) else "lowest"
    return f"the {extreme} {'validation loss' if curve == 'validation/loss' else curve}"
