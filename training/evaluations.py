"""The evaluations of a run: when they are due, their results, and the best checkpoint so far."""

import math
from collections.abc import Callable

from configs.config import Config
from configs.load import GENERAL, is_of_answers, parse_best_by
from data.sources import Corpus
from distributed.process_group import Ranks, read_on_first

Evaluate = Callable[[], dict | None]
"""Measures the model and returns curve -> value; None if a signal cut it short. Every rank must call it."""


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
    "without_gain",
)


class Evaluations:
    """The finished evaluations, by name ("validation", "forgetting"), and the best checkpoint by the criterion `run.best_by`.

    The base model never counts as the best, even if it is better; `remark` then says so. Every rank holds the same values, because `measure` gives all
    ranks the same figures.
    """

    def __init__(self, config: Config, validation: Corpus | None) -> None:
        self.functions: dict[str, Evaluate] = {}
        self.every, self.patience = config.run.eval_every, config.run.stop_after_no_gain
        # The attributes below are saved in every checkpoint.
        self.evaluated: dict[str, int] = {}  # evaluation -> the last step at which it finished
        self.validation = [source.fingerprint for source in validation.sources] if validation else []
        self.best_by = criterion_of(config)
        self.curve = curve_of(self.best_by)
        self.is_judged = True  # False after a change of criterion or data: the step is evaluated again
        self.loss: float | None = None  # the last validation loss
        self.base_loss: float | None = None  # validation loss of the base model
        self.base_value: float | None = None  # the base model's value of best_by
        self.best_value: float | None = None  # the best of a trained checkpoint
        self.best_loss: float | None = None  # validation loss of that checkpoint
        self.best_step: int | None = None
        self.without_gain = 0  # evaluations of trained models since then

    def load_state_dict(self, saved: dict) -> list[str]:
        """Restore the attributes from a manifest. Return messages for the user.

        If the criterion has changed, or the validation data that it scores, no checkpoint is the best any more, and the step is
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
        """Return the evaluations that are due at `step` and have not finished there.

        An evaluation is due at the first and the last step, and every `run.eval_every` steps.
        """
        is_due = step in (0, total_steps) or (self.every > 0 and step % self.every == 0)
        return [name for name in self.functions if is_due and self.evaluated.get(name) != step]

    def measure(self, name: str, ranks: Ranks) -> dict | None:
        """Run an evaluation and return rank 0's figures on every rank, so that all decide alike. Every rank must call this."""
        figures = self.functions[name]()
        return read_on_first(lambda: figures, ranks)

    def finish(self, name: str, figures: dict, step: int, updates: int) -> bool:
        """Record an evaluation that finished at `step`. Return whether this trained model is better than all before.

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

    def remark(self, is_best: bool) -> str:
        """Return the words after an evaluation: whether it is the best so far, and then whether the base is still better.

        No trained model is better than the base in what `forgetting` measures, so there the base is not compared.
        """
        if not is_best or self.best_value is None:
            return ""
        if (
            self.base_value is None
            or self.curve.startswith(GENERAL)
            or is_better(self.best_by, self.best_value, self.base_value)
        ):
            return " (best)"
        return f" (best step so far, but not better than the base: {self.best_value:.4g} against {self.base_value:.4g})"

    @property
    def is_stalled(self) -> bool:
        """Whether run.stop_after_no_gain evaluations in a row have found no better model; never if it is 0."""
        return 0 < self.patience <= self.without_gain

    def why_stalled(self, step: int) -> str:
        """Return the reason why a run has ended before its last step, in words."""
        if not self.is_stalled:
            return f"ended early after step {step}, by a condition of train.py"
        evaluations = "1 evaluation has" if self.without_gain == 1 else f"{self.without_gain} evaluations in a row have"
        return (
            f"ended early after step {step}: {evaluations} found nothing better than {best_in_words(self.best_by)}, "
            f"{self.best_value:.4g} at step {self.best_step}"
        )


def criterion_of(config: Config) -> str:
    """Return the criterion in full, "CURVE:DIRECTION ...". Values of different criteria cannot be compared."""
    curve, direction = parse_best_by(config.run.best_by)
    text = f"{curve}:{direction}"
    if is_of_answers(curve):
        text += f" of {config.run.eval_generate} answers"
        text += f" of at most {config.eval.max_new_tokens} tokens" if config.eval.max_new_tokens else ""
        text += f" by {config.eval.metric}" if config.eval.metric else ""
    return text


def curve_of(criterion: str) -> str:
    """Return the name of the curve in a criterion."""
    return criterion.partition(":")[0]


def is_better(criterion: str, value: float, reference: float) -> bool:
    """Return whether `value` is strictly better than `reference`."""
    return value > reference if criterion.partition(":")[2].startswith("max") else value < reference


def best_in_words(criterion: str) -> str:
    """Return a criterion in words: "the lowest validation loss", "the highest validation/f1"."""
    curve = curve_of(criterion)
    extreme = "highest" if is_better(criterion, 1, 0) else "lowest"
    return f"the {extreme} {'validation loss' if curve == 'validation/loss' else curve}"
