"""What a run computes on a number of ranks: its steps, and the micro-batch that needs the most memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.shape import ModelShape
from training.inputs import Inputs


@dataclass(frozen=True)
class Load:
    """Forward and backward of one micro-batch on one rank."""

    lengths: tuple[int, ...]  # of its documents, in tokens
    targets: int
    step: int = 0  # 0-based
    rank: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)


@dataclass(frozen=True)
class StepWork:
    """One step over all ranks."""

    step: int  # 0-based
    tokens: int
    targets: float
    flops: float  # that are necessary (model.flops.step_flops)
    micro_batches: int  # of each rank
    balance: float  # share of the time in which a mean rank computes (data.dealing.balance)


@dataclass(frozen=True)
class Workload:
    """steps: those that were looked at, evenly spaced over `total_steps`. worst: the micro-batch with the most tokens."""

    total_steps: int
    steps: Sequence[StepWork]
    worst: Load
    is_exact: bool  # whether all steps were looked at for `worst`


def planned_workload(inputs: Inputs, shape: ModelShape, rows: int, sequence_length: int, ranks: int) -> Workload:
    """The workload of a run's real plan, dealt to `ranks` ranks with micro-batches of `rows * sequence_length` tokens."""
    raise NotImplementedError


def uniform_workload(
    shape: ModelShape, examples: int, length: int, global_examples: int, epochs: int, rows: int, ranks: int
) -> Workload:
    """A workload before there is data: `examples` documents of `length` tokens, all of them targets."""
    raise NotImplementedError
