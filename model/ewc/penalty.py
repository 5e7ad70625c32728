"""Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796) on sharded parameters. docs/ewc.md

    penalty(theta) = strength / 2 * sum_i F_i (theta_i - theta_ref_i)^2

F is the Fisher diagonal a target token of the old domain (model/ewc/fisher.py), theta_ref the weights the run began with. The
loss that is trained on is a mean over target tokens too, so `strength` (lambda) says how many nats a target token of the
new data one nat a target token on the old data is worth: 1 weighs both alike.

Its gradient, strength * F * (theta - theta_ref), is a sum over single weights: each rank adds it to its own shards of the
gradients, once a step, and nothing is sent.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from common.errors import UserError
from distributed.checkpoint import broadcast_from_first
from distributed.optimizer import CHUNK, noise_key, stochastic_round_
from distributed.process_group import Ranks, StopSignal, agree_any
from distributed.sharding import local_shard, reshard
from model.ewc.anchor import Anchor, kept_as, load_anchor, read_made, save_anchor
from model.ewc.fisher import Squares, estimate_fisher
from model.language_model import PackedLanguageModel, parameter_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Settings(Protocol):
    """What is read of the config's `ewc` section."""

    strength: float
    estimator: str
    batch: int
    dtype: str
    device: str
    fisher: str | None
    seed: int


