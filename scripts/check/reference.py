"""The reference of step 1: transformers' own model on each document alone, with the loss of the run's train.py.

It uses no code of the packed path. It is computed in fp32 and in bf16: their distance is the rounding error of this model on these
documents, and all tolerances are multiples of this error.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from common.errors import UserError
from distributed.host_memory import free_bytes
from distributed.optimizer import parameter_dtype
from model.architectures import has_experts
from model.dtypes import DTYPES
from model.lora import add_adapters, init_adapters
from model.text_part import load_causal_lm
from scripts.check.data import RunInputs
from training.quick_check import EPS, ROUNDINGS

USABLE = 0.8  # of the free memory
EAGER_TOKENS = 4096  # in longer documents attention is computed by SDPA
RECOMPUTED_TOKENS = 512  # in longer documents layers are computed again in backward
SAMPLED = 2**22  # elements of the gradient that are kept
REFERENCE = "reference.safetensors"


class Document(NamedTuple):
    """A document of the first step. ids, weights: `(tokens,)`; weights[t] is the factor of the loss of token t."""

    ids: np.ndarray
    weights: np.ndarray


def allowed_error(exact: list[np.ndarray], rounded: list[np.ndarray], targets: float, eps: float) -> float:
    """Return how far rounding may move the mean loss of a step, in nats per target.

    exact, rounded: the losses of each document in fp32 and in bf16, `(targets,)`. targets: the sum of their weights. eps: of the
    compute dtype. The error has a constant part and a part that averages out, both measured as bf16 against fp32. An fp32 run
    rounds 2^16 times finer, but sums in another order; 1e-5 of the loss allows for that.
    """
    errors = [x - y for x, y in zip(rounded, exact, strict=True) if len(x)]
    each = np.concatenate(errors)
    of_documents = [error.sum() ** 2 / len(error) for error in errors]  # errors within a document are correlated
    falling = math.sqrt(max((each**2).mean(), np.mean(of_documents)))
    measured = float(abs(each.mean()) + falling / math.sqrt(max(1.0, targets)))
    mean = sum(map(np.sum, exact)) / (targets or 1.0)
    return ROUNDINGS * eps / EPS[torch.bfloat16] * measured + 1e-5 * (1 + abs(float(mean)))


@dataclass(frozen=True)
class Reference:
    """The loss and gradient of step 1, with which the run's own first step is compared.

    gradient: of (sum of losses / sum of weights of the whole step), some elements of each tensor. rounding: how far the run's
    compute dtype may move each element. Both are `(elements,)`, on the CPU.
    """

    loss: float  # nats per target
    loss_allowed: float  # how far rounding may move it
    grad_norm: float
    eps: float  # of the compute dtype
    tensors: dict[str, tuple[int, int]]  # name -> (elements of the tensor, stride between the kept ones)
    gradient: torch.Tensor
    rounding: torch.Tensor

    def save(self, path: Path) -> None:
        """Write the reference to one file."""
        tensors = {"gradient": self.gradient, "rounding": self.rounding}
        values = {key: value for key, value in vars(self).items() if key not in tensors}
        save_file(tensors, path, {"values": json.dumps(values)})

    @classmethod
    def load(cls, path: Path) -> "Reference | None":
        """Read a reference that `save` wrote, in fp64. Return None if there is no such file."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).double() for key in ("gradient", "rounding")}
            return cls(**json.loads(file.metadata()["values"]), **tensors)

    def norm_rounding(self) -> float:
        """Return how far rounding may move the norm, relative to it: as measured, and a little more, as it is one random number."""
        length = self.gradient.norm()
        along, across = abs(self.rounding @ self.gradient) / length**2, self.rounding.norm() / length
        return float(ROUNDINGS * (along + across**2)) + self.eps / 4


