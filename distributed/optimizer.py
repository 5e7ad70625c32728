"""AdamW in 16, 14, 12, 8 or 6 bytes per parameter, and bf16 weights that still move at a low learning rate.

    optimizer.memory   weights   gradients   moments   bytes per parameter
    16N                fp32      fp32        fp32      4 + 4 + 8
    14N                bf16      fp32        fp32      2 + 4 + 8
    12N                bf16      bf16        fp32      2 + 2 + 8
    8N                 bf16      bf16        bf16      2 + 2 + 4
    6N                 bf16      bf16        8 bits    2 + 2 + 2, plus the scales: 8 bytes per block of 32 to 256

bf16 weights are rounded stochastically (distributed/rounding.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from common.errors import UserError
from configs.config import Optimizer
from distributed.agreement import check_agreement
from distributed.gradients import gradient_of
from distributed.moments import Moments, make_code_maps, new_moments
from distributed.process_group import Ranks
from distributed.rounding import Noise, stochastic_round_
from distributed.sharding import flat_shard, local

# Elements processed at once. Bounds the fp32 copies; on a CPU they stay in its cache.
CHUNK = {"cpu": 2**18, "cuda": 2**24}
LANES = 16  # fp32 numbers in the widest vector register of a CPU


def parameter_dtype(memory: str) -> torch.dtype:
    """The dtype of the sharded weights."""
    return torch.float32 if memory == "16N" else torch.bfloat16


def check_memory(memory: str) -> None:
    """Raise UserError if 14N or 6N needs what is not installed."""
    if memory == "14N" and not hasattr(torch.Tensor, "grad_dtype"):
        raise UserError(
            f"optimizer.memory=14N keeps fp32 gradients of bf16 weights, which torch {torch.__version__} does not "
            "support: choose 12N or 16N"
        )
    if memory == "6N":
        try:
            from torchao.optim.quant_utils import create_dynamic_map  # noqa: F401
        except ImportError as error:
            raise UserError("optimizer.memory=6N needs torchao for its 8-bit moments: pip install torchao") from error


def adamw(parameters: dict[str, nn.Parameter], settings: Optimizer, seed: int) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only and its moments allocated.

    `parameters` are all parameters of the model by name, in the same order on every rank, in
    `parameter_dtype(settings.memory)`. Before every step the loop sets in each group `lr` and `noise_step` (0-based, for
    the noise of the rounding).
    """
    expected = parameter_dtype(settings.memory)
    wrong = [name for name, parameter in parameters.items() if parameter.dtype != expected]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is {parameters[wrong[0]].dtype}, but optimizer.memory={settings.memory} needs {expected}"
        )
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if settings.memory == "16N":
        optimizer = torch.optim.AdamW(groups, **options, fused=True)
        for parameter in parameters.values():  # before the first step, so that a checkpoint can be read in place
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step} | new_moments(parameter, "16N")
        return optimizer
    return LowMemoryAdamW(groups, **options, memory=settings.memory, seed=seed, order=list(parameters.values()))


