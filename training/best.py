"""The best checkpoint, judged again when data.validation or run.best_by has changed since it was found."""

import math
from collections.abc import Callable
from pathlib import Path

from torch import nn

from common.errors import UserError
from distributed.checkpoint import load_parameters
from distributed.checkpoint_directory import checkpoint_name
from distributed.process_group import Ranks
from training.criterion import curve_of
from training.progress import Progress


def judge_best_again(
    progress: Progress,
    fresh: Progress,
    checkpoints: Path,
    parameters: dict[str, nn.Parameter],
    evaluations: dict[str, Callable[[], dict[str, float] | None]],
    ranks: Ranks,
) -> list[str]:
    """Evaluate the best checkpoint by the criterion and on the validation data of this start, if one has changed.

    `fresh`: the progress of this start before any step. A collective, which overwrites the parameters. Returns lines for the
    user. After a signal nothing is changed, and the next start judges again.
    """
    if progress.best_value is None and progress.best_loss is not None:  # a checkpoint from before run.best_by
        progress.base_value, progress.best_value = progress.base_loss, progress.best_loss
    changed = []
    if fresh.validation and progress.validation != fresh.validation:
        changed.append("data.validation has changed")
    if progress.best_by != fresh.best_by:
        changed.append(f"run.best_by has changed ({progress.best_by} -> {fresh.best_by})")
    if not changed:
        return []
    curve, figures, damage = curve_of(fresh.best_by), {}, []
    evaluate = evaluations.get(curve.partition("/")[0])
    if progress.best_step is not None and evaluate:
        best = checkpoints / checkpoint_name(progress.best_step)
        try:
            load_parameters(best, parameters, ranks, "no checkpoint counts as the best now")
        except UserError as error:  # the same on all ranks
            damage = [f"warning: {error}"]
        else:
            figures = evaluate()
            if figures is None:
                return []
    value, loss = figures.get(curve, math.nan), figures.get("validation/loss")
    comparable = progress.best_by == fresh.best_by and progress.best_value is not None
    old = f", {progress.best_value:.4g} on the old data" if comparable else ""
    if progress.validation != fresh.validation:
        progress.base_loss = progress.best_loss = None
    progress.validation, progress.best_by, progress.base_value = fresh.validation, fresh.best_by, None
    progress.without_gain = 0
    why = "; ".join(changed)
    if not math.isfinite(value):
        progress.best_value = progress.best_loss = progress.best_step = None
        return [*damage, f"{why}: the next evaluation is the first that counts"]
    progress.best_value, progress.best_loss = value, progress.best_loss if loss is None else loss
    name = "validation loss" if curve == "validation/loss" else curve
    return [f"{why}: the best checkpoint, of step {progress.best_step}, was judged again: {name} {value:.4g}{old}"]
