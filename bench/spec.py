"""The specification of one run of one arm, which the arm's process reads from a JSON file."""

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run of one arm."""

    setting: (
        str  # parity | matched | skewed (the same examples per step, parity in fp32) | defaults (the trainer's own)
    )
    packed: bool  # concatenate the documents of a batch into one row, if the trainer can
    with_missing_features: bool  # add the features that LitGPT lacks (see bench/litgpt.py)
    device: str  # cpu | cuda
    model: str  # model directory
    dtype: str  # bf16 | fp32, of matrix products; weights are fp32
    jsonl: str  # training file of chats, for our own arm
    tokens: str  # the same examples tokenised, for the other trainers (see bench/workload.py)
    directory: str  # of this run only
    steps: tuple[tuple[int, ...], ...]  # example indices of each of our training steps
    lengths: tuple[int, ...]  # tokens of each example
    targets: tuple[int, ...]  # target tokens of each example
    sequence_length: int
    batch: int  # examples per step
    rows: int  # our own arm: packed rows of up to `sequence_length` tokens in one forward pass
    micro_batch: int  # other trainers: examples in one forward pass, except in `defaults`
    max_steps: int
    learning_rate: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    @property
    def rows_file(self) -> Path:
        """Where another trainer writes one line per step (`bench.peer.StepLog`)."""
        return Path(self.directory) / "rows.jsonl"

    def write(self) -> Path:
        """Write the specification into the directory of the run, and return the path for `read_spec`."""
        path = Path(self.directory) / "spec.json"
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path


def read_spec(path: str) -> Spec:
    """Read a specification written by `Spec.write`."""
    return Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
