"""Support for mixtures of experts: reading and writing their tensors, and the auxiliary loss that balances routers.

transformers computes the layers, and multiplies with all experts of a layer at once (`experts_implementation`: grouped_mm). A
parameter `(experts, rows, columns)` contains the matrices of all experts of a layer. Only models with experts import this file.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from common.torch_private import private
from data.batches import MicroBatch, StepBatch
from distributed.sharding import local_shard, sum_over_shards
from model.weight_files import StoredTensor

current_graph_task_id = private("_C._current_graph_task_id")  # -1 outside of a backward
GROUPS = 4  # groups of consecutive layers, each with its own curves

# --- Files ------------------------------------------------------------------------------------------------------------


def names_of_experts(model_type: str, name: str, num_experts: int) -> list[str]:
    """Return the names of the stored tensors that make up the parameter `name`, expert by expert.

    An expert's tensors, stacked by rows, are its matrix. The names are those by which transformers loads and saves the model.
    Returns [] if files of this model type store the parameter as one tensor.
    """
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
        target = conversion.target_patterns[0]
        if operations[:1] == ["MergeModulelist"] and name.endswith(target):
            patterns, prefix = conversion.source_patterns, name.removesuffix(target)
            return [prefix + pattern.replace("*", str(expert)) for expert in range(num_experts) for pattern in patterns]
    return []


def read_experts(
    sources: Sequence[tuple[str, StoredTensor]], local: torch.Tensor, dimension: int, start: int, num_experts: int
) -> None:
    """Read this rank's part of an experts parameter from the files into `local` `(experts, rows, columns)`.

    `sources` lists the tensors of all experts in the order of `names_of_experts`. The part begins at index `start` of
    `dimension`: 0 if the rank has whole experts, 1 if it has some rows of every expert.
    """
    tensors_per_expert, reads_by_file = len(sources) // num_experts, {}
    first_expert, first_row = (0, start) if dimension else (start, 0)
    for expert, matrix in enumerate(local, first_expert):
        offset = 0  # row of the expert's matrix at which the tensor begins
        for name, tensor in sources[expert * tensors_per_expert : (expert + 1) * tensors_per_expert]:
            begin, end = max(offset, first_row), min(offset + tensor.shape[0], first_row + len(matrix))
            if begin < end:
                rows = matrix[begin - first_row : end - first_row]
                reads_by_file.setdefault(tensor.file, []).append((name, slice(begin - offset, end - offset), rows))
            offset += tensor.shape[0]
    for file, reads in reads_by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name, part, rows in reads:
                rows.copy_(tensors.get_slice(name)[part])


def as_stored(model_type: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter in the form of this model type's files: unchanged, or as one view for each stored expert tensor."""
    names = names_of_experts(model_type, name, len(tensor)) if tensor.dim() == 3 else []
    if not names:
        return {name: tensor}
    return dict(zip(names, tensor.reshape(len(names), -1, tensor.shape[2]), strict=True))


# --- EWC --------------------------------------------------------------------------------------------------------------


