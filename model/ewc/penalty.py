"""Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796) on sharded parameters. docs/forgetting.md

    penalty(theta) = lambda / 2 * sum_i F_i (theta_i - theta_ref_i)^2

F is the Fisher diagonal per target token of the old domain (model/ewc/fisher.py), and theta_ref are the weights at the
start of the run. The training loss is also a mean over target tokens. `ewc.strength` (lambda) therefore says how many nats
per target token of the new domain one nat per target token of the old domain is worth; 1 weighs both domains equally.

The gradient, lambda * F * (theta - theta_ref), is elementwise: once per step each rank adds it to its own gradient shards,
without communication.
"""

import re
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distributed.gradients import gradient_of
from distributed.optimizer import CHUNK
from distributed.rounding import Noise, stochastic_round_
from distributed.sharding import flat_shard, local, local_shard, sum_over_shards
from model.ewc.anchor import Anchor


@dataclass(frozen=True)
class Penalty:
    """The penalty on a model's local shards."""

    strength: float  # lambda
    parameters: dict[str, nn.Parameter]  # by name, tied ones once: the shards, also while modules hold gathered tensors
    anchor: Anchor
    seed: int  # of the rounding of bf16 gradients
    groups: tuple[str, ...]  # layers.00, layers.01, ..., and the parameters outside of any layer
    # [sum F d^2, sum of squared gradients, sum d^2] of each group at the last measured step, fp64, on the parameters' device.
    sums: torch.Tensor
    timer: "_Timer" = field(default_factory=lambda: _Timer())

    @torch.no_grad()
    def add_gradient(self, step: int, measure: bool = True) -> None:
        """Add lambda * F * (theta - theta_ref) to this rank's gradients. No communication.

        Call it once per step, after the last backward and before the gradient norm. `step` (0-based) selects the noise by
        which a bf16 gradient is rounded stochastically; rounding to nearest would lose everything below half of its last
        bit in every step. `measure`: also take the sums that `curves` reports, at the current weights.
        """
        self.timer.start(self.sums.device)
        if measure:
            self.sums.zero_()
        noise = Noise(self.seed, step, self.sums.device)
        for index, (name, parameter) in enumerate(self.parameters.items()):
            weight, first = flat_shard(parameter)
            if weight.numel() == 0:  # more ranks than rows
                continue
            gradient = local(gradient_of(parameter)).view(-1)
            fisher, reference = self.anchor.fisher[name].view(-1), self.anchor.reference[name].view(-1)
            factor = self.strength * 2.0 ** self.anchor.exponents[name]
            stream = -1 - index  # the optimizer's streams are 0 and above
            sums = self.sums[self.groups.index(group_of(name))]
            size = CHUNK["cuda" if weight.is_cuda else "cpu"]
            for start in range(0, weight.numel(), size):
                part = slice(start, start + size)
                drift = weight[part].float() - _as_fp32(reference[part], weight.device)
                pull = _as_fp32(fisher[part], weight.device) * drift
                if measure:
                    sums[0].add_(torch.dot(pull, drift), alpha=factor)
                pull.mul_(factor)
                if measure:
                    sums[1].add_(torch.dot(pull, pull))
                    sums[2].add_(torch.dot(drift, drift))
                if gradient.dtype == torch.float32:
                    gradient[part].add_(pull)
                else:
                    pull.add_(gradient[part].float())
                    gradient[part].copy_(stochastic_round_(pull, noise, stream, first + start))
        self.timer.stop()

    def curves(self, seconds_per_step: float | None = None) -> dict[str, float]:
        """Curves at the weights of the last measured `add_gradient`, in total and by layer. A collective.

        ewc/penalty: nats per target token. ewc/grad_norm: norm of the penalty's gradient. ewc/drift: Euclidean distance
        from the reference. With `seconds_per_step` also ewc/time: the fraction of a step that `add_gradient` took on this
        rank since the last call.
        """
        sums = sum_over_shards(self.sums.clone(), next(iter(self.parameters.values()))).cpu()
        names = ("", *(f"/{group}" for group in self.groups))
        row = {}
        for name, (square, gradient, drift) in zip(names, (sums.sum(0).tolist(), *sums.tolist()), strict=True):
            row |= {
                f"ewc/penalty{name}": square / 2,
                f"ewc/grad_norm{name}": gradient**0.5,
                f"ewc/drift{name}": drift**0.5,
            }
        seconds = self.timer.mean_seconds()
        if seconds_per_step:
            row["ewc/time"] = seconds / seconds_per_step
        return row

    def num_bytes(self) -> int:
        """Bytes of the Fisher diagonal and the reference on this rank."""
        return sum(t.nbytes for shards in (self.anchor.fisher, self.anchor.reference) for t in shards.values())

    def line(self) -> str:
        """Strength and memory, for the run's log."""
        fisher = list(self.anchor.fisher.values())
        per_parameter = self.num_bytes() / max(1, sum(t.numel() for t in fisher))
        return (
            f"EWC: lambda {self.strength:g}; Fisher diagonal and reference take {self.num_bytes() / 2**20:,.1f} MiB on each "
            f"rank ({per_parameter:.2f} bytes per parameter) on {fisher[0].device}"
        )


def make_penalty(
    strength: float, parameters: dict[str, nn.Parameter], anchor: Anchor, device: str = "device", seed: int = 0
) -> Penalty:
    """The penalty towards an anchor, which is moved to the CPU if `device` is `cpu` and else stays with the parameters."""
    groups = tuple(dict.fromkeys(group_of(name) for name in parameters))
    parameter_device = local_shard(next(iter(parameters.values())))[0].device
    if device == "cpu" and parameter_device.type != "cpu":
        fisher, reference = (
            {n: t.cpu().pin_memory() for n, t in shards.items()} for shards in (anchor.fisher, anchor.reference)
        )
        anchor = Anchor(fisher, anchor.exponents, reference, anchor.made)
    sums = torch.zeros(len(groups), 3, dtype=torch.float64, device=parameter_device)
    return Penalty(strength, parameters, anchor, seed, groups, sums)


def group_of(name: str) -> str:
    """The curve of a parameter: `layers.07` for model.layers.7.mlp.up_proj.weight; `embed_tokens`, `norm` outside layers."""
    layer = re.match(r"(?:.*\.)?(\w+)\.(\d+)\.", name)
    if layer:
        return f"{layer[1]}.{int(layer[2]):02d}"
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _as_fp32(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A chunk as fp32 on `device`. From pinned host memory the copy does not wait."""
    return tensor.to(device, non_blocking=True).float()


class _Timer:
    """Sums the seconds between start and stop. On CUDA it records events, which are read only for the mean."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.seconds, self.count = 0.0, 0

    def start(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.begin = self._now()

    def stop(self) -> None:
        self.count += 1
        if self.cuda:
            self.events.append((self.begin, self._now()))
        else:
            self.seconds += self._now() - self.begin

    def mean_seconds(self) -> float:
        """Mean since the last call."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        mean = self.seconds / max(1, self.count)
        self.events, self.seconds, self.count = [], 0.0, 0
        return mean

    def _now(self) -> Any:  # seconds, or a CUDA event
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
