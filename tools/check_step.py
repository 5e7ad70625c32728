"""What the child of a check computes in one process: data, model, and the reference of step 1.

    python tools/check_step.py --out DIRECTORY --train TRAIN.py CONFIG [section.key=value ...]

tools/check.py starts it, so that no memory of a device stays taken. DIRECTORY gets the lines, and the reference: what transformers
alone computes for step 1, each document by itself, with eager attention and the loss of the run's train.py. Nothing of the packed path
takes part in it. It is computed twice, in fp32 and in bf16: how far the two are apart is the rounding of this model, and all tolerances
are multiples of it.
"""

import common  # noqa: F401, I001  first: it keeps quiet what transformers imports

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.dtypes import DTYPES, dtype_name, has_native_bf16
from common.durable_files import write_json
from common.errors import UserError, run_script
from configs.config import Config
from configs.load import override, read_command_line
from data.batches import collate
from distributed.device import choose_device
from distributed.host_memory import free_bytes, keep_freed_memory
from distributed.optimizer import check_memory, parameter_dtype
from model.architectures import has_experts
from model.build import build
from model.flops import count_work, document_costs
from model.language_model import PackedLanguageModel, load_for_evaluation
from model.lora import add_adapters, init_adapters
from model.loss import LossSums, chunked
from tools.check_data import FAILS, OK, SKIPPED, Result, RunInputs, check_data
from training.chat_settings import settle_chat_settings
from training.checkpoint_export import packed_logits
from training.inputs import read_inputs
from training.micro_batch import settle_micro_batch

EDITED = (300, 17, 512, 130)  # tokens of the documents of a row that are edited in turn
POSITIONS = 256  # of that row, whose logits are compared
USABLE = 0.8  # of the free memory
EAGER_TOKENS, RECOMPUTED_TOKENS = 4096, 512  # longer documents: attention by sdpa; layers computed again in backward
SAMPLED = 2**22  # elements of the gradient that are kept
LINES, REFERENCE = "lines.json", "reference.safetensors"  # in the directory of the results
EPS = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ROUNDINGS = 5.0  # times the rounding that was measured, up to which a difference counts as rounding