def unseen_warnings(fisher: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> list[str]:
    """Warn about experts whose Fisher diagonal is zero, because their routers sent them no token. A collective.

    `fisher` has this rank's shards by name, as `estimate_fisher` returns them.
    """
    unseen, total = 0, 0
    for name, parameter in parameters.items():
        if name.endswith("experts.down_proj"):
            _, dimension, start = local_shard(parameter)
            sums, local_sums = fisher[name].new_zeros(len(parameter)), fisher[name].flatten(1).sum(dim=1)
            first = 0 if dimension else start
            sums[first : first + len(local_sums)] = local_sums
            unseen += int((sum_over_shards(sums, parameter) == 0).sum())
            total += len(parameter)
    if not unseen:
        return []
    return [
        f"warning: EWC: no token of its documents reached {unseen} of {total} experts, which are therefore not held; raise "
        "ewc.documents, or set ewc.estimator=l2"
    ]


# --- Balance ----------------------------------------------------------------------------------------------------------


def auxiliary_factor(router_aux: float | None, config: PretrainedConfig) -> float:
    """Return the factor of the auxiliary loss: `model.router_aux`, or the coefficient in a model config that enables the loss."""
    if router_aux is not None:
        return router_aux
    return config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0


class Routers:
    """The auxiliary loss that balances the routers of a model, and counts of the experts that they chose.

    No token is dropped: an expert computes all tokens that it receives. Tokens that fill up a micro-batch are not counted.
    """

    def __init__(
        self, model: nn.Module, router_aux: float | None, config: PretrainedConfig, device: torch.device
    ) -> None:
        """Register a hook on every router of the model, which may be sharded. `router_aux` is the config key of that name."""
        self.factor = auxiliary_factor(router_aux, config)
        routers = {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, "top_k") and hasattr(module, "weight")
        }
        self.routers: list[Any] = list(routers.values())
        self.layers = [int(re.findall(r"\.layers\.(\d+)\.", name)[0]) for name in routers]  # only layers with experts
        self.num_experts: int = self.routers[0].num_experts
        self.window = torch.zeros(len(self.routers), self.num_experts, dtype=torch.int64, device=device)
        # For each router, (scores, chosen experts) of the last forward, in several parts under model.mlp_tiles.
        self.outputs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.routers]
        self.is_recording = False
        for parts, router in zip(self.outputs, self.routers, strict=True):
            router.register_forward_hook(functools.partial(self._record, parts))

    def _record(self, parts: list, router: nn.Module, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        # The second forward of activation checkpointing runs within backward and would be recorded twice.
        if self.is_recording and current_graph_task_id() == -1:
            scores, _, chosen = output
            parts.append((scores if self.factor else scores[:, :0], chosen))

    def start(self, step: StepBatch) -> None:
        """Begin to record a step."""
        self.is_recording = True
        self.num_tokens = sum(step.document_lengths)  # over all ranks and micro-batches
        self.counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.window.device)
        for parts in self.outputs:
            parts.clear()  # left over from a step that a signal ended

    def loss(self, batch: MicroBatch, is_last: bool) -> torch.Tensor | float:
        """Return the auxiliary loss of the last forward. Summed over micro-batches and ranks it is the auxiliary loss of the step.

        It is factor x experts x sum over experts of (fraction of the tokens that chose the expert) x (mean probability), over
        all layers together as in transformers. Gradients pass through the probabilities only. The fractions are taken over all
        ranks and over the step's micro-batches so far (arXiv:2501.11873), so a single micro-batch need not be balanced.
        A collective if the factor is above 0. `is_last` marks the last micro-batch of the step.
        """
        num_counted = batch.input_ids.shape[1] - batch.filling
        probability_sums = []  # one `(experts,)` per layer
        for layer, parts in enumerate(self.outputs):
            chosen = torch.cat([experts for _, experts in parts])[:num_counted].flatten()
            self.window[layer].scatter_add_(0, chosen, torch.ones_like(chosen))
            if self.factor:
                self.counts[:-1].scatter_add_(0, chosen, torch.ones_like(chosen))
                scores = torch.cat([scores for scores, _ in parts])[:num_counted]
                probability_sums.append(scores.float().softmax(dim=-1).sum(dim=0))
            parts.clear()
        self.is_recording = not is_last
        if not self.factor:
            return 0.0
        self.counts[-1] += num_counted
        counts = self.counts.clone()
        dist.all_reduce(counts)
        layers = len(self.routers)
        fractions = counts[:-1] / (counts[-1] * layers).clamp(min=1)
        means = torch.stack(probability_sums).sum(dim=0) / max(1, self.num_tokens * layers)
        return self.factor * self.num_experts * (fractions * means).sum()

    def curves(self) -> dict[str, float]:
        """Return curves of the experts' load since the last call, for groups of layers. A collective.

        `router/largest_share` is the largest fraction of a layer's choices that went to a single expert; for an even load of E
        experts it is 1/E. `router/entropy` is the entropy of a layer's load divided by log E, averaged over the layers of the
        group; for an even load it is 1.
        """
        dist.all_reduce(self.window)
        window, layers = self.window.double().cpu(), len(self.routers)
        shares = window / window.sum(dim=1, keepdim=True).clamp(min=1)
        entropy = -torch.xlogy(shares, shares).sum(dim=1) / torch.tensor(float(self.num_experts)).log()
        self.window.zero_()
        row, size = {}, -(-layers // GROUPS)
        for first in range(0, layers, size):
            last = min(first + size, layers) - 1
            name = "-".join(f"{layer:02d}" for layer in dict.fromkeys((self.layers[first], self.layers[last])))
            row[f"router/largest_share/layers_{name}"] = shares[first : last + 1].max().item()
            row[f"router/entropy/layers_{name}"] = entropy[first : last + 1].mean().item()
        return row
