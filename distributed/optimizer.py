"""AdamW in 16, 14, 12, 8 or 6 bytes per parameter, and bf16 weights that still move at a low learning rate.

    optimizer.memory   weights   gradients   moments   bytes per parameter
    16N                fp32      fp32        fp32      4 + 4 + 8
    14N                bf16      fp32        fp32      2 + 4 + 8
    12N                bf16      bf16        fp32      2 + 2 + 8
    8N                 bf16      bf16        bf16      2 + 2 + 4
    6N                 bf16      bf16        8 bits    2 + 2 + 2, plus the scales: 8 bytes per block of 32 to 256

bf16 weights are rounded stochastically (distributed/rounding.py). The gradients of a step's micro-batches are summed in the dtype
of the table: in bf16 the sum of 128 gradients is 1% off (docs/LOG.md).
"""

import inspect

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common.errors import UserError
from configs.config import Optimizer
from distributed.process_group import Ranks, check_agreement


def parameter_dtype(memory: str) -> torch.dtype:
    """Return the dtype of the sharded weights under optimizer.memory."""
    return torch.float32 if memory == "16N" else torch.bfloat16


def check_memory(memory: str) -> None:
    """Raise UserError if optimizer.memory is 6N and torchao is not installed."""
    if memory == "6N":
        try:
            from torchao.optim.quant_utils import create_dynamic_map  # noqa: F401
        except ImportError as error:
            raise UserError("optimizer.memory=6N needs torchao for its 8-bit moments: pip install torchao") from error


def decays(name: str, dimensions: int) -> bool:
    """Return whether weight decay acts on a parameter: on matrices, not on biases. Biases of experts have two dimensions."""
    return dimensions >= 2 and not name.endswith("_bias")


def adamw(parameters: dict[str, nn.Parameter], settings: Optimizer, seed: int) -> torch.optim.Optimizer:
    """Return AdamW (arXiv:1711.05101) with allocated moments and with weight decay on matrices only, including experts.

    `parameters` are the trained parameters by name, in the same order on every rank, in `parameter_dtype(settings.memory)`.
    Before every step the loop sets `lr` in each group.
    """
    groups = []
    for decay in (True, False):
        members = [p for name, p in parameters.items() if decays(name, p.dim()) == decay]
        groups += [{"params": members, "weight_decay": settings.weight_decay if decay else 0.0}] if members else []
    options = {"lr": settings.peak, "betas": settings.betas, "eps": settings.eps}
    if settings.memory == "16N":
        optimizer = AdamW(groups, **options, fused=True)
        for parameter in parameters.values():  # before the first step, so that a checkpoint can be read in place
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step} | moments
        return optimizer
    from distributed.low_memory import LowMemoryAdamW

    return LowMemoryAdamW(groups, **options, memory=settings.memory, seed=seed, order=list(parameters.values()))


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose kernel gets this rank's part of sharded parameters as plain tensors.

    DTensors take time, and in torch 2.11 they leak host memory in every step (pytorch#181761).
    """

    def _init_group(self, group: dict, *lists: list) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return has_complex


def check_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], model: nn.Module, memory: str, ranks: Ranks
) -> None:
    """Raise UserError on all ranks if the optimizer of `make_optimizer` does not fit the model or the loop. A collective.

    bf16 weights need our AdamW, which does not round small updates away. The optimizer must have every trained parameter and no
    further parameter, must not need a closure, and must be the same on all ranks.
    """
    name = type(optimizer).__name__
    if memory != "16N" and name != "LowMemoryAdamW":
        raise UserError(
            f"optimizer.memory={memory} is a format of this project's AdamW; with {name} set optimizer.memory=16N"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        raise UserError(f"make_optimizer: {name} computes the loss again in its step; the loop has no closure for that")
    names = {parameter: key for key, parameter in parameters.items()}
    if missing := [name for name, p in model.named_parameters() if p.requires_grad and p not in names]:
        raise UserError(f"train.py: {missing[0]} has a gradient and is not in `parameters`: add it there, or freeze it")
    groups = [[names.get(p, "a parameter that is not trained") for p in g["params"]] for g in optimizer.param_groups]
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    check_agreement({"make_optimizer": {"optimizer": name, "param_groups": groups, "lr": rates}}, ranks)
    present = {key for group in groups for key in group}
    left_out = [key for key in parameters if key not in present]
    if left_out:
        raise UserError(
            f"make_optimizer: {name} lacks {len(left_out)} of {len(parameters)} trained parameters, such as "
            f"{', '.join(left_out[:3])}: add them, or set requires_grad to False before the model is sharded"
        )
    if present - set(parameters):
        raise UserError(f"make_optimizer: {name} has {(present - set(parameters)).pop()}; give it `parameters` alone")