def main() -> int:
    """Read the options, check, write. Returns 0 whatever is found: the results say it. Raises UserError for a bad config."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run, for the deal of its steps")
    parser.add_argument("--train", type=Path, required=True, help="the train.py of the run")
    options, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    config, _ = read_command_line(__doc__, options.world_size, lambda text: None)
    config = override(config, ["lora.dropout=0.0"])  # as the runs of the check
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
    config = settle_chat_settings(config, tokenizer, run_directory)
    config = settle_micro_batch(config, model, model_config, run_directory, 1, lambda text: None)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=False)
    dtype = DTYPES[settings.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # as every run decides
    return RunInputs(config, tokenizer, model_config, inputs, device, dtype, load_code(train))


def load_code(path: Path) -> ModuleType:
    """A train.py as a module, of which the check calls `token_losses`."""
    spec = importlib.util.spec_from_file_location("train_of_the_run", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(run: RunInputs, out: Path) -> None:
    """All checks. Writes the lines after each: if this process dies, what it has found stays."""
    results = list[Result]()
    out.mkdir(exist_ok=True)

    def add(*found: Result, **names: str) -> None:
        results.extend(dataclasses.replace(one, **names) for one in found)
        write_json(out / LINES, [vars(result) for result in results])

    add(*check_data(run))
    try:
        packed = load_packed(run)
        add(check_isolation(run, packed), group="model", name="isolation")
        documents, losses = packed_losses(run, packed)
        del packed
        expected, reference = compute_reference(run, documents)
    except (torch.OutOfMemoryError, MemoryError):
        text = "one device does not hold transformers' model and its gradient in fp32: use --layers 2"
        return add(Result(SKIPPED, text), group="model", name="loss")
    reference.save(out / REFERENCE)
    add(compare_losses(run, losses, expected), group="model", name="loss")


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
    base = packed_logits(packed, documents, where)
    if not bool(base.isfinite().all()):
        return Result(FAILS, "logits of random tokens are not finite: see model.path and model.compute_dtype")

    def change(edited: list[np.ndarray]) -> np.ndarray:
        """The largest move of a logit at each of the positions; one that is not finite moves by infinity."""
        moves = (packed_logits(packed, edited, where) - base).abs().amax(dim=1).numpy()
        return np.nan_to_num(moves, nan=np.inf, posinf=np.inf)

    moves = np.zeros((len(documents), len(documents)))  # of logits, by the document that was edited and their own
    for edited, document in enumerate(documents):
        other = (document + random.integers(1, vocabulary, len(document))) % vocabulary
        np.maximum.at(moves[edited], owner, change([*documents[:edited], other, *documents[edited + 1 :]]))
    leaks = np.where(np.eye(len(documents)), 0.0, moves)
    edited, seen = np.unravel_index(leaks.argmax(), leaks.shape)
    ends = [np.append(document[:-1], (document[-1:] + 1) % vocabulary) for document in documents]
    later = float(change(ends)[~np.isin(where, starts + lengths - 1)].max())
    leak, moved = float(leaks.max()), float(moves.diagonal().min())
    rounding = ROUNDINGS * EPS[run.compute_dtype] * float(base.abs().max()) if has_experts(run.model_config) else 0.0
    figures = {"documents": len(documents), "leak": leak, "later": later, "moved": moved}
    mend = (
        "do not train with this attention; check model/packed_attention.py and the versions of torch and transformers"
    )
    if leak > rounding:
        text = (
            f"documents see each other: changing document {edited + 1} of {len(documents)} moves the logits of document "
            f"{seen + 1} by up to {leak:.3g}; {mend}"
        )
        return Result(FAILS, text, figures)
    if later > rounding:
        text = f"a token sees later ones: changing the last token moves logits before it by up to {later:.3g}; {mend}"
        return Result(FAILS, text, figures)
    if not moved:
        return Result(
            FAILS, "changing a document does not even move its own logits: the model does not read its input", figures
        )
    text = (
        f"{len(documents)} documents of a row changed in turn: the logits of all others "
        f"{f'move by {rounding:.2g} at most, as experts round' if rounding else 'keep their bits'} "
        f"({dtype_name(run.compute_dtype)}, {run.device.type}); no token sees later ones"
    )
    return Result(OK, text, figures)


# --- The documents of step 1 in our packed model, and one by one in transformers' model -------------------------------


class Document(NamedTuple):
    """A document of the first step. ids, weights: `(tokens,)`; weights[t] is the factor of the loss of token t."""

    ids: np.ndarray
    weights: np.ndarray


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


class Losses(NamedTuple):
    """The losses of the documents of step 1 in transformers' model, nats times weight: `(targets,)` of each document."""

    divisors: np.ndarray  # `(documents,)`: the sums of their weights
    exact: list[np.ndarray]  # in fp32
    rounded: list[np.ndarray]  # in bf16

    def mean(self) -> float:
        """Nats per target token (by weight)."""
        return float(sum(map(np.sum, self.exact))) / (float(self.divisors.sum()) or 1.0)

    def allowed(self, targets: float, dtype: torch.dtype) -> float:
        """How far rounding may move the mean loss of so many targets, in nats: a constant part, and one that averages out.

        Both are measured: bf16 against fp32. An fp32 run rounds 2^16 times finer; what its sums in another order do comes on top.
        """
        errors = [one - other for one, other in zip(self.rounded, self.exact, strict=True) if len(one)]
        each = np.concatenate(errors)
        of_documents = [error.sum() ** 2 / len(error) for error in errors]  # the targets of one err alike
        falling = math.sqrt(max((each**2).mean(), np.mean(of_documents)))
        measured = float(abs(each.mean()) + falling / math.sqrt(max(1.0, targets)))
        return ROUNDINGS * EPS[dtype] / EPS[torch.bfloat16] * measured + 1e-5 * (1 + abs(self.mean()))


