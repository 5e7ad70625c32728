"""What the child of a check computes in one process: data, model, and the reference of step 1.

    python tools/check_step.py --out RESULTS.json --train TRAIN.py CONFIG [section.key=value ...]

tools/check.py starts it, so that no memory of a device stays taken. RESULTS.json has `results` and `reference`: what transformers alone
computes for step 1, each document by itself, with eager attention and the loss of the run's train.py. Nothing of the packed path takes
part in it. It is computed twice, in fp32 and in bf16: how far the two are apart is the rounding of this model, and all tolerances
are multiples of it. A file beside it has samples of the gradients.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.dtypes import DTYPES, dtype_name, has_native_bf16
from common.durable_files import write_json
from common.errors import UserError, run_script
from configs.config import Config
from configs.load import read_command_line
from data.batches import collate
from data.examples import in_memory
from distributed.device import choose_device
from distributed.host_memory import free_bytes, keep_freed_memory
from distributed.low_memory import LowMemoryAdamW
from distributed.optimizer import check_memory, parameter_dtype
from model.architectures import has_experts
from model.build import build
from model.experts import auxiliary_factor
from model.flops import count_work, document_costs
from model.language_model import PackedLanguageModel, load_for_evaluation
from model.lora import add_adapters, init_adapters
from model.loss import LossSums, chunked, visit_logits
from tools.check_data import FAILS, OK, SKIPPED, Result, RunInputs, check_data
from training.chat_settings import settle_chat_settings
from training.inputs import read_inputs
from training.micro_batch import settle_micro_batch

EDITED = (300, 17, 512, 130)  # tokens of the documents of a row that are edited in turn
POSITIONS = 256  # of that row, whose logits are compared
USABLE = 0.8  # of the free memory
EAGER_TOKENS, RECOMPUTED_TOKENS = 4096, 512  # longer documents: attention by sdpa; layers computed again in backward
SAMPLED = 2**22  # elements of the gradient that are kept
EPS = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ROUNDINGS = 5.0  # times the rounding that was measured, up to which a difference counts as rounding


def main() -> int:
    """Read the options, check, write. Returns 0 whatever is found: the results say it. Raises UserError for a bad config."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a directory in place of model.path")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run, for the deal of its steps")
    parser.add_argument("--train", type=Path, required=True, help="the train.py of the run")
    options, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    config, _ = read_command_line(__doc__, options.world_size, lambda text: None)
    if options.model:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=options.model))
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0))  # as the runs of the check
    check(read_run(config, options.world_size, choose_device(0, 1), options.train), options.out)
    return 0


