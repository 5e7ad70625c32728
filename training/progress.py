"""Where a run stands: counted while it trains, saved in the manifest of every checkpoint, and read back as it is."""

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data.batches import StepBatch
from data.sources import Corpus
from distributed.checkpoint_directory import find_checkpoint, read_manifest
from distributed.process_group import Ranks, read_on_first
from training.criterion import curve_of, is_better
from training.identity import check_identity
from training.skipped_steps import WINDOW


@dataclass
class Progress:
    """A run after `step` finished optimizer steps."""

    identity: dict  # of what trained the weights: training/identity.py
    settings: dict  # that may change on a resume, for the list of changes
    targets: list[int | float]  # target tokens trained on (with weights, the sum of these), by source
    step: int = 0
    updates: int = 0  # steps that changed the weights
    tokens: int = 0  # trained on, targets or not
    skipped_steps: int = 0  # with a loss or gradient norm that was not finite, or a spike
    bad_steps_in_a_row: int = 0  # not finite, since the last good step
    norms: list[float] = field(default_factory=list)  # the last finite gradient norms, for optimizer.skip_spikes
    evaluated: dict[str, int] = field(default_factory=dict)  # evaluation -> the last step at which it finished
    validation: list[str] = field(default_factory=list)  # fingerprints of the data that the next losses are of
    loss: float | None = None  # the last validation loss
    base_loss: float | None = None  # validation loss of the base model
    best_by: str = "validation/loss:min"  # the criterion of the best checkpoint (training/criterion.py)
    base_value: float | None = None  # what it is for the base model
    best_value: float | None = None  # the best of a trained checkpoint
    best_loss: float | None = None  # validation loss of that checkpoint
    best_step: int | None = None  # and its step
    without_gain: int = 0  # evaluations of trained models since then
    saved_step: int = 0  # of the newest checkpoint
    saved_updates: int = 0
    # The newest checkpoint from whose weights a finite loss and gradient norm have been computed; 0: the base model
    proven_step: int = 0

    def as_json(self) -> dict:
        """The fields as plain JSON types."""
        return dataclasses.asdict(self)

    def is_due(self, evaluation: str, every: int, total_steps: int) -> bool:
        """Whether an evaluation is due at this step and has not finished at it: first, last, and every `every` steps."""
        due = self.step in (0, total_steps) or (every > 0 and self.step % every == 0)
        return due and self.evaluated.get(evaluation) != self.step

    def finish_evaluation(self, evaluation: str, figures: dict[str, float]) -> bool:
        """Record that an evaluation finished at this step; True if it found a trained model better than all before.

        Evaluations without a finite value of the criterion are not counted.
        """
        self.evaluated[evaluation] = self.step
        loss, value = figures.get("validation/loss", math.nan), figures.get(curve_of(self.best_by), math.nan)
        if evaluation == "validation":
            self.loss = loss if math.isfinite(loss) else None
        if self.updates == 0:  # still the base model, at step 0 or after skipped steps
            self.base_loss = loss if math.isfinite(loss) else self.base_loss
            self.base_value = value if math.isfinite(value) else self.base_value
            return False
        if not math.isfinite(value):
            return False
        improved = self.best_value is None or is_better(self.best_by, value, self.best_value)
        self.without_gain = 0 if improved else self.without_gain + 1
        if improved:
            self.best_value, self.best_step = value, self.step
            self.best_loss = self.loss if self.evaluated.get("validation") == self.step else None
        return improved

    def is_stalled(self, evaluations: int) -> bool:
        """Whether so many evaluations in a row have found nothing better (run.stop_after_no_gain); 0: never."""
        return 0 < evaluations <= self.without_gain

    def is_finished(self, total_steps: int, stop_after_no_gain: int) -> bool:
        """Whether no step is left to take: all are taken, or the run ends early."""
        return self.step == total_steps or self.is_stalled(stop_after_no_gain)

    def finish_step(self, batch: StepBatch, grad_norm: float, is_finite: bool, was_skipped: bool) -> None:
        """Count one step, taken or skipped, and its tokens. A step that was not finite is a bad one."""
        self.step += 1
        self.updates += not was_skipped
        self.skipped_steps += was_skipped
        self.bad_steps_in_a_row = 0 if is_finite else self.bad_steps_in_a_row + 1
        if is_finite:
            self.norms = [*self.norms, grad_norm][-WINDOW:]
        self.tokens += sum(batch.document_lengths)
        self.targets = [a + b for a, b in zip(self.targets, batch.targets_by_source, strict=True)]

    def is_save_due(self, every: int) -> bool:
        """Whether a step at which a periodic save is due has passed since the last save."""
        return every > 0 and self.step // every > self.saved_step // every

    def finish_save(self, identity: dict) -> dict:
        """The state to save at this step, after a step of this `identity`. The previous checkpoint may be proven by now."""
        self.identity = identity
        if self.updates > self.saved_updates:
            self.proven_step = self.saved_step
        self.saved_step, self.saved_updates = self.step, self.updates
        return self.as_json()

    def stopped(self, total_steps: int) -> str:
        """Where a signal has stopped the run, in words."""
        where = f"stopped after step {self.step}/{total_steps}"
        if self.saved_step == self.step:
            return where + (", saved" if self.step else "")
        return f"{where}, whose last {self.bad_steps_in_a_row} steps were skipped; the last saved step is {self.saved_step}"

    def good_checkpoint(self) -> int:
        """The step of the newest checkpoint that is known to be good, 0 for the base model."""
        return self.saved_step if self.updates > self.saved_updates else self.proven_step


