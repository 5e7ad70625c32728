"""Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796) on sharded parameters. docs/forgetting.md

    penalty(theta) = lambda / 2 * sum_i F_i (theta_i - theta_ref_i)^2

F is the Fisher diagonal per target token of the old domain, and theta_ref are the weights at the start of the run. The
training loss is also a mean over target tokens. `ewc.strength` (lambda) therefore says how many nats per target token of the
new domain one nat per target token of the old domain is worth; 1 weighs both domains equally. The gradient,
lambda * F * (theta - theta_ref), is elementwise: each rank adds it to its own gradient shards, without communication.

F is estimated in one of two ways. Per target token, with N target tokens in all documents d:

    model      F = 1/N sum_d sum_t E_{y ~ p(. | x_<t)} (d log p(y | x_<t) / d theta)^2
    empirical  F = 1/N sum_d (sum_t d log p(x_t | x_<t) / d theta)^2

With weights (data/encoding.py) the scores of a token of weight w get the factor sqrt(w), and N is the sum of the weights:
a token, or a document, of weight w counts like w of them.

The first is the Fisher information: the second derivative of KL(p_0 || p_theta) at theta_0, whatever the labels of the
data are. The second squares each document's own gradient. It is not the Fisher information, and differs from it more the
worse the model predicts the data (Kunstner et al., arXiv:1905.12558).

Neither needs a backward per document. In the square of a group's summed gradient the cross terms of two documents must
vanish on average. With labels sampled from the model they do, because every score has mean zero given its context. With
the data's labels they do not, so each document's loss gets a random sign. The square of one group is then unbiased, with
a relative error of about sqrt(2) whatever the number of its documents. With n documents in groups of b, the relative
error is about sqrt(2 b / n).

Diagonal and reference of a run are kept on disk. The tensors are whole and have their Hugging Face names, so that any number
of ranks can read its slices:

    runs/NAME/ewc/fisher-00001.safetensors ...
    runs/NAME/ewc/reference-00001.safetensors ...
    runs/NAME/ewc/settings.json                     how they were made
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from common.dtypes import DTYPES
from common.durable_files import publish, start_directory
from common.errors import UserError
from common.random_bits import permuted
from configs.config import EWC
from data.batches import MicroBatch, collate
from data.dealing import Dealer
from data.examples import Documents
from data.sources import Windows
from distributed.export import files_of, write_file
from distributed.gradients import gradient_of
from distributed.low_memory import CHUNK
from distributed.process_group import Ranks, StopSignal, agree_any, barrier, read_on_first
from distributed.rounding import Noise, stochastic_round_
from distributed.sharding import before_micro_batch, flat_shard, local, local_shard, reshard, sum_over_shards
from model.label_sampling import draw
from model.language_model import PackedLanguageModel, trained_parameters, vocabulary_names
from model.loss import chunked

REPORT_EVERY = 30.0  # seconds
DOCUMENT_BITS = 20  # for a document's number within its item; a window has at most as many documents as tokens

Say = Callable[[str], None]


# --- The documents of the old domain ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FisherBatches:
    """Items of a source in groups of `group_size`: group g is items[g * group_size : (g + 1) * group_size].

    A group is a fixed set of documents whose gradients are added before they are squared. It depends neither on the number
    of ranks nor on packing.
    """

    source: Documents | Windows
    items: tuple[int, ...]
    num_targets: int | float  # of all items, or the sum of their weights
    group_size: int
    dealer: Dealer

    @property
    def num_groups(self) -> int:
        """Number of groups. The last one may be smaller."""
        return -(-len(self.items) // self.group_size)

    def micro_batches(self, group: int, rank: int, world_size: int) -> list[tuple[MicroBatch, torch.Tensor]]:
        """This rank's micro-batches of a group; every rank gets the same number.

        Each comes with the numbers of its documents in the whole data, int64 `(documents,)`.
        """
        items = self.items[group * self.group_size : (group + 1) * self.group_size]
        dealt = self.dealer.deal(items, self.source, world_size).of_rank(rank)
        return [(collate(mine, self.source), self._document_numbers(mine)) for mine in dealt]

    def _document_numbers(self, items: tuple[int, ...]) -> torch.Tensor:
        numbers = [
            (item << DOCUMENT_BITS) + number
            for item in items
            for number in range(len(self.source.document_lengths(item)))
        ]
        return torch.tensor(numbers or [0])


def fisher_batches(source: Documents | Windows, settings: EWC, dealer: Dealer) -> FisherBatches:
    """`settings.documents` items of a source, drawn without replacement (all items if it has fewer), in groups.

    Items without a target are left out, because their gradient is zero. `dealer` deals a group to the ranks.
    """
    usable = source.items_with_targets()
    count = num_documents(source, settings)
    items = tuple(int(usable[permuted(i, len(usable), (settings.seed,))]) for i in range(count))
    num_targets = math.fsum(source.num_targets(item) for item in items)
    return FisherBatches(source, items, num_targets, settings.batch, dealer)


def num_documents(source: Documents | Windows, settings: EWC) -> int:
    """How many items `fisher_batches` draws."""
    return min(settings.documents, len(source.items_with_targets()))


# --- The Fisher diagonal ----------------------------------------------------------------------------------------------


def estimate_fisher(
    model: PackedLanguageModel,
    batches: FisherBatches,
    estimator: str,
    seed: int,
    strategy: str,
    stop: StopSignal,
    say: Say = lambda text: None,
) -> dict[str, torch.Tensor] | None:
    """The local shard of the Fisher diagonal of each trained parameter, fp32, in 1 / (its unit)^2 per target token.

    A collective. `estimator` is `model` or `empirical`. Tied weights appear once, with the gradient of both uses. FSDP
    must sum gradients over ranks (distributed/sharding.py: sum_gradients), because its mean would make the result
    `ranks^2` times too small. Returns None after a signal. Raises UserError if the result is not finite.
    """
    reshard(model)  # after an evaluation under grad_op the model's parameters are not shards
    ranks = stop.ranks
    parameters = trained_parameters(model)
    sums = {n: torch.zeros_like(local_shard(p)[0], dtype=torch.float32) for n, p in parameters.items()}
    started = reported = time.perf_counter()
    for group in range(batches.num_groups):
        dealt = batches.micro_batches(group, ranks.rank, ranks.world_size)
        for number, (batch, documents) in enumerate(dealt, 1):
            if stop.agreed():
                for parameter in parameters.values():
                    parameter.grad = None
                reshard(model)
                return None
            before_micro_batch(model, strategy, number == len(dealt))
            batch = batch.to(ranks.device)
            drawn, token_losses = draw(estimator, batch, documents.to(ranks.device), seed)
            chunked(model.head, model(drawn), drawn, token_losses).backward()
        for name, parameter in parameters.items():
            gradient = local(gradient_of(parameter)).float()
            sums[name].addcmul_(gradient, gradient)
            parameter.grad = None
        now = time.perf_counter()
        if now - reported > REPORT_EVERY:
            reported, left = now, (now - started) / (group + 1) * (batches.num_groups - group - 1)
            say(f"EWC: Fisher diagonal, group {group + 1}/{batches.num_groups}, {left / 60:.1f} min left")
    bad = not all(bool(torch.isfinite(total).all()) for total in sums.values())
    if agree_any(bad, ranks):
        raise UserError("the Fisher diagonal is not finite: check the data of ewc.data, or compute in fp32")
    for total in sums.values():
        total.div_(batches.num_targets)
    return sums


# --- Diagonal and reference, in memory and on disk --------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """The Fisher diagonal and the reference weights: local shards by parameter name."""

    fisher: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]
    made: dict  # estimator, documents and so on: plain JSON


def in_dtype(anchor: Anchor, dtype: torch.dtype, ranks: Ranks) -> Anchor:
    """The anchor with the diagonal in `dtype`, and the reference too where that is exact. A collective.

    bf16 has the range of fp32, so no element underflows that fp32 holds.
    """
    # All ranks must agree: the shards of a tensor have one dtype.
    inexact = torch.tensor([not torch.equal(r, r.to(dtype).to(r.dtype)) for r in anchor.reference.values()]).int()
    dist.all_reduce(inexact, op=dist.ReduceOp.MAX, group=ranks.flags)
    reference = {
        name: shard if kept else shard.to(dtype)
        for (name, shard), kept in zip(anchor.reference.items(), inexact.tolist(), strict=True)
    }
    return Anchor({name: shard.to(dtype) for name, shard in anchor.fisher.items()}, reference, anchor.made)


def save_anchor(
    directory: Path,
    anchor: Anchor,
    parameters: dict[str, nn.Parameter],
    ranks: Ranks,
    max_file_bytes: int = 5 * 2**30,
) -> None:
    """Write `directory`, complete or not at all. A collective: all ranks gather each tensor, rank 0 writes."""
    temporary = start_directory(directory) if ranks.rank == 0 else None
    for kind, shards in (("fisher", anchor.fisher), ("reference", anchor.reference)):
        sizes = {name: parameters[name].numel() * shard.element_size() for name, shard in shards.items()}
        for number, names in enumerate(files_of(sizes, max_file_bytes).values(), 1):
            tensors = {}
            for name in names:
                whole = _whole(shards[name], parameters[name])
                if temporary:
                    tensors[name] = whole.cpu().contiguous()
            if temporary:
                write_file(tensors, temporary / f"{kind}-{number:05d}.safetensors")
    if temporary:
        (temporary / "settings.json").write_text(json.dumps({"made": anchor.made}, indent=1), encoding="utf-8")
        publish(directory)
    barrier(ranks)


def load_anchor(directory: Path, parameters: dict[str, nn.Parameter], vocabulary: frozenset[str]) -> Anchor:
    """This rank's slices of a saved anchor, whatever the number of ranks that saved it.

    `vocabulary` names the parameters that may have more rows than were saved (new tokens). In the additional rows the
    Fisher diagonal is zero and the reference is the parameter's current value. Raises UserError if the files do not match
    the model.
    """
    record = _record(directory)
    fisher, reference = (
        {name: _slice(directory, kind, name, p, name in vocabulary) for name, p in parameters.items()}
        for kind in ("fisher", "reference")
    )
    for name, exponent in record.get("exponents", {}).items():  # of earlier versions, which kept them apart
        if name in fisher:
            fisher[name] *= 2.0**exponent
    return Anchor(fisher, reference, record["made"])


def _record(directory: Path) -> dict:
    try:
        return json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no saved Fisher diagonal: settings.json: {error}") from error


def _slice(directory: Path, kind: str, name: str, parameter: nn.Parameter, may_have_grown: bool) -> torch.Tensor:
    shard, start = local_shard(parameter)
    for file in sorted(directory.glob(f"{kind}-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name not in tensors.keys():  # noqa: SIM118  safe_open is not a dict
                continue
            stored = tensors.get_slice(name)
            shape, expected = tuple(stored.get_shape()), tuple(parameter.shape)
            grown = may_have_grown and shape[1:] == expected[1:] and shape[0] < expected[0]
            if shape != expected and not grown:
                raise UserError(
                    f"{file}: {name} has shape {shape}, but the model has {expected}; it belongs to another model"
                )
            if not shard.dim():
                return stored[...].to(shard.device)
            known = stored[min(start, shape[0]) : min(start + shard.shape[0], shape[0])].to(shard.device)
            new = shard[known.shape[0] :].to(known.dtype)
            return torch.cat([known, torch.zeros_like(new) if kind == "fisher" else new]) if len(new) else known
    raise UserError(f"{directory} has no {kind} of {name}: it belongs to another model")


def _whole(shard: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The whole tensor whose part on this rank is `shard`, sharded like the parameter. A collective."""
    if not isinstance(parameter, DTensor):
        return shard
    mesh, shape = parameter.device_mesh, {"shape": parameter.shape, "stride": parameter.stride()}
    shard = shard.to(mesh.device_type)
    return DTensor.from_local(shard, mesh, parameter.placements, run_check=False, **shape).full_tensor()


