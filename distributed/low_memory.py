"""AdamW on bf16 weights with moments in fp32, bf16 or 8 bits: optimizer.memory = 14N, 12N, 8N and 6N.

Moments are sharded like their parameter, so that a checkpoint reshards them with it. bf16 weights and moments are rounded
stochastically (distributed/rounding.py), so that they still move at a low learning rate.
"""

import math

import torch
from torch import nn

from common.torch_private import private
from distributed.gradients import gradient_of
from distributed.rounding import Noise, stochastic_round_
from distributed.sharding import flat_parts, local

fused_adamw_ = private("_fused_adamw_")
# Elements that are updated at once. This bounds the fp32 copies, which on a CPU stay in its cache.
CHUNK = {"cpu": 2**18, "cuda": 2**24}
LANES = 16  # fp32 numbers in a CPU's widest vector register
KEYS = ("exp_avg", "exp_avg_sq")
SMALLEST_SCALE = 1e-12  # smallest scale of a block of 8-bit moments


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights: torch's fused fp32 kernel in chunks, stochastic rounding, no wait for the device.

    It updates this rank's part of sharded parameters (or plain tensors). `order` lists all parameters. A parameter's noise is
    selected by its position in `order` and by the number of updates so far (`noise_step` in the groups).
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        memory: str,
        seed: int,
        order: list[nn.Parameter],
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "noise_step": 0})
        self.keeps_gradients = memory == "14N"
        self.seed = seed
        self.order = {parameter: index for index, parameter in enumerate(order)}
        device = order[0].device
        self.code_maps = make_code_maps(device) if memory == "6N" else {}
        largest = max(local(parameter).numel() for parameter in order)
        self.buffer_size = min(max(CHUNK[device.type], LANES * 256), -(-largest // LANES) * LANES)
        # A single counter, because every parameter takes part in every step.
        self.steps = torch.zeros((), dtype=torch.float32, device=device)
        for parameter in order:
            self.state[parameter] = {"step": self.steps} | new_moments(parameter, memory)
            if self.keeps_gradients:
                keep_fp32_gradient(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients. Under 14N they stay allocated and become 0, because FSDP adds to an existing gradient in its dtype."""
        super().zero_grad(set_to_none and not self.keeps_gradients)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        device = self.steps.device
        # `noise_step` is on the host, because reading `steps` would wait for the device. It is saved in checkpoints.
        noise = Noise(self.seed, self.param_groups[0]["noise_step"], device)
        buffers = torch.zeros((4, self.buffer_size), device=device)  # fp32: weights, gradients and moments of a chunk
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, buffers, noise)
            group["noise_step"] += 1

    def _update(self, parameter: nn.Parameter, group: dict, buffers: torch.Tensor, noise: Noise) -> None:
        weight = local(parameter).view(-1)
        if weight.numel() == 0:  # the parameter has fewer rows than there are ranks
            return
        grad = local(gradient_of(parameter)).reshape(-1)
        moments = Moments(self.state[parameter], self.code_maps)
        stream = 3 * self.order[parameter]  # the weight and its two moments have a noise stream each
        unit = math.lcm(LANES, moments.block)
        size = max(1, CHUNK[weight.device.type] // unit) * unit
        for part, first in flat_parts(parameter, size):
            count = part.stop - part.start
            # torch rounds differently in the remainder that does not fill a vector register, and the number of ranks would
            # decide which elements are in the remainder. Hence the last register is filled up with elements that do not count.
            value, g, exp_avg, exp_avg_sq = buffers[:, : -(-count // LANES) * LANES]
            value[:count].copy_(weight[part])
            g[:count].copy_(grad[part])
            exp_avg, exp_avg_sq = moments.read("exp_avg", part, exp_avg), moments.read("exp_avg_sq", part, exp_avg_sq)
            fused_adamw_(  # as torch.optim.AdamW(fused=True), in one pass
                [value],
                [g],
                [exp_avg],
                [exp_avg_sq],
                [],
                [self.steps],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            weight[part].copy_(stochastic_round_(value[:count], noise, stream, first))
            for number, (key, moment) in enumerate((("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)), 1):
                moments.write(key, part, moment, noise, stream + number, first)


def keep_fp32_gradient(parameter: nn.Parameter) -> None:
    """Allocate an fp32 gradient (14N). FSDP reduces in fp32, but casts to the parameter's dtype unless a gradient exists.

    The contribution of a micro-batch is rounded to bf16 once; the sum over micro-batches is fp32.
    """
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def new_moments(parameter: nn.Parameter, memory: str) -> dict[str, torch.Tensor]:
    """Return zero moments of a parameter, by their names in a checkpoint. `memory` is optimizer.memory."""
    block = block_size(parameter.shape) if memory == "6N" else None
    moments = {}
    for key in KEYS:
        if block:
            moments[f"{key}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            blocks = parameter.detach()[..., ::block]  # (rows, blocks per row), sharded like the parameter
            moments[f"{key}_scale"] = torch.zeros_like(
                blocks, dtype=torch.float32, memory_format=torch.contiguous_format
            )
        else:
            moments[key] = torch.zeros_like(parameter, dtype=torch.bfloat16 if memory == "8N" else torch.float32)
    return moments


class Moments:
    """The moments of one parameter's local shard as flat tensors, read and written in chunks as fp32."""

    def __init__(self, state: dict[str, torch.Tensor], code_maps: dict[str, "CodeMap"]) -> None:
        self.tensors = {key: local(value).view(-1) for key, value in state.items() if key != "step"}
        self.code_maps = code_maps
        # Number of elements that share a scale, 1 unless the moments have 8 bits. A chunk must be a multiple of it.
        self.block = 1
        if "exp_avg_codes" in self.tensors:
            self.block = self.tensors["exp_avg_codes"].numel() // self.tensors["exp_avg_scale"].numel()

    def read(self, key: str, part: slice, buffer: torch.Tensor) -> torch.Tensor:
        """Return a chunk of a moment in fp32: a view if it is stored in fp32 and as long as `buffer`, else a copy in `buffer`."""
        count = part.stop - part.start
        if key in self.tensors:
            stored = self.tensors[key][part]
            if stored.dtype == torch.float32 and count == len(buffer):
                return stored
            buffer[:count].copy_(stored)
            return buffer
        codes, scale = self._codes(key, part)
        value = torch.index_select(self.code_maps[key].values, 0, codes.int(), out=buffer[:count])
        value.view(-1, self.block).mul_(scale.unsqueeze(1))
        if key == "exp_avg_sq":
            value.square_()
        return buffer

    def write(self, key: str, part: slice, value: torch.Tensor, noise: Noise, stream: int, first: int) -> None:
        """Store a chunk of a moment that `read` returned and AdamW has updated.

        `stream` and `first` select the noise. bf16 moments are rounded stochastically, like the weights, because otherwise they
        would never decay at beta 0.999.
        """
        value = value[: part.stop - part.start]
        if key in self.tensors:
            stored = self.tensors[key][part]
            if stored.dtype == torch.bfloat16:
                stochastic_round_(value, noise, stream, first)
            if stored.data_ptr() != value.data_ptr():
                stored.copy_(value)
            return
        # The second moment is stored as its square root, which spans as many powers of ten as the first moment. Otherwise the
        # square of a small gradient could be rounded to 0 while the first moment is not, and the update would be m / eps. The
        # scale has a lower bound for the same reason.
        value = (value.sqrt_() if key == "exp_avg_sq" else value).view(-1, self.block)
        codes, scale = self._codes(key, part)
        torch.amax(value.abs(), -1, out=scale).clamp_(min=SMALLEST_SCALE)
        codes.copy_(self.code_maps[key].encode(value.div_(scale.unsqueeze(1)).view(-1)))

    def _codes(self, key: str, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        block = self.block
        scale = self.tensors[f"{key}_scale"][part.start // block : part.stop // block]
        return self.tensors[f"{key}_codes"][part], scale


class CodeMap:
    """The 256 values of an 8-bit type, with a table that gives the nearest value to an fp32 number.

    A binary search among 255 midpoints costs ten times as much on a CPU. The upper 16 bits of an fp32 number leave at
    most one midpoint to compare it with, because midpoints are farther apart than numbers of 8 bits of precision.
    """

    def __init__(self, values: torch.Tensor) -> None:
        """Make the table for `values`, fp32 `(256,)` in ascending order, all between -1 and 1."""
        midpoints = (values[1:] + values[:-1]) / 2
        # All upper halves of an fp32 number. The shift wraps, so 2^15 and above give the negative numbers.
        upper = torch.arange(2**16, dtype=torch.int32, device=values.device) << 16
        ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
        self.values = values
        self.lowest = torch.bucketize(ends.amin(0), midpoints, right=True, out_int32=True)
        highest = torch.bucketize(ends.amax(0), midpoints, right=True, out_int32=True)
        inside = ends.abs().amax(0) <= 1
        assert bool(((highest - self.lowest)[inside] <= 1).all())
        self.next_midpoint = torch.cat([midpoints, midpoints.new_full((1,), torch.inf)])

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the codes of the nearest values, uint8 `(n,)`, for fp32 numbers from -1 to 1."""
        upper = (numbers.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
        lowest = torch.index_select(self.lowest, 0, upper)
        above = numbers >= torch.index_select(self.next_midpoint, 0, lowest)
        return lowest.add_(above).to(torch.uint8)


def make_code_maps(device: torch.device) -> dict[str, CodeMap]:
    """Return the dynamic 8-bit type of each moment (Dettmers et al., arXiv:2110.02861): signed, and unsigned for exp_avg_sq."""
    from torchao.optim.quant_utils import create_dynamic_map

    maps = [torch.tensor(create_dynamic_map(signed), dtype=torch.float32, device=device) for signed in (True, False)]
    return {key: CodeMap(values) for key, values in zip(KEYS, maps, strict=True)}


def block_size(shape: torch.Size) -> int | None:
    """Return how many elements of a parameter share a scale, or None if its moments stay fp32.

    It is the largest divisor of the row length from 256 down to 32, so that no block spans two ranks.
    """
    if len(shape) < 2 or shape.numel() == 0:
        return None  # vectors are a thousandth of the model
    return next((size for size in range(256, 31, -1) if shape[-1] % size == 0), None)
