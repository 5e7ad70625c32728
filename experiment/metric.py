"""The curve that a sweep chooses by, and which direction is better."""

from dataclasses import dataclass

from common.errors import UserError
from configs.config import Config

_LOSS = "validation/loss"
_HIGHER = tuple(f"validation/{name}" for name in ("f1", "exact_match", "rouge_l"))


@dataclass(frozen=True)
class Metric:
    """curve: its name in metrics.jsonl."""

    curve: str
    lower_is_better: bool

    def is_better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`; of two equal ones none is."""
        return value < other if self.lower_is_better else value > other


def parse_metric(text: str) -> Metric:
    """The metric of `--by`, written like run.best_by: validation/loss, f1, or NAME:max and NAME:min.

    Raises UserError for a curve that is not of data.validation, or whose direction is not known.
    """
    name, colon, direction = text.partition(":")
    curve = name if "/" in name else f"validation/{name}"
    if not curve.startswith("validation/") or not name or (colon and direction not in ("max", "min")):
        raise UserError(
            f"--by {text}: a sweep chooses by a curve on data.validation, e.g. --by validation/loss or --by f1"
        )
    is_loss = curve == _LOSS or curve.startswith(f"{_LOSS}/")
    if not colon and not is_loss and curve not in _HIGHER:
        raise UserError(
            f"--by {text}: it is not known whether a high or a low {curve} is better; write {name}:max or {name}:min"
        )
    return Metric(curve, direction == "min" if colon else is_loss)


def check_measured(metric: Metric, config: Config, config_file: str) -> None:
    """Raise UserError if runs of a config will not measure the metric."""
    if not config.data.validation and not config.data.validation_share:
        raise UserError(
            f"{config_file} has no validation data, by which a sweep chooses; set data.validation or data.validation_share"
        )
    if not metric.curve.startswith(_LOSS) and not getattr(config.run, "eval_generate", 0):
        raise UserError(
            f"--by {metric.curve} is a score of generated answers; set run.eval_generate to a number of examples"
        )