# --- The penalty ------------------------------------------------------------------------------------------------------


class Penalty:
    """The penalty on a model's local shards, towards an anchor."""

    def __init__(
        self,
        strength: float,
        parameters: dict[str, nn.Parameter],
        anchor: Anchor,
        device: str = "device",
        seed: int = 0,
    ) -> None:
        """strength: lambda. parameters: by name, tied ones once: the shards, also while modules hold gathered tensors.

        device: `cpu` moves the anchor to host memory; else it stays with the parameters. seed: of the rounding of bf16
        gradients.
        """
        self.strength, self.parameters, self.anchor, self.seed = strength, parameters, anchor, seed
        at = local_shard(next(iter(parameters.values())))[0].device
        if device == "cpu" and at.type != "cpu":
            fisher, reference = (
                {n: t.cpu().pin_memory() for n, t in shards.items()} for shards in (anchor.fisher, anchor.reference)
            )
            self.anchor = replace(anchor, fisher=fisher, reference=reference)
        # layers.00, layers.01, ..., and the parameters outside of any layer
        self.groups = tuple(dict.fromkeys(group_of(name) for name in parameters))
        # At the last measured step: [sum F d^2, sum of squared gradients, sum d^2] of each group; when it began and ended.
        self.sums = torch.zeros(len(self.groups), 3, dtype=torch.float64, device=at)
        self.measured: tuple[Any, Any] = 0.0, 0.0

    @torch.no_grad()
    def add_gradient(self, step: int, measure: bool = True) -> None:
        """Add lambda * F * (theta - theta_ref) to this rank's gradients. No communication.

        Call it once per step, after the last backward and before the gradient norm. `step` (0-based) selects the noise by
        which a bf16 gradient is rounded stochastically; rounding to nearest would lose everything below half of its last
        bit in every step. `measure`: also take what `curves` reports, at the current weights. Parameters without a gradient
        are frozen and left alone.
        """
        started = _mark(self.sums.device)
        if measure:
            self.sums.zero_()
        noise = Noise(self.seed, step, self.sums.device)
        for index, (name, parameter) in enumerate(self.parameters.items()):
            weight, first = flat_shard(parameter)
            if parameter.grad is None or weight.numel() == 0:  # frozen, or more ranks than rows
                continue
            gradient = local(parameter.grad).view(-1)
            fisher, reference = self.anchor.fisher[name].view(-1), self.anchor.reference[name].view(-1)
            stream = -1 - index  # the optimizer's streams are 0 and above
            sums = self.sums[self.groups.index(group_of(name))]
            size = CHUNK["cuda" if weight.is_cuda else "cpu"]
            for start in range(0, weight.numel(), size):
                part = slice(start, start + size)
                # From pinned host memory the copies do not wait.
                drift = weight[part].float() - reference[part].to(weight.device, non_blocking=True).float()
                pull = fisher[part].to(weight.device, non_blocking=True).float() * drift
                if measure:
                    sums[0].add_(torch.dot(pull, drift), alpha=self.strength)
                pull.mul_(self.strength)
                if measure:
                    sums[1].add_(torch.dot(pull, pull))
                    sums[2].add_(torch.dot(drift, drift))
                if gradient.dtype == torch.float32:
                    gradient[part].add_(pull)
                else:
                    pull.add_(gradient[part].float())
                    gradient[part].copy_(stochastic_round_(pull, noise, stream, first + start))
        if measure:
            self.measured = started, _mark(self.sums.device)

    def curves(self, seconds_per_step: float | None = None) -> dict[str, float]:
        """Curves at the weights of the last measured `add_gradient`, in total and by layer. A collective.

        ewc/penalty: nats per target token. ewc/grad_norm: norm of the penalty's gradient. ewc/drift: Euclidean distance
        from the reference. With `seconds_per_step` also ewc/time: the fraction of a step that `add_gradient` took on this
        rank.
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
        if seconds_per_step:
            begin, end = self.measured
            seconds = begin.elapsed_time(end) / 1000 if self.sums.is_cuda else end - begin
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


def group_of(name: str) -> str:
    """The curve of a parameter: `layers.07` for model.layers.7.mlp.up_proj.weight; `embed_tokens`, `norm` outside layers."""
    layer = re.match(r"(?:.*\.)?(\w+)\.(\d+)\.", name)
    if layer:
        return f"{layer[1]}.{int(layer[2]):02d}"
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _mark(device: torch.device) -> Any:
    """Now: in seconds, or as an event of the device, for which nobody waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# --- The penalty of a run ---------------------------------------------------------------------------------------------


