"""How much each document of step 1 counts in the gradient of the loop: its share, which must be 1 for all of them.

After the first step, AdamW's first moment is (1 - beta1) times the clipped gradient. The gradient of a sound loop is the sum of the
documents' gradients in the reference; that of another loop is a sum with other factors: a mean over micro-batches gives those of
small micro-batches too much. The factors are a least squares fit. Rounding changes a gradient's direction much more than these
factors, because it does not know the documents: it is nearly orthogonal to all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from preflight.compare import read_tensor

MATRICES = 8  # of the decoder layers, evenly chosen
ELEMENTS = 2**18  # of all matrices together, for one document
ALL_ELEMENTS = 2**25  # for all documents
MOMENT = "exp_avg."


@dataclass
class Sample:
    """Rows of some matrices. gradients: `(elements,)` for each document so far, fp32 on the CPU."""

    rows: dict[str, torch.Tensor]
    gradients: list[torch.Tensor] = field(default_factory=list)
    _sum: torch.Tensor | float = 0.0

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """The gradient of one more document, which has been added to those of the others."""
        gradients = [(parameters[name].grad, rows) for name, rows in self.rows.items()]
        if any(gradient is None for gradient, _ in gradients):  # a document without targets
            self.gradients.append(torch.zeros(self.elements(parameters)))
            return
        total = torch.cat([g[rows.to(g.device)].flatten().float().cpu() for g, rows in gradients if g is not None])
        self.gradients.append(total - self._sum)
        self._sum = total

    def elements(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """Number of elements that are looked at."""
        return sum(len(rows) * parameters[name][0].numel() for name, rows in self.rows.items())


def choose(parameters: Mapping[str, nn.Parameter], documents: int) -> Sample:
    """Rows of matrices in decoder layers, evenly chosen."""
    names = [name for name, parameter in parameters.items() if parameter.dim() == 2 and ".layers." in name]
    names = names[:: max(1, -(-len(names) // MATRICES))]
    elements = min(ELEMENTS, ALL_ELEMENTS // max(1, documents)) // max(1, len(names))
    rows = {}
    for name in names:
        height, width = parameters[name].shape
        rows[name] = torch.linspace(0, height - 1, min(height, max(1, elements // width))).long()
    return Sample(rows)


def write_sample(path: Path, sample: Sample, micro_batches: list[int]) -> None:
    """micro_batches: the number of the micro-batch of each document."""
    names = {str(i): name for i, name in enumerate(sample.rows)}
    tensors = {number: sample.rows[name] for number, name in names.items()}
    metadata = {"names": json.dumps(names), "micro_batches": json.dumps(micro_batches)}
    save_file(tensors | {"gradients": torch.stack(sample.gradients)}, path, metadata)


@dataclass(frozen=True)
class Shares:
    """micro_batches: their shares by number. noise: how far rounding may have moved each of them."""

    micro_batches: dict[int, float]
    noise: dict[int, float]
    residual: float  # norm of what no shares explain, relative to the gradient

    @property
    def mean(self) -> float:
        """The mean share of a micro-batch."""
        return sum(self.micro_batches.values()) / len(self.micro_batches)

    @property
    def spread(self) -> float:
        """The largest relative distance of a micro-batch's share from the mean of all."""
        return max(abs(share - self.mean) for share in self.micro_batches.values()) / max(abs(self.mean), 1e-12)


def find_shares(path: Path, checkpoint: Path, scale: float) -> Shares | None:
    """The shares in the first moment of a checkpoint after step 1. None if it does not hold the moments of these matrices.

    scale: what the moment is of the sum of all gradients, if all is well: (1 - beta1) / the divisor of clipping.
    """
    with safe_open(path, framework="pt") as file:
        names, micro_batches = (json.loads(file.metadata()[key]) for key in ("names", "micro_batches"))
        gradients = file.get_tensor("gradients").double()
        rows = {name: file.get_tensor(number) for number, name in names.items()}
    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    found = []
    for name, chosen in rows.items():
        meta = stored.get(MOMENT + name)
        if (
            not isinstance(meta, TensorStorageMetadata)
            or len(meta.size) != 2
            or not meta.properties.dtype.is_floating_point
        ):
            return None
        found.append(read_tensor(reader, MOMENT + name, meta)[chosen].flatten())
    moment = torch.cat(found).double() / scale
    counted = [i for i, gradient in enumerate(gradients) if bool(gradient.any())]
    if not counted:
        return None
    groups = sorted({micro_batches[i] for i in counted})
    sums = torch.stack([gradients[[i for i in counted if micro_batches[i] == group]].sum(0) for group in groups])
    shares, residual = _fit(sums, moment)
    # Rounding as large as the residual, all of it in the direction in which one micro-batch differs from the others.
    noise = (
        residual * moment.norm() * torch.linalg.pinv(sums @ sums.T, hermitian=True).diagonal().clamp(min=0).sqrt()
    ).tolist()
    return Shares(dict(zip(groups, shares, strict=True)), dict(zip(groups, noise, strict=True)), residual)


def _fit(gradients: torch.Tensor, moment: torch.Tensor) -> tuple[list[float], float]:
    """Factors of the gradients `(number, elements)` whose sum comes nearest to `moment`, and what is left, relative to it."""
    solved = torch.linalg.lstsq(gradients.T, moment[:, None]).solution[:, 0]
    return solved.tolist(), float((moment - solved @ gradients).norm() / moment.norm().clamp(min=1e-30))
