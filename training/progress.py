"""Where a run stands: counted while it trains, saved as state.json in every checkpoint, and read back as it is."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig

from common.errors import UserError
from configs.config import Config
from data.batches import StepBatch
from distributed.checkpoint import latest_checkpoint, read_state
from distributed.process_group import Ranks, read_on_first
from model.ewc.start import anchor_settings
from training.inputs import Inputs


@dataclass
class Progress:
    """A run after `step` finished optimizer steps."""

    meaning: dict  # of a step number: `step_meaning`
    targets: list[int]  # target tokens trained on, by source
    step: int = 0
    tokens: int = 0  # trained on, targets or not
    skipped_steps: int = 0  # whose loss or gradient norm was not finite
    bad_steps_in_a_row: int = 0  # skipped steps since the last good one
    best_loss: float | None = None  # lowest validation loss so far
    evaluated: dict[str, int] = field(default_factory=dict)  # evaluation -> the last step at which it finished

    def as_json(self) -> dict:
        """The fields as plain JSON types."""
        return dataclasses.asdict(self)

    def is_due(self, evaluation: str, every: int, total_steps: int) -> bool:
        """Whether an evaluation is due at this step and has not finished at it: first, last, and every `every` steps."""
        due = self.step in (0, total_steps) or (every > 0 and self.step % every == 0)
        return due and self.evaluated.get(evaluation) != self.step

    def finish_evaluation(self, evaluation: str, figures: dict[str, float]) -> bool:
        """Record that an evaluation finished at this step; True if it found the lowest validation loss so far."""
        self.evaluated[evaluation] = self.step
        loss = figures.get("validation/loss", math.nan)
        improved = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if improved:
            self.best_loss = loss
        return improved

    def finish_step(self, batch: StepBatch) -> None:
        """Count one step, taken or skipped, and its tokens."""
        self.step += 1
        self.tokens += sum(batch.document_lengths)
        self.targets = [a + b for a, b in zip(self.targets, batch.targets_by_source, strict=True)]


class BadSteps:
    """Counts skipped steps on the device, so that the host waits only where a number is logged or saved."""

    def __init__(self, progress: Progress, limit: int, device: torch.device) -> None:
        """Once `limit` steps in a row were bad the second counter never returns to 0, so that the next log row sees it."""
        self.limit = limit
        self.total = torch.tensor(progress.skipped_steps, device=device)
        self.in_a_row = torch.tensor(progress.bad_steps_in_a_row, device=device)

    def add(self, bad: torch.Tensor) -> None:
        """Count a step; `bad` is a bool scalar on the device, equal on all ranks."""
        self.total += bad
        keep = bad | (self.in_a_row >= self.limit)
        self.in_a_row = torch.where(keep, self.in_a_row + 1, torch.zeros_like(self.in_a_row))

    def update(self, progress: Progress) -> bool:
        """Write the counters into `progress`; True if the limit is reached. The host waits for the device."""
        progress.skipped_steps, progress.bad_steps_in_a_row = int(self.total), int(self.in_a_row)
        return progress.bad_steps_in_a_row >= self.limit


def step_meaning(config: Config, inputs: Inputs, model_config: PretrainedConfig) -> dict:
    """What the number of a step means: which documents it trains on, and how. Name of the setting -> value, plain JSON.

    A resume with another meaning would train on the wrong data, so it is refused.
    """
    return {
        "the vocabulary size of model.path": model_config.vocab_size,
        "data.train": inputs.train.sources[0].fingerprint,
        "data.mix": inputs.train.mixture(),
        "run.seed": config.run.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.packing": config.data.packing,
        "batch.global_examples": config.batch.global_examples,
        "batch.global_tokens": config.batch.global_tokens,
        "optimizer.memory": config.optimizer.memory,
        "ewc.strength": config.ewc.strength,
        "ewc": anchor_settings(config.ewc, inputs.fisher_batches) if config.ewc.strength else None,
        "model.rope_type, rope_factor or rope_original_length": model_config.rope_parameters,
    }


def find_progress(
    checkpoints: Path, meaning: dict, num_sources: int, total_steps: int, ranks: Ranks
) -> tuple[Progress, Path | None]:
    """(progress, checkpoint to resume from or None). A collective: all ranks resume from the one that rank 0 sees.

    Raises UserError if the checkpoint was made with another `meaning`, or is beyond `total_steps`.
    """
    checkpoint = read_on_first(lambda: latest_checkpoint(checkpoints), ranks)
    if checkpoint is None:
        return Progress(meaning, targets=[0] * num_sources), None
    state = read_on_first(lambda: read_state(checkpoint), ranks)
    try:
        progress = Progress(**state)
    except TypeError as error:
        raise UserError(
            f"cannot resume from {checkpoint}: another version of this code wrote its state.json ({error}); finish the run "
            "with that version, or start a new run with another run.name"
        ) from error
    for key, value in meaning.items():
        before = progress.meaning.get(key, value)  # a key that is newer than the checkpoint is not compared
        if before != value:
            other = {"data.train": "other data in data.train", "data.mix": "another data.mix"}
            what = other.get(key, f"{key}={before}, now it is {value}")
            raise UserError(f"{checkpoint} was made with {what}; set it back, or start a new run with another run.name")
    if progress.step > total_steps:
        raise UserError(f"{checkpoint} is at step {progress.step}, beyond the {total_steps} steps of this config")
    progress.meaning = meaning
    return progress, checkpoint