def start_penalty(
    model: PackedLanguageModel,
    settings: EWC,
    directory: Path,
    old_domain: Documents | Windows | None,
    dealer: Dealer,
    strategy: str,
    stop: StopSignal,
    say: Say = lambda text: None,
    first_new_row: int | None = None,
) -> Penalty | None:
    """The penalty of a run whose model holds its initial weights. A collective, called before the optimizer is made.

    The anchor in `directory` (runs/NAME/ewc) is loaded if there is one. Otherwise the one at `settings.fisher` is reused,
    or a new one is estimated from documents of `old_domain`; either is then saved to `directory`. From `first_new_row` on,
    the rows of embedding and head belong to new tokens, whose Fisher diagonal is zero. Returns None if a signal came during
    the estimate. Raises UserError if the saved anchor was made with other settings or from another model.
    """
    reshard(model)
    parameters = trained_parameters(model)
    wanted = anchor_settings(settings, old_domain)
    if read_on_first(directory.is_dir, stop.ranks):
        anchor = _load_saved(directory, wanted, model, stop.ranks, say)
    else:
        if old_domain is None:
            directory_of_other = Path(settings.fisher or "")
            anchor = load_anchor(directory_of_other, parameters, vocabulary_names(model))
            anchor = replace(anchor, made=anchor.made | wanted)
            say(f"EWC: Fisher diagonal ({_how(anchor.made)}) and reference reused from {directory_of_other}")
        else:
            batches = fisher_batches(old_domain, settings, dealer)
            anchor = _estimate(model, settings, batches, strategy, stop, say, first_new_row)
            if anchor is None:
                return None
        anchor = in_dtype(anchor, DTYPES[settings.dtype], stop.ranks)
        save_anchor(directory, anchor, parameters, stop.ranks)
        say(f"EWC: Fisher diagonal and reference saved to {directory}")
    penalty = Penalty(settings.strength, parameters, anchor, settings.device, settings.seed)
    say(penalty.line())
    return penalty


