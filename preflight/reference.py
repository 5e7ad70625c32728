"""transformers' own losses and gradient of the first step: each document alone, eager attention, plain cross-entropy.

Nothing of the packed path takes part: no packing, no chunks of logits, no sharding. The sum of the weighted losses of all
documents is divided once by the sum of all weights, which is what the loop must arrive at, whatever its micro-batches are.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.dtypes import DTYPES
from common.errors import UserError
from distributed.host_memory import free_bytes
from distributed.optimizer import parameter_dtype
from model.lora import add_adapters, init_adapters
from preflight.read import RunInputs
from preflight.shares import Sample, choose

USABLE = 0.8  # of the free memory
EAGER_TOKENS = 4096  # the scores of a longer document are not held; sdpa computes it
RECOMPUTED_TOKENS = 512  # from this length on, a layer's scores are computed again in backward


@dataclass(frozen=True)
class Document:
    """A document of the first step. ids, weights: `(tokens,)`; weights[t] is the factor of the loss of token t."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def divisor(self) -> float:
        """The sum of the weights."""
        return float(self.weights.sum(dtype=np.float64))


@dataclass
class Reference:
    """What transformers computed. losses: nats, weighted sum of each document that was computed, in the step's order.

    model: with the gradient of (sum of losses / sum of weights of the whole step), if `has_gradient`.
    """

    model: PreTrainedModel
    documents: list[Document]
    losses: list[float] = field(default_factory=list)
    has_gradient: bool = True
    sample: Sample | None = None  # of the gradients of the documents, one by one

    @property
    def complete(self) -> bool:
        """Whether all documents of the step were computed."""
        return len(self.losses) == len(self.documents)

    @property
    def loss(self) -> float:
        """Nats per target token (by weight) of the documents that were computed."""
        done = self.documents[: len(self.losses)]
        return sum(self.losses) / (sum(document.divisor for document in done) or 1.0)

    def gradient_norm(self) -> float | None:
        """L2 norm over all parameters, of fp32 sums; None without a gradient."""
        if not self.has_gradient:
            return None
        squares = [
            p.grad.float().square().sum(dtype=torch.float64) for p in self.model.parameters() if p.grad is not None
        ]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def as_json(self) -> dict[str, object]:
        """What the run's own first step is compared with; all documents count only if `complete`."""
        return {
            "loss": self.loss,
            "grad_norm": self.gradient_norm(),
            "documents": len(self.losses),
            "of_documents": len(self.documents),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "complete": self.complete,
        }


def documents_of_items(run: RunInputs, items: tuple[int, ...]) -> list[Document]:
    """The documents of some items of the training corpus, in order; a window of a token store has several."""
    return [document for item in items for document in _documents(run, item)]


def _documents(run: RunInputs, item: int) -> Iterator[Document]:
    ids, weights = run.inputs.train.get(item)
    ends = np.cumsum(run.inputs.train.document_lengths(item))[:-1]
    for part, factors in zip(np.split(ids, ends), np.split(weights, ends), strict=True):
        yield Document(part, factors)


def bins_of_first_step(run: RunInputs) -> list[tuple[int, ...]]:
    """The items of each micro-batch of step 1 on each rank, without empty ones."""
    return [items for micro_batch in run.inputs.deal(0).items for items in micro_batch if items]


def micro_batches_of_documents(run: RunInputs) -> list[int]:
    """The number of the micro-batch of each document of step 1, over all ranks."""
    return [i for i, items in enumerate(bins_of_first_step(run)) for _ in documents_of_items(run, items)]