def check_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], memory: str, ranks: Ranks
) -> None:
    """Raise UserError on all ranks if `make_optimizer` returned what does not fit the model. A collective.

    bf16 weights need an optimizer that does not round small updates away. It must have every trained parameter, because the
    gradient of another one would grow from step to step, and no other parameter, because no checkpoint would hold it.
    """
    name = type(optimizer).__name__
    if memory != "16N" and not isinstance(optimizer, LowMemoryAdamW):
        raise UserError(
            f"optimizer.memory={memory} is a format of this project's AdamW; with {name} set optimizer.memory=16N"
        )
    names = {parameter: key for key, parameter in parameters.items()}
    groups = [[names.get(p, "a parameter that is not trained") for p in g["params"]] for g in optimizer.param_groups]
    check_agreement({"make_optimizer": {"optimizer": name, "param_groups": groups}}, ranks)
    found = {key for group in groups for key in group}
    left_out = [key for key in parameters if key not in found]
    if left_out:
        raise UserError(
            f"make_optimizer: {name} lacks {len(left_out)} of {len(parameters)} trained parameters, such as "
            f"{', '.join(left_out[:3])}: add them, or set requires_grad to False before the model is sharded"
        )
    if found - set(parameters):
        raise UserError(f"make_optimizer: {name} has {(found - set(parameters)).pop()}; give it `parameters` alone")


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights: torch's fused fp32 kernel in chunks, stochastic rounding, no device wait.

    It updates this rank's rows of sharded parameters (or plain tensors). `order` lists all parameters; the position
    selects a parameter's noise.
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
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "noise_step": None})
        self.keeps_gradients = memory == "14N"
        self.seed = seed
        self.order = {parameter: index for index, parameter in enumerate(order)}
        device = order[0].device
        self.code_maps = make_code_maps(device) if memory == "6N" else {}
        largest = max(local(parameter).numel() for parameter in order)
        self.buffer_size = min(max(CHUNK[device.type], LANES * 256), -(-largest // LANES) * LANES)
        # One counter for all, because every parameter takes part in every step.
        self.steps = torch.zeros((), dtype=torch.float32, device=device)
        for parameter in order:
            self.state[parameter] = {"step": self.steps} | new_moments(parameter, memory)
            if self.keeps_gradients:
                keep_fp32_gradient(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Under 14N gradients stay allocated and are filled with zeros: FSDP adds to an existing gradient in its dtype."""
        super().zero_grad(set_to_none and not self.keeps_gradients)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        device = self.steps.device
        noise_steps = {group["noise_step"] for group in self.param_groups}
        if len(noise_steps) != 1 or None in noise_steps:
            raise ValueError("set one noise_step in every group before each step: it selects the noise of the rounding")
        noise = Noise(self.seed, noise_steps.pop(), device)
        step = _Step(torch.zeros((4, self.buffer_size), device=device), noise)
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, step)

    def _update(self, parameter: nn.Parameter, group: dict, step: "_Step") -> None:
        weight, first = flat_shard(parameter)
        if weight.numel() == 0:  # more ranks than rows
            return
        grad = local(gradient_of(parameter)).reshape(-1)
        moments = Moments(self.state[parameter], self.code_maps)
        stream = 3 * self.order[parameter]  # the weight and its two moments have a noise stream each
        unit = math.lcm(LANES, moments.block)
        size = max(1, CHUNK[weight.device.type] // unit) * unit
        for start in range(0, weight.numel(), size):
            part = slice(start, min(start + size, weight.numel()))
            count = part.stop - start
            # What does not fill a register torch computes with other roundings, and which elements those are would depend
            # on the number of ranks. Hence the last register is filled with elements that do not count.
            value, g, exp_avg, exp_avg_sq = step.buffers[:, : -(-count // LANES) * LANES]
            value[:count].copy_(weight[part])
            g[:count].copy_(grad[part])
            exp_avg, exp_avg_sq = moments.read("exp_avg", part, exp_avg), moments.read("exp_avg_sq", part, exp_avg_sq)
            torch._fused_adamw_(  # as torch.optim.AdamW(fused=True), in one pass
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
            weight[part].copy_(stochastic_round_(value[:count], step.noise, stream, first + start))
            for number, (key, moment) in enumerate((("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)), 1):
                moments.write(key, part, moment, step.noise, stream + number, first + start)


@dataclass(frozen=True)
class _Step:
    """What all chunks of a step share."""

    buffers: torch.Tensor  # fp32 (4, elements): weights, gradients and moments of a chunk, allocated once per step
    noise: Noise


def keep_fp32_gradient(parameter: nn.Parameter) -> None:
    """14N: allocate an fp32 gradient. FSDP reduces in fp32 but casts to the parameter's dtype unless it can add to one.

    The contribution of a micro-batch has been rounded to bf16 once; the sum over micro-batches is fp32.
    """
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
