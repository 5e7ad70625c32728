"""Support for mixtures of experts: the auxiliary loss that balances routers, and counts of the experts that they chose.

transformers computes the layers, and multiplies with all experts of a layer at once (`experts_implementation`: grouped_mm). A
parameter `(experts, rows, columns)` contains the matrices of all experts of a layer. Only models with experts import this file.
"""

import functools
import inspect
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

from common.errors import UserError
from common.torch_private import private
from data.batches import MicroBatch, StepBatch
from distributed.sharding import local_shard, sum_over_shards

CHOICES = ("top_k_index", "router_indices")  # transformers' names of the input with each token's experts
current_graph_task_id = private("_C._current_graph_task_id")  # -1 outside of a backward
GROUPS = 4  # groups of consecutive layers, each with its own curves

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


def _takes_choices(module: nn.Module) -> bool:
    """Return whether the module multiplies tokens with the experts that a router has chosen for them (not Llama 4's)."""
    return hasattr(module, "num_experts") and list(inspect.signature(module.forward).parameters)[1:2] in [
        [n] for n in CHOICES
    ]


def _routers(modules: dict[str, nn.Module]) -> tuple[list[nn.Module], int]:
    """Return the modules from which transformers takes `router_logits`, and the index of these scores in their output."""
    for module in modules.values():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        if kind := getattr(recorder, "target_class", recorder):
            return [router for router in modules.values() if isinstance(router, kind)], getattr(recorder, "index", 0)
    return [], 0


class Routers:
    """The auxiliary loss that balances the routers of a model, and counts of the experts that they chose.

    No token is dropped: an expert computes all tokens that it receives. Tokens that fill up a micro-batch are not counted.
    """

    def __init__(
        self, model: nn.Module, router_aux: float | None, config: PretrainedConfig, device: torch.device
    ) -> None:
        """Register a hook on the experts and the router of every layer of the model, which may be sharded.

        `router_aux` is the config key of that name. Raises UserError if it is above 0 and the model's routers give no scores.
        """
        self.factor = auxiliary_factor(router_aux, config)
        modules = dict(model.named_modules())
        experts: dict[str, Any] = {name: module for name, module in modules.items() if _takes_choices(module)}
        self.layers = [int(re.findall(r"\.(\d+)\.", name)[0]) for name in experts]  # only layers with experts
        self.num_experts = max((module.num_experts for module in experts.values()), default=0)
        self.window = torch.zeros(len(experts), self.num_experts, dtype=torch.int64, device=device)
        # Of the last forward, a list for each layer; in several parts under model.mlp_tiles, or one document at a time.
        self.chosen: list[list[torch.Tensor]] = [[] for _ in experts]  # `(tokens, experts per token)`
        self.scores: list[list[torch.Tensor]] = [[] for _ in experts]  # `(tokens, experts)`
        self.is_recording = False
        for parts, module in zip(self.chosen, experts.values(), strict=True):
            module.register_forward_pre_hook(functools.partial(self._record_choices, parts), with_kwargs=True)
        if self.factor:
            routers, index = _routers(modules)
            if len(routers) != len(experts) or not experts:
                raise UserError(
                    f"model.router_aux={self.factor}: the routers of {config.model_type} give no scores that it could balance; set it to 0"
                )
            for parts, module in zip(self.scores, routers, strict=True):
                module.register_forward_hook(functools.partial(self._record_scores, parts, index))

    def _record_choices(self, parts: list, experts: nn.Module, inputs: tuple, options: dict) -> None:
        if self._records():
            parts.append(inputs[1] if len(inputs) > 1 else next(options[name] for name in CHOICES if name in options))

    def _record_scores(self, parts: list, index: int, router: nn.Module, inputs: tuple, output: Any) -> None:
        if self._records():
            parts.append(output[index] if isinstance(output, tuple) else output)

    def _records(self) -> bool:
        """Return False in the second forward of activation checkpointing, which runs within backward."""
        return self.is_recording and current_graph_task_id() == -1

    def start(self, step: StepBatch) -> None:
        """Begin to record a step."""
        self.is_recording = True
        self.num_tokens = sum(step.document_lengths)  # over all ranks and micro-batches
        self.counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=self.window.device)
        for parts in (*self.chosen, *self.scores):
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
        for layer, (choices, parts) in enumerate(zip(self.chosen, self.scores, strict=True)):
            chosen = torch.cat(choices)[:num_counted].flatten()
            self.window[layer].scatter_add_(0, chosen, torch.ones_like(chosen))
            if self.factor:
                self.counts[:-1].scatter_add_(0, chosen, torch.ones_like(chosen))
                scores = torch.cat([part.reshape(-1, self.num_experts) for part in parts])[:num_counted]
                probability_sums.append(scores.float().softmax(dim=-1).sum(dim=0))
            choices.clear()
            parts.clear()
        self.is_recording = not is_last
        if not self.factor:
            return 0.0
        self.counts[-1] += num_counted
        counts = self.counts.clone()
        dist.all_reduce(counts)
        layers = len(self.chosen)
        fractions = counts[:-1] / (counts[-1] * layers).clamp(min=1)
        means = torch.stack(probability_sums).sum(dim=0) / max(1, self.num_tokens * layers)
        return self.factor * self.num_experts * (fractions * means).sum()

    def curves(self) -> dict[str, float]:
        """Return curves of the experts' load since the last call, for groups of layers. A collective.

        `router/largest_share` is the largest fraction of a layer's choices that went to a single expert; for an even load of E
        experts it is 1/E. `router/entropy` is the entropy of a layer's load divided by log E, averaged over the layers of the
        group; for an even load it is 1.
        """
        if not self.chosen:  # Llama 4 weights all experts of its layers, and none counts choices
            return {}
        dist.all_reduce(self.window)
        window, layers = self.window.double().cpu(), len(self.chosen)
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