def load_reference(run: RunInputs, documents: list[Document]) -> Reference | None:
    """transformers' model of the run in fp32 if it fits with its gradient, else in the compute dtype, else without gradient.

    None if it does not fit at all. Raises UserError if transformers cannot load it.
    """
    longest = max((len(document.ids) for document in documents), default=0)
    count = sum(p.numel() for p in _on_meta(run).parameters())
    free = USABLE * free_bytes(run.device, 1) - _working_bytes(run.model_config, longest)
    choices = [(torch.float32, True), (run.compute_dtype, True), (run.compute_dtype, False)]
    if run.config.lora.dropout:  # the run's gradient is random
        choices = [(torch.float32, False), (run.compute_dtype, False)]
    for dtype, gradient in choices:
        if count * dtype.itemsize * (2 if gradient else 1) <= free:
            break
    else:
        return None
    softcap = getattr(run.model_config, "attn_logit_softcapping", None)
    attention = "eager" if longest <= EAGER_TOKENS or softcap else "sdpa"
    path = run.config.model.path
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=run.model_config, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from error
    if run.config.lora.rank:
        add_adapters(model, run.config.lora, path)
        init_adapters(dict(model.named_parameters()), run.config.run.seed)
    # No model that can be trained here has dropout, and that of LoRA is left out: it is random.
    model = cast(PreTrainedModel, nn.Module.to(model, run.device)).train(not run.config.lora.dropout)
    if not gradient:
        model.requires_grad_(False)
    if dtype == torch.float32:
        with torch.no_grad():  # the run's own weights are these
            for parameter in model.parameters():
                parameter.copy_(parameter.to(_stored_dtype(run, parameter)))
    if gradient and longest > RECOMPUTED_TOKENS:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Reference(model, documents, has_gradient=gradient)


def _stored_dtype(run: RunInputs, parameter: nn.Parameter) -> torch.dtype:
    """The dtype in which the run keeps a parameter (model/lora.py: build_to_train)."""
    if run.config.lora.rank and not parameter.requires_grad:
        return DTYPES[run.config.model.compute_dtype]
    return parameter_dtype(run.config.optimizer.memory)


def _working_bytes(config: PretrainedConfig, longest: int) -> int:
    """Bytes of the logits and of one layer's scores of a document, in fp32, four of each: forward, backward and temporaries."""
    scores = config.num_attention_heads * longest**2 if longest <= EAGER_TOKENS else 0
    return 4 * 4 * (longest * config.vocab_size + scores)


def _on_meta(run: RunInputs) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(run.model_config)


def compute(reference: Reference, seconds: float) -> None:
    """Losses of the documents one by one, and their gradient, for about `seconds`; at least one document.

    On a CPU they are seconds of this process's threads, so that other work on the machine does not change what is computed.
    """
    divisor = sum(document.divisor for document in reference.documents) or 1.0
    # The gradient of LoRA's A is zero as long as B is.
    named = reference.model.named_parameters()
    parameters = {name: p for name, p in named if p.requires_grad and ".lora_A." not in name}
    reference.sample = choose(parameters, len(reference.documents)) if reference.has_gradient else None
    clock = _clock(reference.model.device)
    end = clock() + seconds
    for document in reference.documents:
        try:
            loss = _take(reference, document, divisor)
        except torch.OutOfMemoryError:
            if not reference.has_gradient:
                return  # what was computed before still counts
            reference.has_gradient, reference.sample = False, None
            reference.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            try:
                loss = _take(reference, document, divisor)
            except torch.OutOfMemoryError:
                return
        reference.losses.append(loss)
        if reference.sample:
            reference.sample.take(parameters)
        if clock() > end:
            return


def _take(reference: Reference, document: Document, divisor: float) -> float:
    """The loss of one document; its gradient is added to that of the others."""
    with torch.set_grad_enabled(reference.has_gradient):
        loss = document_loss(reference.model, document)
        if loss.requires_grad:
            (loss / divisor).backward()
    return loss.item()


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cpu":
        return time.monotonic
    threads = torch.get_num_threads()
    return lambda: time.process_time() / threads


def document_loss(model: PreTrainedModel, document: Document) -> torch.Tensor:
    """The weighted sum of the losses of one document in nats, fp32 scalar."""
    targets = np.flatnonzero(document.weights)
    if not len(targets):
        return torch.zeros((), device=model.device)
    ids = torch.from_numpy(np.asarray(document.ids, dtype=np.int64)).to(model.device)
    where = torch.from_numpy(targets).to(model.device)
    scores = model(ids[None], use_cache=False).logits[0, where - 1].float()
    losses = F.cross_entropy(scores, ids[where], reduction="none")
    weights = torch.from_numpy(document.weights[targets].astype(np.float32)).to(model.device)
    return (losses * weights).sum()
