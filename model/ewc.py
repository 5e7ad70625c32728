"""Elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796) on sharded parameters. docs/forgetting.md

    penalty(theta) = lambda / 2 * sum_i F_i (theta_i - theta_ref_i)^2

F is the Fisher diagonal per target token of the old domain, and theta_ref are the weights at the start of the run. Both losses
are means over target tokens, so `ewc.strength` (lambda) is the exchange rate between them: one nat per target token of the old
domain costs as much as lambda nats per target token of the new domain. The gradient, lambda * F * (theta - theta_ref), is
elementwise and needs no communication.

Per target token, with N target tokens in all documents d:

    F = 1/N sum_d sum_t E_{y ~ p(. | x_<t)} (d log p(y | x_<t) / d theta)^2

If target tokens have weights (data/encoding.py), the score of a token of weight w is multiplied by sqrt(w), and N is the sum of
the weights. With `ewc.estimator=l2` F is 1 everywhere, which is L2 regularisation towards the starting weights.

F is the Fisher information: the second derivative of KL(p_0 || p_theta) at theta_0, which does not depend on the data's labels.
The labels are sampled from the model. Every score then has mean zero given its context, so the cross terms of two documents vanish
on average in the square of a group's summed gradient, and no backward per document is needed. The square of one group is unbiased,
with a relative error of about sqrt(2); with n documents in groups of b the relative error is about sqrt(2 b / n).

runs/NAME/ewc has the diagonal and the reference as fisher-*.safetensors and reference-*.safetensors (whole tensors by their
Hugging Face names, so that any number of ranks can read its slices), and settings.json with the settings of the estimate.
"""

import functools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from common.durable_files import publish, start_directory
from common.errors import UserError
from common.random_bits import hash64_tensor, permuted, sample_labels
from configs.config import EWC
from data.batches import MicroBatch, collate
from data.dealing import Dealer
from data.examples import Documents
from data.sources import Windows
from distributed.export import files_of, write_file
from distributed.gradients import gradient_of
from distributed.low_memory import CHUNK
from distributed.process_group import Ranks, StopSignal, agree_any, call_on_all, read_on_first
from distributed.rounding import Noise, stochastic_round_
from distributed.sharding import before_micro_batch, flat_parts, local, local_shard, reshard, sum_over_shards, whole
from model.architectures import has_experts
from model.dtypes import DTYPES
from model.language_model import PackedLanguageModel, trained_parameters, vocabulary_names
from model.loss import TokenLosses, chunked, negative_log_likelihood

REPORT_EVERY = 30.0  # seconds
DOCUMENT_BITS = 20  # bits of a document's number within its item; a window has at most as many documents as tokens

Say = Callable[[str], None]


# --- The Fisher diagonal ----------------------------------------------------------------------------------------------


def drawn_items(source: Documents | Windows, settings: EWC) -> tuple[int, ...]:
    """Draw `settings.documents` items with targets from `source`, without replacement. Return all such items if it has fewer."""
    usable = source.items_with_targets()
    count = min(settings.documents, len(usable))
    return tuple(int(usable[permuted(i, len(usable), (settings.seed,))]) for i in range(count))


def document_numbers(items: Sequence[int], source: Documents | Windows) -> torch.Tensor:
    """Return the number of each document of a micro-batch in the whole source, int64 `(documents,)`."""
    numbers = [(item << DOCUMENT_BITS) + i for item in items for i in range(len(source.document_lengths(item)))]
    return torch.tensor(numbers or [0])


