"""What one run of one arm is told; the arm's process reads it from a JSON file."""

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run. setting: `parity` (fp32, same steps), `matched` (same steps) or `defaults` (as the tool does by itself)."""

    setting: str
    packed: bool  # documents of a batch end to end in one row, where the arm can
    completed: bool  # LitGPT in parity: with the features that it lacks added by us
    device: str  # cpu | cuda
    model: str
    dtype: str  # bf16 | fp32, of the products; weights are fp32
    jsonl: str
    tokens: str
    directory: str  # of this run alone
    steps: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    sequence_length: int
    batch: int  # examples in a step
    max_steps: int
    learning_rate: float
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    @property
    def rows(self) -> Path:
        """Where a peer writes a line a step."""
        return Path(self.directory) / "rows.jsonl"

    def write(self) -> Path:
        """The file that `read_spec` reads."""
        path = Path(self.directory) / "spec.json"
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path


def read_spec(path: str) -> Spec:
    """A spec that `Spec.write` wrote."""
    return Spec(**json.loads(Path(path).read_text(encoding="utf-8")))