@dataclass(frozen=True)
class Penalty:
    """The penalty on a model's own shards."""

    strength: float
    parameters: dict[str, nn.Parameter]  # by name, tied ones once: the shards, whatever the model's modules hold now
    anchor: Anchor
    seed: int  # of the rounding of bf16 gradients
    groups: tuple[str, ...]  # layers.00, layers.01, ..., and what is in no layer
    # Since the last curves: [sum F d^2, sum of squared gradients, sum d^2] of each group, fp64, on the parameters' device.
    sums: torch.Tensor
    timer: "_Timer" = field(default_factory=lambda: _Timer())

    @torch.no_grad()
    def add_gradient(self, step: int, measure: bool = True) -> None:
        """Add strength * F * (theta - theta_ref) to this rank's gradients. No communication.

        Call it once a step, after the last backward and before the gradient norm. A bf16 gradient is rounded
        stochastically: to nearest, what is below half of its last bit would be lost in every step. step: 0-based, for that
        noise. measure: also take the sums that `curves` reports of the weights as they are now.
        """
        self.timer.start(self.sums.device)
        if measure:
            self.sums.zero_()
        for index, (name, parameter) in enumerate(self.parameters.items()):
            (local, row), gradient = local_shard(parameter), local_shard(parameter.grad)[0]
            if local.numel() == 0:  # more ranks than rows
                continue
            first = row * (parameter.numel() // parameter.shape[0]) if parameter.dim() else 0
            weight, gradient = local.view(-1), gradient.view(-1)
            fisher, reference = self.anchor.fisher[name].view(-1), self.anchor.reference[name].view(-1)
            factor = self.strength * 2.0 ** self.anchor.exponents[name]
            # Streams of noise of their own: the optimizer's are 0 and above.
            key = noise_key(self.seed, -1 - index, step)
            sums = self.sums[self.groups.index(group_of(name))]
            for start in range(0, weight.numel(), CHUNK["cuda" if weight.is_cuda else "cpu"]):
                part = slice(start, start + CHUNK["cuda" if weight.is_cuda else "cpu"])
                drift = weight[part].float() - _on(reference[part], weight.device)
                pull = _on(fisher[part], weight.device) * drift
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
                    gradient[part].copy_(stochastic_round_(pull, key, first + start))
        self.timer.stop()

    def curves(self, seconds_per_step: float | None = None) -> dict[str, float]:
        """Of the weights that the last measured `add_gradient` saw, in total and for each layer. A collective.

        ewc/penalty: nats a target token. ewc/grad_norm: of its gradient. ewc/drift: Euclidean distance from the reference.
        With the seconds of a step also ewc/time, the share of it that `add_gradient` took on this rank since the last call.
        """
        sums = self.sums.clone()
        parameter = next(iter(self.parameters.values()))
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh  # replicated over a first dimension, if there are two
            dist.all_reduce(sums, group=mesh.get_group(mesh.ndim - 1))
        sums = sums.cpu()
        row = {}
        for name, (square, gradient, drift) in zip(
            ("", *(f"/{group}" for group in self.groups)), (sums.sum(0).tolist(), *sums.tolist()), strict=True
        ):
            row |= {
                f"ewc/penalty{name}": square / 2,
                f"ewc/grad_norm{name}": gradient**0.5,
                f"ewc/drift{name}": drift**0.5,
            }
        seconds = self.timer.mean_seconds()
        if seconds_per_step:
            row["ewc/time"] = seconds / seconds_per_step
        return row

    def bytes(self) -> int:
        """What Fisher diagonal and reference take on this rank."""
        return sum(t.nbytes for shards in (self.anchor.fisher, self.anchor.reference) for t in shards.values())


def start_ewc(
    model: PackedLanguageModel,
    settings: Settings,
    directory: Path,
    squares: Squares | None,
    strategy: str,
    ranks: Ranks,
    stop: StopSignal,
    say: Callable[[str], None] = lambda text: None,
    new_rows_from: int | None = None,
) -> Penalty | None:
    """The penalty of a run whose model holds the weights it begins with; every rank calls it, before the optimizer is made.

    What `directory` (runs/NAME/ewc) holds is loaded; else what `settings.fisher` names is; else it is estimated from
    `squares`; and it is saved. None if a signal came before that was done. new_rows_from: from this row on embedding and
    head belong to new tokens, whose Fisher diagonal is zero. Raises UserError where what is saved was made otherwise or of
    another model.
    """
    reshard(model)
    parameters = parameter_names(model)
    vocabulary = {name for name, p in parameters.items() if any(p is v for v in _vocabulary(model))}
    wanted = made_from(settings, squares)
    if broadcast_from_first(directory.is_dir() if ranks.rank == 0 else None, ranks):
        made = read_made(directory)
        for key, value in wanted.items():
            if made.get(key) != value:
                raise UserError(
                    f"{directory} was made with ewc.{key}={made.get(key)}, now it is {value}; set it back, remove the "
                    "folder or choose another run.name"
                )
        anchor = load_anchor(directory, parameters, vocabulary)
        if made["fisher"] is None and agree_any(not _equal(anchor.reference, parameters), ranks):
            raise UserError(f"{directory} holds the weights of another model than model.path; choose another run.name")
        say(f"EWC: Fisher diagonal ({made['estimator']}, {made['documents']} documents) read from {directory}")
    elif settings.fisher:
        found = load_anchor(Path(settings.fisher), parameters, vocabulary)
        anchor = Anchor(found.fisher, found.exponents, found.reference, found.made | wanted)
        anchor = kept_as(anchor, DTYPES[settings.dtype], ranks)
        save_anchor(directory, anchor, parameters, ranks)
        say(
            f"EWC: Fisher diagonal ({anchor.made['estimator']}, {anchor.made['documents']} documents) and reference taken "
            f"from {settings.fisher}"
        )
    else:
        started = time.perf_counter()
        say(
            f"EWC: estimating the Fisher diagonal ({settings.estimator}) from {squares.num_documents} documents, "
            f"{settings.batch} a square: expect an error of {(2 * settings.batch / squares.num_documents) ** 0.5:.0%}"
        )
        if settings.batch < ranks.world_size:
            say(f"warning: ewc.batch={settings.batch} documents a square leave some of {ranks.world_size} ranks idle")
        fisher = estimate_fisher(model, squares, settings.estimator, settings.seed, strategy, ranks, stop, say)
        if fisher is None:
            return None
        if new_rows_from is not None:
            for name in vocabulary:
                start = local_shard(parameters[name])[1]
                fisher[name][max(0, new_rows_from - start) :] = 0.0
        reference = {name: local_shard(p)[0].clone() for name, p in parameters.items()}
        anchor = Anchor(fisher, dict.fromkeys(fisher, 0), reference, wanted | {"target_tokens": squares.num_targets})
        anchor = kept_as(anchor, DTYPES[settings.dtype], ranks)
        save_anchor(directory, anchor, parameters, ranks)
        say(f"EWC: Fisher diagonal estimated and saved to {directory} in {time.perf_counter() - started:.1f} s")
    penalty = make_penalty(settings.strength, parameters, anchor, settings.device, settings.seed)
    count = max(1, sum(local_shard(p)[0].numel() for p in parameters.values()))
    say(
        f"EWC: lambda {settings.strength:g}; Fisher diagonal and reference take {penalty.bytes() / 2**20:,.1f} MiB on each "
        f"rank ({penalty.bytes() / count:.2f} bytes per parameter) on {next(iter(penalty.anchor.fisher.values())).device}"
    )
    return penalty


def make_penalty(
    strength: float, parameters: dict[str, nn.Parameter], anchor: Anchor, device: str = "device", seed: int = 0
) -> Penalty:
    """The penalty of an anchor, which is put on the CPU where `device` says so, and else stays beside the parameters."""
    groups = tuple(dict.fromkeys(group_of(name) for name in parameters))
    home = local_shard(next(iter(parameters.values())))[0].device
    if device == "cpu" and home.type != "cpu":
        fisher, reference = (
            {n: t.cpu().pin_memory() for n, t in shards.items()} for shards in (anchor.fisher, anchor.reference)
        )
        anchor = Anchor(fisher, anchor.exponents, reference, anchor.made)
    sums = torch.zeros(len(groups), 3, dtype=torch.float64, device=home)
    return Penalty(strength, parameters, anchor, seed, groups, sums)


def made_from(settings: Settings, squares: Squares | None) -> dict:
    """What a run's anchor is made from, as plain JSON: runs that agree in it have the same. For train.py's `meaning`."""
    if settings.fisher or squares is None:
        return {"fisher": settings.fisher, "dtype": settings.dtype}
    return {
        "fisher": None,
        "estimator": settings.estimator,
        "documents": squares.num_documents,
        "batch": settings.batch,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "data": squares.fingerprint,
    }


def first_new_row(model_path: str) -> int | None:
    """Where the rows of new tokens begin in a model of scripts/extend_vocabulary.py; None: it has none."""
    record = Path(model_path) / "new_tokens.json"
    return json.loads(record.read_text(encoding="utf-8"))["first_id"] if record.is_file() else None


def group_of(name: str) -> str:
    """The curve a parameter belongs to: `layers.07` of model.layers.7.mlp.up_proj.weight, `embed_tokens`, `norm`."""
    layer = re.match(r"(?:.*\.)?(\w+)\.(\d+)\.", name)
    if layer:
        return f"{layer[1]}.{int(layer[2]):02d}"
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _vocabulary(model: PackedLanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    causal_lm = model.causal_lm
    return causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight


def _equal(reference: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(reference[n].to(p.dtype), local_shard(p)[0]) for n, p in parameters.items())


def _on(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A chunk as fp32 where the weights are; from pinned host memory the copy does not wait."""
    return tensor.to(device, non_blocking=True).float()


class _Timer:
    """Seconds between start and stop, summed. On CUDA by events, which are read only when the mean is asked for."""

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
        """Since the last call."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        mean = self.seconds / max(1, self.count)
        self.events, self.seconds, self.count = [], 0.0, 0
        return mean

    def _now(self) -> object:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