def draw(batch: MicroBatch, documents: torch.Tensor, seed: int) -> tuple[MicroBatch, TokenLosses]:
    """Return the micro-batch and the loss function whose gradient is squared: pure functions of (seed, document, position).

    `documents` are the `document_numbers` of the micro-batch. The loss is -log p of labels sampled from the model's own
    distribution: the returned micro-batch has hash keys in place of target ids, and each key determines a sample. Gradients are
    squared, so a target of weight w gets the factor sqrt(w) and counts like w targets.
    """
    targets = batch.target_positions
    document = documents[torch.searchsorted(batch.cu_seq_lens[1:].contiguous(), targets.int(), right=True)]
    factors = None if batch.target_weights is None else batch.target_weights.sqrt()

    def loss_of_sampled_labels(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return negative_log_likelihood(logits, sample_labels(logits.detach(), keys))

    keys = hash64_tensor(seed, document, batch.position_ids[0, targets])
    return replace(batch, target_ids=keys, target_weights=factors), loss_of_sampled_labels


def estimate_fisher(
    model: PackedLanguageModel,
    source: Documents | Windows,
    settings: EWC,
    dealer: Dealer,
    strategy: str,
    stop: StopSignal,
    say: Say = lambda text: None,
) -> dict[str, torch.Tensor] | None:
    """Return the local shard of the Fisher diagonal of each trained parameter, fp32, per target token. A collective.

    Its unit is 1 / (unit of the parameter)^2. The gradients of `settings.batch` items are added before they are squared, and
    these groups depend neither on the number of ranks nor on the packing. Returns None after a signal. Raises UserError if the
    result is not finite.
    """
    reshard(model)  # after an evaluation under grad_op the model's parameters are not shards
    ranks, items, size = stop.ranks, drawn_items(source, settings), settings.batch
    started = reported = time.perf_counter()
    say(
        f"EWC: estimating the Fisher diagonal from {len(items)} documents in groups of {size}; "
        f"expected relative error {(2 * size / len(items)) ** 0.5:.0%}"
    )
    if size * dealer.context < ranks.world_size:
        say(f"warning: ewc.batch={size} leaves some of the {ranks.world_size} ranks idle")
    parameters = trained_parameters(model)
    sums = {n: torch.zeros_like(local(p), dtype=torch.float32) for n, p in parameters.items()}
    for first in range(0, len(items), size):
        deal = dealer.deal(items[first : first + size], source, ranks.world_size)
        dealt = deal.of_rank(ranks.rank)
        for number, mine in enumerate(dealt, 1):  # the same number on every rank
            if stop.agreed():
                for parameter in parameters.values():
                    parameter.grad = None
                reshard(model)
                return None
            before_micro_batch(model, strategy, number == len(dealt))
            batch, documents = collate(mine, source).to(ranks.device), document_numbers(mine, source).to(ranks.device)
            drawn, token_losses = draw(batch, documents, settings.seed)
            drawn = deal.part_of_rank(drawn, ranks.rank)
            chunked(model.head, model(drawn), drawn, token_losses).backward()
        for name, parameter in parameters.items():
            gradient = local(gradient_of(parameter)).float()
            sums[name].addcmul_(gradient, gradient)
            parameter.grad = None
        now, done = time.perf_counter(), first + size
        if now - reported > REPORT_EVERY:
            reported, left = now, (now - started) / done * (len(items) - done)
            say(f"EWC: Fisher diagonal, document {done} of {len(items)}, {left / 60:.1f} min left")
    bad = not all(bool(torch.isfinite(total).all()) for total in sums.values())
    if agree_any(bad, ranks):
        raise UserError("the Fisher diagonal is not finite: check the data of ewc.data, or compute in fp32")
    num_targets = math.fsum(source.num_targets(item) for item in items)  # with weights, their sum
    for total in sums.values():
        total.div_(num_targets)
    say(f"EWC: Fisher diagonal estimated in {time.perf_counter() - started:.1f} s")
    return sums


# --- Diagonal and reference, in memory and on disk --------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """The Fisher diagonal and the reference weights, as local shards by parameter name."""

    fisher: dict[str, torch.Tensor]
    reference: dict[str, torch.Tensor]
    settings: dict  # settings of the estimate (estimator, number of documents, ...), plain JSON

    @property
    def summary(self) -> str:
        """The estimator and the number of documents, for messages."""
        return f"{self.settings['estimator']}, {self.settings.get('documents', 0)} documents"


def in_dtype(anchor: Anchor, dtype: torch.dtype, ranks: Ranks) -> Anchor:
    """Return the anchor with the diagonal in `dtype`, and with each reference tensor in `dtype` if this is exact. A collective.

    bf16 has the range of fp32, so no element of the diagonal underflows.
    """
    # All ranks must take the same decision for a tensor, because its shards have one dtype.
    inexact = torch.tensor([not torch.equal(r, r.to(dtype).to(r.dtype)) for r in anchor.reference.values()]).int()
    dist.all_reduce(inexact, op=dist.ReduceOp.MAX, group=ranks.flags)
    reference = {
        name: shard if kept else shard.to(dtype)
        for (name, shard), kept in zip(anchor.reference.items(), inexact.tolist(), strict=True)
    }
    return Anchor({name: shard.to(dtype) for name, shard in anchor.fisher.items()}, reference, anchor.settings)


def save_anchor(
    directory: Path,
    anchor: Anchor,
    parameters: dict[str, nn.Parameter],
    ranks: Ranks,
    max_file_bytes: int = 5 * 2**30,
) -> None:
    """Write `directory` completely or not at all. A collective: all ranks gather each tensor, and rank 0 writes.

    Raises UserError on all ranks if the directory cannot be written.
    """
    temporary = read_on_first(lambda: start_directory(directory), ranks)
    for kind, shards in (("fisher", anchor.fisher), ("reference", anchor.reference)):
        sizes = {name: parameters[name].numel() * shard.element_size() for name, shard in shards.items()}
        for number, names in enumerate(files_of(sizes, max_file_bytes).values(), 1):
            tensors = {}
            for name in names:
                tensor, like = shards[name], parameters[name]
                if isinstance(like, DTensor):
                    mesh, shape = like.device_mesh, {"shape": like.shape, "stride": like.stride()}
                    tensor = tensor.to(mesh.device_type)
                    tensor = whole(DTensor.from_local(tensor, mesh, like.placements, run_check=False, **shape))
                if ranks.rank == 0:
                    tensors[name] = tensor.cpu().contiguous()
            path = temporary / f"{kind}-{number:05d}.safetensors"
            read_on_first(functools.partial(write_file, tensors, path), ranks)

    def complete() -> None:
        (temporary / "settings.json").write_text(json.dumps({"made": anchor.settings}, indent=1), encoding="utf-8")
        publish(directory)

    read_on_first(complete, ranks)


def load_anchor(directory: Path, parameters: dict[str, nn.Parameter], vocabulary: frozenset[str]) -> Anchor:
    """Load this rank's slices of a saved anchor. Any number of ranks may have saved it.

    `vocabulary` names the parameters that may have more rows than the files (rows of new tokens). In the additional rows the
    Fisher diagonal is zero and the reference is the parameter's current value. Raises UserError if the files do not match
    the model.
    """
    try:
        record = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"settings.json: {error}; ewc.fisher names runs/NAME/ewc of a run"
        raise UserError(f"{directory} has no saved Fisher diagonal: {reason}") from error
    anchor = Anchor({}, {}, record["made"])  # "made": the settings of the estimate
    for kind, shards in (("fisher", anchor.fisher), ("reference", anchor.reference)):
        for file in sorted(directory.glob(f"{kind}-*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    stored = set(tensors.keys())
                    for name in [name for name in parameters if name in stored]:  # in the same order on every rank
                        part = tensors.get_slice(name), parameters[name], name in vocabulary, kind == "fisher"
                        shards[name] = _rows(*part, f"{file}: {name}")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file} is damaged ({error}); copy it again, or name another ewc.fisher") from error
        for name in [name for name in parameters if name not in shards]:
            raise UserError(f"{directory} has no {kind} of {name}: it belongs to another model")
    return anchor


def _rows(stored: Any, parameter: nn.Parameter, may_have_grown: bool, is_fisher: bool, where: str) -> torch.Tensor:
    """Return this rank's part of `stored`, a slice of safetensors. Raises UserError if its shape does not match `parameter`."""
    shard, dimension, start = local_shard(parameter)
    shape, expected = tuple(stored.get_shape()), tuple(parameter.shape)
    grown = may_have_grown and shape[1:] == expected[1:] and shape[0] < expected[0]
    if shape != expected and not grown:
        raise UserError(f"{where} has shape {shape}, but the model has {expected}; it belongs to another model")
    if not shard.dim():
        return stored[...].to(shard.device)
    if dimension:  # the shard has some rows of every expert
        return stored[:, start : start + shard.shape[1]].contiguous().to(shard.device)
    known = stored[min(start, shape[0]) : min(start + shard.shape[0], shape[0])].to(shard.device)
    new = shard[known.shape[0] :].to(known.dtype)
    return torch.cat([known, torch.zeros_like(new) if is_fisher else new]) if len(new) else known


# --- The penalty ------------------------------------------------------------------------------------------------------


class Penalty:
    """The penalty that pulls a model's local shards towards an anchor."""

    def __init__(
        self,
        strength: float,
        parameters: dict[str, nn.Parameter],
        anchor: Anchor,
        device: str = "device",
        seed: int = 0,
    ) -> None:
        """Keep the anchor on the device of the parameters, or in pinned host memory if `device` is `cpu`.

        `strength` is lambda. `parameters` are the shards by name, tied ones once; they stay the shards while modules hold
        gathered tensors. `seed` selects the noise that rounds bf16 gradients.
        """
        self.strength, self.parameters, self.anchor, self.seed = strength, parameters, anchor, seed
        at = local(next(iter(parameters.values()))).device
        if device == "cpu" and at.type != "cpu":
            fisher, reference = (
                {n: t.cpu().pin_memory() for n, t in shards.items()} for shards in (anchor.fisher, anchor.reference)
            )
            self.anchor = replace(anchor, fisher=fisher, reference=reference)
        # layers.00, layers.01, ..., and one group for each parameter outside of the layers
        self.groups = tuple(dict.fromkeys(group_of(name) for name in parameters))
        # For each group, at the last measured step: sum of F d^2, sum of squared gradients, sum of d^2, where d is the drift.
        self.sums = torch.zeros(len(self.groups), 3, dtype=torch.float64, device=at)

    @torch.no_grad()
    def add_gradient(self, step: int, measure: bool = True) -> None:
        """Add lambda * F * (theta - theta_ref) to this rank's gradients. No communication.

        Call it once per step, after the last backward and before the gradient norm. `step` (0-based) selects the noise that
        rounds a bf16 gradient stochastically; rounding to nearest would lose everything below half of its last bit in every
        step. With `measure`, compute the values for `curves` at the current weights.
        """
        if measure:
            self.sums.zero_()
        noise = Noise(self.seed, step, self.sums.device)
        for index, (name, parameter) in enumerate(self.parameters.items()):
            weight, gradient = local(parameter).view(-1), local(gradient_of(parameter)).view(-1)
            fisher, reference = self.anchor.fisher[name].view(-1), self.anchor.reference[name].view(-1)
            stream = -1 - index  # the optimizer's streams are 0 and above
            sums = self.sums[self.groups.index(group_of(name))]
            size = CHUNK["cuda" if weight.is_cuda else "cpu"]
            for part, first in flat_parts(parameter, size):
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
                    gradient[part].copy_(stochastic_round_(pull, noise, stream, first))

    def curves(self) -> dict[str, float]:
        """Return curves at the weights of the last measured `add_gradient`, in total and by layer. A collective.

        `ewc/penalty` is in nats per target token, `ewc/grad_norm` is the norm of the penalty's gradient, and `ewc/drift` is the
        Euclidean distance from the reference.
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
        return row

    def num_bytes(self) -> int:
        """Return the bytes that the Fisher diagonal and the reference take on this rank."""
        return sum(t.nbytes for shards in (self.anchor.fisher, self.anchor.reference) for t in shards.values())

    def line(self) -> str:
        """Return a line with lambda and the memory of the anchor, for the run's log."""
        fisher = list(self.anchor.fisher.values())
        per_parameter = self.num_bytes() / max(1, sum(t.numel() for t in fisher))
        return (
            f"EWC: lambda {self.strength:g}; Fisher diagonal and reference take {self.num_bytes() / 2**20:,.1f} MiB on each "
            f"rank ({per_parameter:.2f} bytes per parameter) on {fisher[0].device}"
        )


def group_of(name: str) -> str:
    """Return the curve that a parameter counts in: `layers.07` for model.layers.7.mlp.up_proj.weight, `norm` for model.norm."""
    layer = re.match(r"(?:.*\.)?(\w+)\.(\d+)\.", name)
    if layer:
        return f"{layer[1]}.{int(layer[2]):02d}"
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


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
    """Return the penalty of a run. Call it on all ranks while the model has its initial weights, before the optimizer is made.

    An anchor in `directory` (runs/NAME/ewc) is loaded. Without it, the anchor at `settings.fisher` is reused, or a new anchor
    is estimated from documents of `old_domain`; it is then saved to `directory`. The rows of embedding and head from
    `first_new_row` on belong to new tokens, whose Fisher diagonal is zero. Returns None if a signal came during the estimate.
    Raises UserError if the saved anchor has other settings or belongs to another model.
    """
    reshard(model)
    ranks, parameters, vocabulary = stop.ranks, trained_parameters(model), vocabulary_names(model)
    expected = anchor_settings(settings, old_domain)
    if read_on_first(directory.is_dir, ranks):
        anchor = call_on_all(lambda: load_anchor(directory, parameters, vocabulary), ranks)
        _check_saved(directory, anchor, expected, parameters, ranks)
        say(f"EWC: Fisher diagonal ({anchor.summary}) read from {directory}")
    else:
        if settings.fisher:
            folder = Path(settings.fisher)
            anchor = call_on_all(lambda: load_anchor(folder, parameters, vocabulary), ranks)
            anchor = replace(anchor, settings=anchor.settings | expected)
            say(f"EWC: Fisher diagonal ({anchor.summary}) and reference reused from {settings.fisher}")
        else:
            if old_domain is None:  # l2
                fisher = {n: torch.ones_like(local(p), dtype=torch.float32) for n, p in parameters.items()}
            else:
                fisher = estimate_fisher(model, old_domain, settings, dealer, strategy, stop, say)
            if fisher is None:
                return None
            if old_domain is not None and has_experts(model.causal_lm.config):
                from model.experts import unseen_warnings

                for line in unseen_warnings(fisher, parameters):
                    say(line)
            anchor = Anchor(fisher, {name: local(p).clone() for name, p in parameters.items()}, expected)
        if first_new_row is not None:  # the anchor may have unused rows of a padded base in the place of the new rows
            for name in vocabulary & anchor.fisher.keys():
                new = slice(max(0, first_new_row - local_shard(parameters[name])[2]), None)
                anchor.fisher[name][new] = 0.0
                anchor.reference[name][new] = local(parameters[name])[new].to(anchor.reference[name].dtype)
        anchor = in_dtype(anchor, DTYPES[settings.dtype], ranks)
        save_anchor(directory, anchor, parameters, ranks)
        say(f"EWC: Fisher diagonal and reference saved to {directory}")
    penalty = Penalty(settings.strength, parameters, anchor, settings.device, settings.seed)
    say(penalty.line())
    return penalty


def anchor_settings(settings: EWC, old_domain: Documents | Windows | None) -> dict:
    """Return the settings that determine a run's anchor, as plain JSON. Runs with equal values have the same anchor.

    `old_domain` is the source of ewc.data. It is None with ewc.fisher and with the estimator l2.
    """
    if settings.fisher:
        return {"fisher": settings.fisher, "dtype": settings.dtype}
    if old_domain is None:
        return {"fisher": None, "estimator": settings.estimator, "dtype": settings.dtype}
    chosen = {key: getattr(settings, key) for key in ("estimator", "batch", "seed", "dtype")}
    documents = len(drawn_items(old_domain, settings))  # fewer than ewc.documents if the source has fewer
    return {"fisher": None, "documents": documents, **chosen, "data": old_domain.fingerprint}


def _check_saved(
    directory: Path, anchor: Anchor, expected: dict, parameters: dict[str, nn.Parameter], ranks: Ranks
) -> None:
    """Raise UserError if a saved anchor has other settings, or other reference weights than this run's. A collective."""
    for key, value in expected.items():
        if anchor.settings.get(key) != value:
            raise UserError(
                f"{directory} was made with ewc.{key}={anchor.settings.get(key)}, now it is {value}; set it back, remove the "
                "directory or choose another run.name"
            )
    same = all(torch.equal(anchor.reference[n].to(p.dtype), local(p)) for n, p in parameters.items())
    if anchor.settings["fisher"] is None and agree_any(not same, ranks):
        raise UserError(f"{directory} has the weights of another model than model.path; choose another run.name")
