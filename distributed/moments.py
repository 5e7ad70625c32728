"""AdamW's two moments in fp32, bf16 or 8 bits, sharded like their parameter, so that a checkpoint reshards by rows."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distributed.rounding import NoiseKey, stochastic_round_
from distributed.sharding import local

KEYS = ("exp_avg", "exp_avg_sq")


def new_moments(parameter: nn.Parameter, memory: str) -> dict[str, torch.Tensor]:
    """Zero moments of a parameter, by the name they have in a checkpoint. `memory` is optimizer.memory."""
    block = _block_size(parameter) if memory == "6N" else None
    moments = {}
    for key in KEYS:
        if block:
            moments[f"{key}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            moments[f"{key}_scale"] = _row_scales(parameter, block)
        else:
            moments[key] = torch.zeros_like(parameter, dtype=torch.bfloat16 if memory == "8N" else torch.float32)
    return moments


class Moments:
    """The moments of one parameter's local shard as flat tensors, read and written in chunks as fp32."""

    def __init__(self, state: dict[str, torch.Tensor], code_maps: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.tensors = {key: local(value).view(-1) for key, value in state.items() if key != "step"}
        self.code_maps = code_maps

    @property
    def block(self) -> int:
        """Elements that share a scale; a chunk must be a multiple of it. 1 unless the moments have 8 bits."""
        if "exp_avg_codes" not in self.tensors:
            return 1
        return self.tensors["exp_avg_codes"].numel() // self.tensors["exp_avg_scale"].numel()

    def read(self, key: str, part: slice) -> torch.Tensor:
        """A chunk of a moment in fp32. For an fp32 moment this is the memory itself."""
        if key in self.tensors:
            return self.tensors[key][part].float()
        from torchao.optim.quant_utils import dequant_with_qmap

        codes, scale = self._codes(key, part)
        value = dequant_with_qmap(codes, self.code_maps[key][0], scale)
        return value.square_() if key == "exp_avg_sq" else value

    def write(self, key: str, part: slice, value: torch.Tensor, noise: NoiseKey, first: int, bad: torch.Tensor) -> None:
        """Store a chunk of a moment; `first` is its global index for the noise. In a `bad` step nothing changes.

        bf16 moments are rounded stochastically, like the weights: at beta 0.999 they would otherwise never decay.
        """
        if key in self.tensors:
            if self.tensors[key].dtype == torch.bfloat16:
                self.tensors[key][part].copy_(stochastic_round_(value, noise, first))
            return
        from torchao.optim.quant_utils import scale_tensor

        # The second moment is stored as its root, which spans as many powers of ten as the first moment. Otherwise the
        # square of a small gradient would become 0 where the first moment does not, and the update m / eps. The scale
        # also has a floor of 1e-12.
        scaled, new_scale = scale_tensor(value.sqrt_() if key == "exp_avg_sq" else value, self.block)
        new_codes = torch.bucketize(scaled, self.code_maps[key][1], right=True, out_int32=True).to(torch.uint8)
        # Writing back what was read is not the identity: the most negative code stands for -0.993 of the scale.
        codes, scale = self._codes(key, part)
        codes.copy_(torch.where(bad, codes, new_codes))
        scale.copy_(torch.where(bad, scale, new_scale))

    def _codes(self, key: str, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        block = self.block
        scale = self.tensors[f"{key}_scale"][part.start // block : part.stop // block]
        return self.tensors[f"{key}_codes"][part], scale


def make_code_maps(device: torch.device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each moment the 256 values of the dynamic 8-bit type (Dettmers et al., arXiv:2110.02861) and their midpoints."""
    from torchao.optim.quant_utils import create_dynamic_map

    maps = {}
    for key, signed in zip(KEYS, (True, False), strict=True):
        values = torch.tensor(create_dynamic_map(signed), dtype=torch.float32)
        maps[key] = values.to(device), ((values[1:] + values[:-1]) / 2).to(device)
    return maps


def _block_size(parameter: nn.Parameter) -> int | None:
    """Elements that share a scale: the largest divisor of a row from 256 down to 32, so that no block spans two ranks."""
    if parameter.dim() < 2 or parameter.numel() == 0:
        return None  # vectors, a thousandth of the model, keep fp32 moments
    row = parameter.numel() // parameter.shape[0]
    return next((size for size in range(256, 31, -1) if row % size == 0), None)


def _row_scales(parameter: nn.Parameter, block: int) -> torch.Tensor:
    """Zeros of shape (rows, blocks per row), sharded like the parameter's rows."""
    shape = (parameter.shape[0], parameter.numel() // parameter.shape[0] // block)
    scales = torch.zeros((local(parameter).shape[0], shape[1]), dtype=torch.float32, device=parameter.device)
    if not isinstance(parameter, DTensor):
        return scales
    sharded = DTensor.from_local(
        scales,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1], 1),
    )
    return sharded.to(parameter.device)  # with CPU offload from_local has moved it to the mesh's device