def read_run(config: Config, world_size: int, device: torch.device, train: Path) -> RunInputs:
    """Read config, tokenizer, headers of the weights and data, in the order of train.py. Not a collective. Raises UserError.

    world_size: of the run, on which the deal of a step to micro-batches depends. device: where the checks compute. train: the
    train.py of the run.
    """
    settings, run_directory = config.model, Path(config.run.directory) / config.run.name
    check_memory(config.optimizer.memory)
    model, model_config, tokenizer = build(config)
    config = settle_chat_settings(config, tokenizer, run_directory, world_size=1)
    config = settle_micro_batch(config, model, model_config, run_directory, 1, lambda text: None)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=False)
    dtype = DTYPES[settings.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # as every run decides
    return RunInputs(config, tokenizer, model_config, inputs, device, dtype, load_code(train))


def load_code(path: Path) -> ModuleType:
    """A train.py as a module, of which the check calls `token_losses` and `make_optimizer`."""
    spec = importlib.util.spec_from_file_location("train_of_the_run", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makes_adamw(run: RunInputs) -> bool:
    """Whether `make_optimizer` of the run returns AdamW, whose updates the check can predict from its moments."""
    settings = run.config.optimizer
    dtype = parameter_dtype(settings.memory)
    small = {name: nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in (("matrix", (4, 4)), ("vector", 4))}
    try:
        optimizer = run.code.make_optimizer(small, settings, 0)
    except Exception:  # it may look for tensors of the real model: then it is the user's own
        return False
    return isinstance(optimizer, torch.optim.AdamW | LowMemoryAdamW)


def check(run: RunInputs, out: Path) -> None:
    """All checks. Writes `out` after each: if this process dies, what it has found stays."""
    results, reference = list[Result](), dict[str, object](is_adamw=makes_adamw(run))

    def add(*found: Result) -> None:
        results.extend(found)
        write_json(out, {"results": [vars(result) for result in results], "reference": reference})

    add(*check_data(run))
    try:
        packed = load_packed(run)
        add(check_isolation(run, packed))
        documents, losses = packed_losses(run, packed)
        del packed
        computed = compute_reference(run, documents)
    except (torch.OutOfMemoryError, MemoryError):
        text = "one device does not hold transformers' model and its gradient in fp32: use --layers 2"
        return add(Result("model", "loss", SKIPPED, text))
    reference |= computed.as_json(run)
    if has_experts(run.model_config):
        reference["router_aux"] = auxiliary_factor(run.config.model.router_aux, run.model_config)
    write_sample(computed, out.with_suffix(".safetensors"))
    add(compare_losses(run, losses, computed))


# --- Documents do not see each other ----------------------------------------------------------------------------------


def check_isolation(run: RunInputs, packed: PackedLanguageModel) -> Result:
    """Edit every document of a packed row in turn: the logits of all others keep their bits. Edit the last token of all: no
    logit before it moves. The documents are random tokens. With experts rounding may move them, because a product over the
    tokens of an expert rounds by their number."""
    vocabulary, lengths, random = run.model_config.vocab_size, np.array(EDITED), np.random.default_rng(0)
    documents = [random.integers(0, vocabulary, length) for length in lengths]
    starts = np.cumsum(lengths) - lengths
    spread = np.linspace(0, lengths.sum() - 1, POSITIONS).astype(int)
    where = np.unique(np.concatenate([spread, starts, starts + lengths - 1]))
    owner = np.searchsorted(starts, where, side="right") - 1
    base = _logits(packed, documents, where, run)
    rounding = ROUNDINGS * EPS[run.compute_dtype] * float(base.abs().max()) if has_experts(run.model_config) else 0.0
    leaks, moved = dict[tuple[int, int], float](), []
    for edited, document in enumerate(documents):
        other = (document + random.integers(1, vocabulary, len(document))) % vocabulary
        ids = [*documents[:edited], other, *documents[edited + 1 :]]
        change = (_logits(packed, ids, where, run) - base).abs().amax(dim=1).numpy()
        moved.append(float(change[owner == edited].max()))
        for seen in set(range(len(documents))) - {edited}:
            if (largest := float(change[owner == seen].max())) > rounding:
                leaks[edited, seen] = largest
    ends = [np.append(document[:-1], (document[-1:] + 1) % vocabulary) for document in documents]
    before = torch.from_numpy(~np.isin(where, starts + lengths - 1))
    later = float((_logits(packed, ends, where, run) - base)[before].abs().max())
    figures = {
        "documents": len(documents),
        "leak": max(leaks.values(), default=0.0),
        "later": later,
        "moved": min(moved),
    }
    mend = (
        "do not train with this attention; check model/packed_attention.py and the versions of torch and transformers"
    )
    status = FAILS
    if leaks:
        (edited, seen), largest = max(leaks.items(), key=lambda item: item[1])
        text = (
            f"documents see each other: changing document {edited + 1} of {len(documents)} moves the logits of document "
            f"{seen + 1} by up to {largest:.3g}; {mend}"
        )
    elif later > rounding:
        text = f"a token sees later ones: changing the last token moves logits before it by up to {later:.3g}; {mend}"
    elif not min(moved):
        text = "changing a document does not even move its own logits: the model does not read its input"
    else:
        status = OK
        text = (
            f"{len(documents)} documents of a row changed in turn: the logits of all others "
            f"{f'move by {rounding:.2g} at most, as experts round' if rounding else 'keep their bits'} "
            f"({dtype_name(run.compute_dtype)}, {run.device.type}); no token sees later ones"
        )
    return Result("model", "isolation", status, text, figures)


def _logits(packed: PackedLanguageModel, ids: list[np.ndarray], where: np.ndarray, run: RunInputs) -> torch.Tensor:
    """fp32 logits at some positions of the packed documents, `(positions, vocabulary)`, on the CPU."""
    batch = collate(tuple(range(len(ids))), in_memory(ids, [np.arange(len(part)) > 0 for part in ids]))
    positions = torch.from_numpy(where)
    batch = dataclasses.replace(batch, target_positions=positions, target_ids=torch.zeros_like(positions))
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        hidden = packed(batch.to(run.device))
        visit_logits(packed.head, hidden, lambda logits, _: parts.append(logits.cpu()))
    return torch.cat(parts)


# --- The documents of step 1 in our packed model, and one by one in transformers' model -------------------------------


@dataclass(frozen=True)
class Document:
    """A document of the first step. ids, weights: `(tokens,)`; weights[t] is the factor of the loss of token t."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def divisor(self) -> float:
        """The sum of the weights."""
        return float(self.weights.sum(dtype=np.float64))


def documents_of_items(run: RunInputs, items: tuple[int, ...]) -> list[Document]:
    """The documents of some items of the training corpus, in order; a window of a token store has several."""
    documents = []
    for item in items:
        ids, weights = run.inputs.train.get(item)
        ends = np.cumsum(run.inputs.train.document_lengths(item))[:-1]
        parts = zip(np.split(ids, ends), np.split(weights, ends), strict=True)
        documents += [Document(part, factors) for part, factors in parts]
    return documents


def load_packed(run: RunInputs) -> PackedLanguageModel:
    """Our own model as the run computes it: its stored weights, unsharded, in the compute dtype."""
    packed = load_for_evaluation(run.model_config, run.config.model.path, run.compute_dtype, run.device)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.copy_(parameter.to(parameter_dtype(run.config.optimizer.memory)))
    return packed


def packed_losses(run: RunInputs, packed: PackedLanguageModel) -> tuple[list[Document], list[float]]:
    """The documents of step 1 in the order of its micro-batches, and the sum of losses of each in our packed model."""
    documents: list[Document] = []
    losses: list[float] = []
    bins = [items for micro_batch in run.inputs.deal(0).items for items in micro_batch if items]
    for items in bins:
        here = documents_of_items(run, items)
        batch = collate(items, run.inputs.train)
        owner = torch.searchsorted(batch.cu_seq_lens.long(), batch.target_positions, right=True) - 1
        batch, sums = dataclasses.replace(batch, target_sources=owner), LossSums(len(here) + 1, run.device)
        batch = batch.to(run.device)
        with torch.no_grad():
            chunked(packed.head, packed(batch), batch, run.code.token_losses, sums)
        documents += here
        losses += sums.by_source[: len(here)].tolist()
    return documents, losses


@dataclass
class Reference:
    """What transformers computed for the documents of step 1, one by one. losses: nats times weight, `(targets,)` of each document.

    Gradients are of (sum of losses / sum of weights of the whole step), fp32; of each tensor some elements are kept.
    """

    documents: list[Document]
    losses: list[np.ndarray]
    rounded_losses: list[np.ndarray]  # the same in bf16
    gradient_norm: float
    tensors: dict[str, tuple[int, int]]  # name -> (elements, stride of those that are kept)
    gradient: torch.Tensor  # `(elements,)`
    rounded_gradient: torch.Tensor  # `(elements,)`, the same in bf16

    @property
    def loss(self) -> float:
        """Nats per target token (by weight)."""
        return float(sum(map(np.sum, self.losses))) / (sum(document.divisor for document in self.documents) or 1.0)

    def rounding(self, targets: float, dtype: torch.dtype) -> float:
        """How far rounding may move the mean loss of so many targets, in nats: a constant part, and one that averages out.

        Both are measured: bf16 against fp32. An fp32 run rounds 2^16 times finer; what its sums in another order do comes on top.
        """
        errors = [one - other for one, other in zip(self.rounded_losses, self.losses, strict=True) if len(one)]
        each = np.concatenate(errors)
        of_documents = [error.sum() ** 2 / len(error) for error in errors]  # the targets of one err alike
        falling = math.sqrt(max((each**2).mean(), np.mean(of_documents)))
        measured = float(abs(each.mean()) + falling / math.sqrt(max(1.0, targets)))
        return ROUNDINGS * EPS[dtype] / EPS[torch.bfloat16] * measured + 1e-5 * (1 + abs(self.loss))

    def as_json(self, run: RunInputs) -> dict[str, object]:
        """What the run's own first step is compared with."""
        targets = sum(document.divisor for document in self.documents)
        return {
            "loss": self.loss,
            "loss_allowed": self.rounding(targets, run.compute_dtype),
            "grad_norm": self.gradient_norm,
            "eps": EPS[run.compute_dtype],
        }


def load_reference(run: RunInputs, longest: int) -> PreTrainedModel:
    """transformers' model of the run in fp32, with the weights of the run. longest: tokens of a document.

    Raises MemoryError if there is no room for it and its gradient, and UserError if transformers cannot load it.
    """
    path, lora = run.config.model.path, run.config.lora
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(run.model_config).parameters())
    # The logits and one layer's scores of a document in fp32, four of each: forward, backward and temporaries.
    scores = run.model_config.num_attention_heads * longest**2 if longest <= EAGER_TOKENS else 0
    if 8 * count + 16 * (longest * run.model_config.vocab_size + scores) > USABLE * free_bytes(run.device, 1):
        raise MemoryError
    only_eager = getattr(run.model_config, "attn_logit_softcapping", None) or run.model_config.model_type == "gpt_oss"
    attention = "eager" if longest <= EAGER_TOKENS or only_eager else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=run.model_config, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from error
    if lora.rank:
        add_adapters(model, lora, path)
        init_adapters(dict(model.named_parameters()), run.config.run.seed)
        head: Any = model.get_output_embeddings()
        if rows := getattr(head, "token_adapter", None):  # new tokens, the last ones

            def with_new_rows(_: nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
                return torch.cat([logits[..., : rows.first], inputs[0] @ rows.trainable_tokens_delta.T], dim=-1)

            head.register_forward_hook(with_new_rows)
    model = cast(PreTrainedModel, nn.Module.to(model, run.device)).train()
    with torch.no_grad():  # the run's own weights are these
        for parameter in model.parameters():
            frozen = lora.rank and not parameter.requires_grad
            kept = DTYPES[run.config.model.compute_dtype] if frozen else parameter_dtype(run.config.optimizer.memory)
            parameter.copy_(parameter.to(kept))
    if longest > RECOMPUTED_TOKENS:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compute_reference(run: RunInputs, documents: list[Document]) -> Reference:
    """Losses and gradients of the documents one by one in transformers' model, in fp32 and then in bf16. Raises as `load_reference`."""
    model = load_reference(run, max(len(document.ids) for document in documents))
    # The gradient of LoRA's A is zero as long as B is.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name}
    elements = max(1, SAMPLED // len(trained))
    tensors = {name: (p.numel(), -(-p.numel() // elements)) for name, p in trained.items()}
    divisor = sum(document.divisor for document in documents) or 1.0

    def gradient() -> torch.Tensor:
        """The sampled elements of all gradients so far."""
        parts = []
        for name, p in trained.items():
            grad = p.detach().new_zeros(()).expand(p.shape) if p.grad is None else p.grad
            parts.append(grad.reshape(-1)[:: tensors[name][1]].float().cpu())
        return torch.cat(parts)

    losses = [document_losses(run, model, document, divisor) for document in documents]
    total = gradient()
    squares = [p.grad.double().square().sum() for p in trained.values() if p.grad is not None]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    for parameter in model.parameters():  # not its buffers, which a run keeps in fp32
        parameter.grad = None
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded_losses, rounded = [], torch.zeros(())
    for document in documents:
        rounded_losses.append(document_losses(run, model, document, divisor))
        rounded = rounded + gradient()
        model.zero_grad(set_to_none=True)  # bf16 would lose what is small beside the sum
    return Reference(documents, losses, rounded_losses, norm, tensors, total, rounded)


def document_losses(run: RunInputs, model: PreTrainedModel, document: Document, divisor: float) -> np.ndarray:
    """The weighted losses of one document in nats, `(targets,)`; the gradient of its part of the step is added to the others."""
    targets = np.flatnonzero(document.weights)
    if not len(targets):
        return np.zeros(0)
    ids = torch.from_numpy(np.asarray(document.ids, dtype=np.int64)).to(model.device)
    where = torch.from_numpy(targets).to(model.device)
    weights = torch.from_numpy(document.weights[targets].astype(np.float32)).to(model.device)
    scores = model(ids[None], use_cache=False).logits[0, where - 1].float()
    losses = run.code.token_losses(scores, ids[where]) * weights
    (losses.sum() / divisor).backward()
    return losses.detach().double().cpu().numpy()


def write_sample(reference: Reference, path: Path) -> None:
    """Write the sampled `gradient` of step 1, its `rounding` in bf16, both `(elements,)`, and in the metadata the size and stride of
    each tensor, in order."""
    rounding = reference.rounded_gradient - reference.gradient
    metadata = {"tensors": json.dumps(reference.tensors)}
    save_file({"gradient": reference.gradient, "rounding": rounding}, path, metadata)


def compare_losses(run: RunInputs, losses: list[float], reference: Reference) -> Result:
    """Our losses of step 1 against those of transformers, document by document."""
    done = [i for i, document in enumerate(reference.documents) if document.divisor]
    weights = np.array([reference.documents[i].divisor for i in done])
    ours = np.array([losses[i] for i in done]) / weights
    theirs = np.array([reference.losses[i].sum() for i in done]) / weights
    allowed = np.array([reference.rounding(weight, run.compute_dtype) for weight in weights])
    excess = np.nan_to_num(np.abs(ours - theirs) / allowed, nan=np.inf)
    mean_ours, mean = float(np.average(ours, weights=weights)), float(np.average(theirs, weights=weights))
    mean_allowed = reference.rounding(weights.sum(), run.compute_dtype)
    worst = int(excess.argmax())
    figures = {
        "ours": mean_ours,
        "transformers": mean,
        "allowed": mean_allowed,
        "largest_excess": float(excess[worst]),
        "documents": len(done),
    }
    text = (
        f"step 0: {mean_ours:.4f} nats a target, transformers {mean:.4f} ({dtype_name(run.compute_dtype)} against float32, "
        f"{mean_allowed:.2g} allowed), over {len(done)} documents"
    )
    if excess[worst] <= 1 and abs(mean_ours - mean) <= mean_allowed:
        return Result("model", "loss", OK, text, figures)
    text += (
        f"; document {done[worst] + 1} has {ours[worst]:.4f} against {theirs[worst]:.4f}, where rounding explains "
        f"{allowed[worst]:.2g}: the weights are not finite, or the packed model does not compute what transformers computes; do not "
        "train before this is explained"
    )
    return Result("model", "loss", FAILS, text, figures)


def ulp(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gap between a number and the next larger one in magnitude, fp32, for numbers of `dtype`. Of 0: the smallest normal one."""
    smallest = torch.finfo(dtype).tiny
    _, exponent = torch.frexp(weight.float().abs().clamp(min=smallest))
    return torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent + int(math.log2(EPS[dtype])))


if __name__ == "__main__":
    run_script(main)