def load_reference(run: RunInputs, longest: int) -> PreTrainedModel:
    """Load the run's weights into transformers' own model in fp32. longest: tokens of the longest document.

    Raise MemoryError if there is no room for the model and its gradient, and UserError if transformers cannot load it.
    """
    path, lora = run.config.model.path, run.config.lora
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(run.model_config).parameters())
    # A document's logits and one layer's scores in fp32, four of each: forward, backward and temporaries.
    scores = getattr(run.model_config, "num_attention_heads", 0) * longest**2 if longest <= EAGER_TOKENS else 0
    if 8 * count + 16 * (longest * run.model_config.vocab_size + scores) > USABLE * free_bytes(run.device, 1):
        raise MemoryError
    only_eager = getattr(run.model_config, "attn_logit_softcapping", None) or run.model_config.model_type == "gpt_oss"
    attention = "eager" if longest <= EAGER_TOKENS or only_eager else "sdpa"
    # Not the kernel of the run, whose gradient is checked.
    experts = {"experts_implementation": "eager"} if has_experts(run.model_config) else {}
    config = copy.copy(run.model_config)
    if quantised := getattr(AutoConfig.from_pretrained(path), "quantization_config", None):
        config.quantization_config = quantised | {"dequantize": True}
    try:
        model = load_causal_lm(path, config=config, dtype=torch.float32, attn_implementation=attention, **experts)
    except (OSError, ValueError, ImportError) as error:  # FP8 needs accelerate
        raise UserError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from error
    if lora.rank:
        add_adapters(model, lora, path)
        init_adapters(dict(model.named_parameters()), run.config.run.seed)
        head: Any = model.get_output_embeddings()
        if rows := getattr(head, "token_adapter", None):  # of new tokens, which are the last rows

            def with_new_rows(_: nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
                return torch.cat([logits[..., : rows.first], inputs[0] @ rows.trainable_tokens_delta.T], dim=-1)

            head.register_forward_hook(with_new_rows)
    model = cast(PreTrainedModel, nn.Module.to(model, run.device)).train()
    with torch.no_grad():  # round the weights to the dtype in which the run keeps them
        for parameter in model.parameters():
            frozen = lora.rank and not parameter.requires_grad
            kept = DTYPES[run.config.model.compute_dtype] if frozen else parameter_dtype(run.config.optimizer.memory)
            parameter.copy_(parameter.to(kept))
    if longest > RECOMPUTED_TOKENS:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def documents_of_step(run: RunInputs) -> list[Document]:
    """Return the documents of step 1 in the order of its micro-batches. A window of a token store has several."""
    documents = []
    for item in (item for micro_batch in run.inputs.deal(0).items for items in micro_batch for item in items):
        ids, weights = run.inputs.train.get(item)
        ends = np.cumsum(run.inputs.train.document_lengths(item))[:-1]
        parts = zip(np.split(ids, ends), np.split(weights, ends), strict=True)
        documents += [Document(part, factors) for part, factors in parts]
    return documents


def compute_reference(run: RunInputs) -> Reference:
    """Compute losses and gradients of step 1's documents one by one in transformers' model, in fp32 and then in bf16.

    Raise MemoryError and UserError as `load_reference` does.
    """
    documents = documents_of_step(run)
    model = load_reference(run, max(len(document.ids) for document in documents))
    # The gradient of LoRA's A is zero as long as B is.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name}
    elements = max(1, SAMPLED // len(trained))
    tensors = {name: (p.numel(), -(-p.numel() // elements)) for name, p in trained.items()}
    divisor = float(sum(document.weights.sum(dtype=np.float64) for document in documents)) or 1.0

    def gradient() -> torch.Tensor:
        """Return the sampled elements of all gradients so far."""
        parts = []
        for name, p in trained.items():
            grad = p.detach().new_zeros(()).expand(p.shape) if p.grad is None else p.grad
            parts.append(grad.reshape(-1)[:: tensors[name][1]].float().cpu())
        return torch.cat(parts)

    exact = [document_losses(run, model, document, divisor) for document in documents]
    in_fp32 = gradient()
    squares = [p.grad.double().square().sum() for p in trained.values() if p.grad is not None]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    for parameter in model.parameters():  # not its buffers, which a run keeps in fp32
        parameter.grad = None
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded, in_bf16 = [], torch.zeros(())
    for document in documents:
        rounded.append(document_losses(run, model, document, divisor))
        in_bf16 = in_bf16 + gradient()
        model.zero_grad(set_to_none=True)  # a sum in bf16 would lose small gradients
    eps, loss = EPS[run.compute_dtype], float(sum(map(np.sum, exact))) / divisor
    rounding = (in_bf16 - in_fp32) * (eps / EPS[torch.bfloat16])
    allowed = allowed_error(exact, rounded, divisor, eps)
    return Reference(loss, allowed, norm, eps, tensors, in_fp32, rounding)


def document_losses(run: RunInputs, model: PreTrainedModel, document: Document, divisor: float) -> np.ndarray:
    """Return the weighted losses of one document in nats, `(targets,)`, and add the gradient of its part of the step."""
    targets = np.flatnonzero(document.weights)
    if not len(targets):
        return np.zeros(0)
    ids = torch.from_numpy(np.asarray(document.ids, dtype=np.int64)).to(model.device)
    positions = torch.from_numpy(targets).to(model.device)
    weights = torch.from_numpy(document.weights[targets].astype(np.float32)).to(model.device)
    scores = model(ids[None], use_cache=False).logits[0, positions - 1].float()
    losses = run.code.token_losses(scores, ids[positions]) * weights
    (losses.sum() / divisor).backward()
    return losses.detach().double().cpu().numpy()
