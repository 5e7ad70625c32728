"""Mixtures of experts, beside what transformers computes: their names in files, and how their routers balance them.

The layers are transformers' own, and all experts of a layer are one product (`experts_implementation`: grouped_mm). A parameter
`(experts, rows, columns)` has the matrices of all of them. Only a model that has experts imports this file.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from data.batches import MicroBatch, StepBatch
from distributed.sharding import local_shard, sum_over_shards
from model.weight_files import StoredTensor

GROUPS = 4  # of consecutive layers, for the curves

# --- Files ------------------------------------------------------------------------------------------------------------


def names_of_experts(model_type: str, name: str, num_experts: int) -> list[str]:
    """The tensors of the files that are the parameter `name`: those of the first expert, of the second, and so on.

    The rows of an expert's tensors, one after the other, are its matrix. transformers has the names, by which it loads and saves
    the model. [] if the files of this type of model have the parameter as one tensor.
    """
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
        target = conversion.target_patterns[0]
        if operations[:1] == ["MergeModulelist"] and name.endswith(target):
            patterns, prefix = conversion.source_patterns, name.removesuffix(target)
            return [prefix + one.replace("*", str(expert)) for expert in range(num_experts) for one in patterns]
    return []


def read_experts(
    sources: Sequence[tuple[str, StoredTensor]], local: torch.Tensor, dimension: int, start: int, num_experts: int
) -> None:
    """Read this rank's part of all experts into `local` `(experts, rows, columns)`.

    sources: of all experts, as `names_of_experts` orders them. The part begins at `start` of `dimension`: 0, whole experts, or
    1, some rows of each.
    """
    of_each, files = len(sources) // num_experts, {}
    expert, row = (0, start) if dimension else (start, 0)
    for number, matrix in enumerate(local, expert):
        below = 0  # rows of the expert's tensors before this one
        for name, tensor in sources[number * of_each : (number + 1) * of_each]:
            begin, end = max(below, row), min(below + tensor.shape[0], row + len(matrix))
            if begin < end:
                rows = matrix[begin - row : end - row]
                files.setdefault(tensor.file, []).append((name, slice(begin - below, end - below), rows))
            below += tensor.shape[0]
    for file, wanted in files.items():
        with safe_open(file, framework="pt") as tensors:
            for name, part, rows in wanted:
                rows.copy_(tensors.get_slice(name)[part])


def as_stored(model_type: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter as the files of this type of model have it: itself, or views of it, one for each matrix of an expert."""
    names = names_of_experts(model_type, name, len(tensor)) if tensor.dim() == 3 else []
    if not names:
        return {name: tensor}
    return dict(zip(names, tensor.reshape(len(names), -1, tensor.shape[2]), strict=True))


# --- What is said of them --------------------------------------------------------------------------------------------


def sharing_warnings(model: nn.Module) -> list[str]:
    """A warning where more ranks share a sharded model than a layer has experts, and cannot cut each of them."""
    experts = [parameter for parameter in model.parameters() if parameter.dim() == 3 and isinstance(parameter, DTensor)]
    shapes = {(p.device_mesh.size(p.device_mesh.ndim - 1), len(p)) for p in experts if not local_shard(p)[1]}
    return [
        f"{ranks} ranks share the {experts} experts of a layer: some hold none, the others as much as with {experts} ranks, and every "
        f"rank gathers {ranks} experts, of which {ranks - experts} are empty; sharding.strategy=hybrid with a sharding.shard_size of at "
        f"most {experts} takes less memory and sends less"
        for ranks, experts in shapes
        if ranks > experts
    ]