def anchor_settings(settings: EWC, old_domain: Documents | Windows | None) -> dict:
    """What determines a run's anchor, as plain JSON: runs with equal values have the same anchor.

    old_domain: the source of ewc.data; None with ewc.fisher.
    """
    if old_domain is None:
        return {"fisher": settings.fisher, "dtype": settings.dtype}
    return {
        "fisher": None,
        "estimator": settings.estimator,
        "documents": num_documents(old_domain, settings),
        "batch": settings.batch,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "data": old_domain.fingerprint,
    }


def _load_saved(directory: Path, expected: dict, model: PackedLanguageModel, ranks: Ranks, say: Say) -> Anchor:
    """The anchor that this run saved earlier. A collective. Raises UserError if it is not the `expected` one."""
    made = _record(directory)["made"]
    for key, value in expected.items():
        if made.get(key) != value:
            raise UserError(
                f"{directory} was made with ewc.{key}={made.get(key)}, now it is {value}; set it back, remove the "
                "directory or choose another run.name"
            )
    parameters = trained_parameters(model)
    anchor = load_anchor(directory, parameters, vocabulary_names(model))
    same = all(torch.equal(anchor.reference[n].to(p.dtype), local_shard(p)[0]) for n, p in parameters.items())
    if made["fisher"] is None and agree_any(not same, ranks):
        raise UserError(f"{directory} has the weights of another model than model.path; choose another run.name")
    say(f"EWC: Fisher diagonal ({_how(made)}) read from {directory}")
    return anchor


