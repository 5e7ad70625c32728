"""Checks of the settings by which a run is watched: what is the best checkpoint, answers at evaluations, where curves go."""

import re

from common.errors import UserError
from configs.config import Config
from configs.loading.names import nearest

SINKS = ("tensorboard", "wandb", "mlflow")
LOSS, GENERAL, STOP = "validation/loss", "forgetting/", "run.stop_after_no_gain"
# The curves whose better direction is known.
LOWER_IS_BETTER = (LOSS, "forgetting/perplexity_per_byte", "forgetting/kl")
HIGHER_IS_BETTER = (
    *(f"validation/{name}" for name in ("f1", "fact_f1", "exact_match", "rouge_l")),
    *("forgetting/agreement", "forgetting/questions"),
)


def parse_best_by(text: str) -> tuple[str, str]:
    """(name of the curve, max or min) of a value of run.best_by. Raises UserError if the direction is not known.

    A name without a slash is one of `validation/`: f1 is validation/f1.
    """
    name, colon, direction = text.partition(":")
    curve = name if "/" in name else f"validation/{name}"
    if colon and direction in ("max", "min") and name:
        return curve, direction
    if colon or not name:
        raise UserError(f"run.best_by must be the name of a curve, NAME:max or NAME:min, not {text!r}")
    if curve in LOWER_IS_BETTER or curve.startswith(f"{LOSS}/"):
        return curve, "min"
    if curve in HIGHER_IS_BETTER:
        return curve, "max"
    raise UserError(
        f"run.best_by={text}: it is not known whether a high or a low {curve} is better; write run.best_by={name}:max or "
        f"run.best_by={name}:min{nearest(curve, (*LOWER_IS_BETTER, *HIGHER_IS_BETTER))}"
    )


def parse_profile(text: str) -> tuple[int, int]:
    """(first step, counted from 1; number of steps) of a value of run.profile. Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", text):
        raise UserError(f"run.profile must be STEP:COUNT, such as 100:3 for steps 100 to 102, not {text!r}")
    first, _, count = text.partition(":")
    return int(first), int(count)


def is_of_answers(curve: str) -> bool:
    """Whether a curve is a score of the answers of run.eval_generate."""
    return not curve.startswith((GENERAL, f"{LOSS}/")) and curve != LOSS


def check_watching(config: Config) -> None:
    """Check run.eval_generate, run.best_by, run.stop_after_no_gain, run.log_to, run.profile and eval.metric. Raises UserError."""
    run, metric = config.run, config.eval.metric
    if run.profile is not None:
        parse_profile(run.profile)
    has_validation = bool(config.data.validation or config.data.validation_share)
    if any(name not in SINKS for name in run.log_to) or len(set(run.log_to)) < len(run.log_to):
        raise UserError(f"run.log_to must name each of {', '.join(SINKS)} at most once, not {', '.join(run.log_to)}")
    if run.eval_generate and not has_validation:
        raise UserError("run.eval_generate answers examples of data.validation; set it or data.validation_share")
    if metric is not None and not re.fullmatch(r"(\w+\.)*\w+:\w+", metric):
        raise UserError(f"eval.metric must be MODULE:FUNCTION, not {metric!r}")
    if metric is not None and not run.eval_generate:
        raise UserError("eval.metric scores the answers of run.eval_generate; set it to a number of examples")
    if run.stop_after_no_gain and not run.eval_every:
        raise UserError("run.stop_after_no_gain counts evaluations; set run.eval_every to a number of steps")
    curve, _ = parse_best_by(run.best_by)
    sources = {f"{LOSS}/{source.name}" for source in config.data.mix if source.validation}
    if curve.startswith(GENERAL) and not run.eval_general:
        raise UserError(f"run.best_by={run.best_by} needs run.eval_general=True, which measures it")
    if is_of_answers(curve) and not run.eval_generate:
        raise UserError(f"run.best_by={run.best_by} needs run.eval_generate: it is a score of generated answers")
    if curve.startswith(f"{LOSS}/") and curve not in sources:
        raise UserError(f"run.best_by={run.best_by} needs a source of data.mix with that name and validation files")
    needed = [
        key for key, value in (("run.export=best", run.export == "best"), (STOP, run.stop_after_no_gain)) if value
    ]
    if needed and curve == LOSS and not has_validation:
        raise UserError(
            f"{needed[0]} needs data.validation or data.validation_share, because run.best_by={run.best_by} is measured on it"
        )