@dataclass(frozen=True)
class Reference:
    """What the run's own first step is compared with.

    gradient: of (sum of losses / sum of weights of the whole step), of which some elements are kept, tensor by tensor; rounding:
    how far the run's compute dtype may move each. Both `(elements,)`, on the CPU.
    """

    loss: float  # nats per target
    loss_allowed: float  # how far rounding may move it
    grad_norm: float
    eps: float  # of the compute dtype
    tensors: dict[str, tuple[int, int]]  # name -> (elements of the tensor, stride of those that are kept)
    gradient: torch.Tensor
    rounding: torch.Tensor

    def save(self, path: Path) -> None:
        """Write everything to one file."""
        tensors = {"gradient": self.gradient, "rounding": self.rounding}
        values = {key: value for key, value in vars(self).items() if key not in tensors}
        save_file(tensors, path, {"values": json.dumps(values)})

    @classmethod
    def load(cls, path: Path) -> "Reference | None":
        """What `save` has written, in fp64; None if there is no such file."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).double() for key in ("gradient", "rounding")}
            return cls(**json.loads(file.metadata()["values"]), **tensors)

    def norm_rounding(self) -> float:
        """How far rounding may move the norm, relative to it: what was measured, and a little more, as it is one random number."""
        length = self.gradient.norm()
        along, across = abs(self.rounding @ self.gradient) / length**2, self.rounding.norm() / length
        return float(ROUNDINGS * (along + across**2)) + self.eps / 4


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
    experts = {"experts_implementation": "eager"} if has_experts(run.model_config) else {}  # not the run's kernel
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=run.model_config, dtype=torch.float32, attn_implementation=attention, **experts
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


def compute_reference(run: RunInputs, documents: list[Document]) -> tuple[Losses, Reference]:
    """Losses and gradients of the documents one by one in transformers' model, in fp32 and then in bf16. Raises as `load_reference`."""
    model = load_reference(run, max(len(document.ids) for document in documents))
    # The gradient of LoRA's A is zero as long as B is.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name}
    elements = max(1, SAMPLED // len(trained))
    tensors = {name: (p.numel(), -(-p.numel() // elements)) for name, p in trained.items()}
    divisors = np.array([document.weights.sum(dtype=np.float64) for document in documents])
    divisor = float(divisors.sum()) or 1.0

    def gradient() -> torch.Tensor:
        """The sampled elements of all gradients so far."""
        parts = []
        for name, p in trained.items():
            grad = p.detach().new_zeros(()).expand(p.shape) if p.grad is None else p.grad
            parts.append(grad.reshape(-1)[:: tensors[name][1]].float().cpu())
        return torch.cat(parts)

    exact = [document_losses(run, model, document, divisor) for document in documents]
    total = gradient()
    squares = [p.grad.double().square().sum() for p in trained.values() if p.grad is not None]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    for parameter in model.parameters():  # not its buffers, which a run keeps in fp32
        parameter.grad = None
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded, of_bf16 = [], torch.zeros(())
    for document in documents:
        rounded.append(document_losses(run, model, document, divisor))
        of_bf16 = of_bf16 + gradient()
        model.zero_grad(set_to_none=True)  # bf16 would lose what is small beside the sum
    losses, eps = Losses(divisors, exact, rounded), EPS[run.compute_dtype]
    rounding = (of_bf16 - total) * (eps / EPS[torch.bfloat16])
    allowed = losses.allowed(divisor, run.compute_dtype)
    return losses, Reference(losses.mean(), allowed, norm, eps, tensors, total, rounding)


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


def compare_losses(run: RunInputs, losses: list[float], expected: Losses) -> Result:
    """Our losses of step 1 against those of transformers, document by document."""
    done = np.flatnonzero(expected.divisors)
    weights = expected.divisors[done]
    ours, theirs = np.array(losses)[done] / weights, np.array([one.sum() for one in expected.exact])[done] / weights
    allowed = np.array([expected.allowed(weight, run.compute_dtype) for weight in weights])
    excess = np.nan_to_num(np.abs(ours - theirs) / allowed, nan=np.inf)
    mean_ours, mean = float(np.average(ours, weights=weights)), float(np.average(theirs, weights=weights))
    mean_allowed = expected.allowed(weights.sum(), run.compute_dtype)
    worst, largest = int(excess.argmax()), float(excess.max())
    figures = {
        "ours": mean_ours,
        "transformers": mean,
        "allowed": mean_allowed,
        "largest_excess": largest,
        "documents": len(done),
    }
    text = (
        f"step 0: {mean_ours:.4f} nats a target, transformers {mean:.4f} ({dtype_name(run.compute_dtype)} against float32, "
        f"{mean_allowed:.2g} allowed), over {len(done)} documents"
    )
    if largest <= 1 and abs(mean_ours - mean) <= mean_allowed:
        return Result(OK, text, figures)
    text += (
        f"; document {done[worst] + 1} has {ours[worst]:.4f} against {theirs[worst]:.4f}, where rounding explains "
        f"{allowed[worst]:.2g}: the weights are not finite, or the packed model does not compute what transformers computes; do not "
        "train before this is explained"
    )
    return Result(FAILS, text, figures)


if __name__ == "__main__":
    run_script(main)