def _how(made: dict) -> str:
    return f"{made['estimator']}, {made['documents']} documents"


def _estimate(
    model: PackedLanguageModel,
    settings: EWC,
    batches: FisherBatches,
    strategy: str,
    stop: StopSignal,
    say: Say,
    first_new_row: int | None,
) -> Anchor | None:
    """A new Fisher diagonal, with the current weights as the reference. A collective. None after a signal."""
    started = time.perf_counter()
    error = (2 * settings.batch / len(batches.items)) ** 0.5
    say(
        f"EWC: estimating the Fisher diagonal ({settings.estimator}) from {len(batches.items)} documents in groups of "
        f"{settings.batch}; expected relative error {error:.0%}"
    )
    if settings.batch < stop.ranks.world_size:
        say(f"warning: ewc.batch={settings.batch} leaves some of the {stop.ranks.world_size} ranks idle")
    fisher = estimate_fisher(model, batches, settings.estimator, settings.seed, strategy, stop, say)
    if fisher is None:
        return None
    parameters = trained_parameters(model)
    if first_new_row is not None:
        for name in vocabulary_names(model) & fisher.keys():
            start = local_shard(parameters[name])[1]
            fisher[name][max(0, first_new_row - start) :] = 0.0
    reference = {name: local_shard(p)[0].clone() for name, p in parameters.items()}
    say(f"EWC: Fisher diagonal estimated in {time.perf_counter() - started:.1f} s")
    made = anchor_settings(settings, batches.source) | {"target_tokens": batches.num_targets}
    return Anchor(fisher, reference, made)