def fresh_progress(identity: dict, settings: dict, train: Corpus, validation: Corpus | None, best_by: str) -> Progress:
    """A run that has taken no step."""
    judged_on = [source.fingerprint for source in validation.sources] if validation else []
    return Progress(identity, settings, targets=[0] * len(train.sources), validation=judged_on, best_by=best_by)


def find_progress(
    checkpoints: Path, fresh: Progress, resume: str, total_steps: int, ranks: Ranks
) -> tuple[Progress, Path | None, list[str]]:
    """(progress, checkpoint to resume from or None, lines for the user). A collective, the same on all ranks.

    `resume` is run.resume. Raises UserError if the checkpoint is damaged, is of another identity than `fresh`, or is
    beyond `total_steps`.
    """
    begin = time.perf_counter()
    checkpoint, passed_over = find_checkpoint(checkpoints, resume, ranks)
    seconds = time.perf_counter() - begin
    lines = [f"warning: passed over: {problem}" for problem in passed_over]
    if checkpoint is None:
        export = checkpoints.with_name("export")
        if read_on_first(export.exists, ranks):
            raise UserError(
                f"{export} exists, but the checkpoints of its run are gone; to train again from the base model, choose another "
                f"run.name or remove {export.parent}"
            )
        return fresh, None, lines
    manifest = read_on_first(lambda: read_manifest(checkpoint), ranks)
    size = sum(file["size"] for file in manifest["files"].values())
    lines.append(f"all {size / 2**20:,.0f} MiB of {checkpoint} have their checksum, {seconds:.1f} s")
    # The identity of the weights stays the checkpoint's until a step is taken with another one.
    fresh.identity, changes = check_identity(checkpoint, manifest["state"], fresh.identity, fresh.settings, resume)
    try:
        progress = Progress(**manifest["state"])
    except TypeError as error:
        raise UserError(
            f"cannot resume from {checkpoint}: another version of this code wrote its manifest.json ({error}); finish the "
            "run with that version, or start a new run with another run.name"
        ) from error
    if progress.step > total_steps:
        raise UserError(f"{checkpoint} is at step {progress.step}, beyond the {total_steps} steps of this config")
    lines += changes
    if progress.identity != fresh.identity:
        progress.bad_steps_in_a_row = 0  # another learning rate starts with a clean record
        if len(progress.targets) != len(fresh.targets):
            progress.targets = fresh.targets  # of other sources
    # What is evaluated at this step is due again (training/best.py).
    if fresh.validation and progress.validation != fresh.validation:
        progress.evaluated.pop("validation", None)
    if progress.best_by != fresh.best_by:
        progress.evaluated.pop(fresh.best_by.partition("/")[0], None)
    progress.settings = fresh.settings
    return progress, checkpoint, lines