def unseen_warnings(fisher: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> list[str]:
    """A warning about experts whose Fisher diagonal is zero, because their routers sent them no token. A collective.

    fisher: this rank's shards by name, as `estimate_fisher` returns them.
    """
    unseen, total = 0, 0
    for name, parameter in parameters.items():
        if name.endswith("experts.down_proj"):
            _, dimension, start = local_shard(parameter)
            seen, mine = fisher[name].new_zeros(len(parameter)), fisher[name].flatten(1).sum(dim=1)
            first = 0 if dimension else start
            seen[first : first + len(mine)] = mine
            unseen += int((sum_over_shards(seen, parameter) == 0).sum())
            total += len(parameter)
    if not unseen:
        return []
    return [
        f"warning: EWC: no token of its documents reached {unseen} of {total} experts, which are therefore not held; raise "
        "ewc.documents, or set ewc.estimator=l2"
    ]


# --- Balance ----------------------------------------------------------------------------------------------------------


def auxiliary_factor(asked: float | None, config: PretrainedConfig) -> float:
    """The factor of the auxiliary loss: `model.router_aux`, or that of the model's config if it switches the loss on."""
    if asked is not None:
        return asked
    return config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0


class Routers:
    """What the routers of a model choose in training, and the auxiliary loss that balances it.

    No token is dropped: an expert computes whatever it is sent. Tokens that fill up a micro-batch are not counted.
    """

    def __init__(self, model: nn.Module, asked: float | None, config: PretrainedConfig, device: torch.device) -> None:
        """asked: `model.router_aux`. The model may be sharded."""
        self.factor = auxiliary_factor(asked, config)
        named = {name: one for name, one in model.named_modules() if hasattr(one, "top_k") and hasattr(one, "weight")}
        self.routers: list[Any] = list(named.values())
        self.layers = [int(re.findall(r"\.layers\.(\d+)\.", name)[0]) for name in named]  # others have no experts
        self.num_experts: int = self.routers[0].num_experts
        self.window = torch.zeros(len(self.routers), self.num_experts, dtype=torch.int64, device=device)
        # Of each router in the last forward: (scores, the chosen experts), in several parts under model.mlp_tiles.
        self.seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.routers]
        self.is_recording = False
        for parts, router in zip(self.seen, self.routers, strict=True):
            router.register_forward_hook(functools.partial(self._record, parts))

    def _record(self, parts: list, router: nn.Module, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        # The second forward of activation checkpointing runs within backward, and shows the same again.
        if self.is_recording and torch._C._current_graph_task_id() == -1:
            scores, _, chosen = output
            parts.append((scores if self.factor else scores[:, :0], chosen))

    def start(self, step: StepBatch) -> None:
        """Begin a step over these documents."""
        self.is_recording = True
        self.num_tokens = sum(step.document_lengths)  # over all ranks and micro-batches
        self.counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.window.device)
        for parts in self.seen:
            parts.clear()  # a forward of a step that a signal ended

    def loss(self, batch: MicroBatch, is_last: bool) -> torch.Tensor | float:
        """The auxiliary loss of the forward that has just run; the sum over a step's micro-batches and ranks is the step's.

        It is factor x experts x sum over experts of (share of the tokens that chose it) x (mean probability), over all layers
        together as in transformers. Gradients pass through the probabilities only. The shares are those of all ranks and of the
        step's micro-batches up to this one (arXiv:2501.11873), so a micro-batch need not be balanced in itself. A collective
        with a factor above 0. is_last: of the step.
        """
        counted = batch.input_ids.shape[1] - batch.filling
        of_layers = []
        for layer, parts in enumerate(self.seen):
            chosen = torch.cat([one for _, one in parts])[:counted].flatten()
            self.window[layer].scatter_add_(0, chosen, torch.ones_like(chosen))
            if self.factor:
                self.counts[:-1].scatter_add_(0, chosen, torch.ones_like(chosen))
                scores = torch.cat([one for one, _ in parts])[:counted]
                of_layers.append(scores.float().softmax(dim=-1).sum(dim=0))
            parts.clear()
        self.is_recording = not is_last
        if not self.factor:
            return 0.0
        self.counts[-1] += counted
        so_far = self.counts.clone()
        dist.all_reduce(so_far)
        layers = len(self.routers)
        shares = so_far[:-1] / (so_far[-1] * layers).clamp(min=1)
        means = torch.stack(of_layers).sum(dim=0) / max(1, self.num_tokens * layers)
        return self.factor * self.num_experts * (shares * means).sum()

    def curves(self) -> dict[str, float]:
        """How loaded the experts were since the last call, of groups of layers. A collective.

        `router/largest_share`: the most tokens that one expert of a layer got, as a share of what was chosen; with E experts an
        even one is 1/E. `router/entropy`: of a layer's shares, as a share of log E, mean over the layers; 1 is even.
        """
        dist.all_reduce(self.window)
        window, layers = self.window.double().cpu(), len(self.routers)
        shares = window / window.sum(dim=1, keepdim=True).clamp(min=1)
        entropy = -torch.xlogy(shares, shares).sum(dim=1) / torch.tensor(float(self.num_experts)).log()
        self.window.zero_()
        found, size = {}, -(-layers // GROUPS)
        for first in range(0, layers, size):
            last = min(first + size, layers) - 1
            name = "-".join(f"{layer:02d}" for layer in dict.fromkeys((self.layers[first], self.layers[last])))
            found[f"router/largest_share/layers_{name}"] = shares[first : last + 1].max().item()
            found[f"router/entropy/layers_{name}"] = entropy[first : last + 1].mean().item()
        return found
