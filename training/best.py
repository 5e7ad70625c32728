"""The best checkpoint, judged again when data.validation has changed since it was found."""

import math
from collections.abc import Callable
from pathlib import Path

from torch import nn

from common.errors import UserError
from distributed.checkpoint import load_checkpoint
from distributed.checkpoint_directory import check_whole, checkpoint_name
from distributed.process_group import Ranks
from training.progress import Progress


def judge_best_again(
    progress: Progress,
    judged_on: list[str],
    checkpoints: Path,
    parameters: dict[str, nn.Parameter],
    evaluations: dict[str, Callable[[], dict[str, float] | None]],
    ranks: Ranks,
) -> list[str]:
    """Evaluate the best checkpoint on the validation data of this start, if it is other data. A collective.

    `judged_on`: the fingerprints of this start's validation data, empty if it has none. Overwrites the parameters. Returns
    lines for the user. After a signal nothing is changed, and the next start judges again.
    """
    if not judged_on or progress.validation == judged_on:
        return []
    figures, damage = {}, []
    if progress.best_step is not None:
        best = checkpoints / checkpoint_name(progress.best_step)
        try:
            check_whole(best, ranks, "no checkpoint counts as the best now")
        except UserError as error:  # the same on all ranks
            damage = [f"warning: {error}"]
        else:
            load_checkpoint(best, parameters, None, ranks)
            figures = evaluations["validation"]()
            if figures is None:
                return []
    loss = figures.get("validation/loss", math.nan)
    before = progress.best_loss
    progress.validation, progress.base_loss = judged_on, None
    if not math.isfinite(loss):
        progress.best_loss = progress.best_step = None
        return [*damage, "data.validation has changed: the next evaluation is the first on the new data"]
    progress.best_loss = loss
    return [
        f"data.validation has changed: the best checkpoint, of step {progress.best_step}, was judged again: validation loss "
        f"{loss:.4g}, {before:.4g} on the old data"
    ]
