"""What the children of a check compute: data, model and precision in one process, and the devices of all ranks.

    python tools/check_step.py --out RESULTS.json CONFIG [section.key=value ...]
    python tools/check_step.py --devices RESULTS.json

tools/check.py starts both, so that no memory of a device stays taken. RESULTS.json has `results` and `reference`: what
transformers alone computes for step 1, each document by itself, with eager attention and plain cross-entropy. Nothing of the packed path
takes part in it. It is computed twice, in fp32 and in bf16: how far the two are apart is the rounding of this model, and all
tolerances are multiples of it. A file beside it has samples of the gradients.
"""

from common.lean_imports import begin_imports, end_imports

begin_imports()
import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.dtypes import DTYPES, dtype_name, has_native_bf16
from common.durable_files import write_json
from common.errors import UserError, run_script
from configs.config import Config
from configs.loading.command_line import read_command_line
from data.batches import collate
from data.examples import Documents
from data.tokens import load_tokenizer
from distributed.device import choose_device
from distributed.host_memory import free_bytes, keep_freed_memory
from distributed.optimizer import check_memory, parameter_dtype
from distributed.process_group import gather_objects, process_group
from distributed.rank_names import host_name
from distributed.sharding import decoder_layers
from model.architectures import check_model_directory, read_model_config
from model.flops import count_work, document_costs
from model.language_model import PackedLanguageModel, check_weights, load_for_evaluation
from model.lora import add_adapters, build_to_train, init_adapters
from model.loss import LossSums
from model.rope import check_length
from tools.check_data import FAILS, OK, SKIPPED, WARNING, Result, RunInputs, check_data
from training.chat_settings import settle_chat_settings
from training.inputs import read_inputs
from training.micro_batch import settle_micro_batch

end_imports()

SECONDS = 45.0  # for transformers' fp32 losses and gradient, and again for bf16; the documents after that are left out
REDUCED, REDUCTIONS = 64 * 2**20, 5  # bytes that the ranks add up, and how often: the fastest counts
EDITED, EDITED_TOKENS = (3, 4), 2048  # documents of the row whose documents are edited in turn, and its tokens at most
POSITIONS = 256  # of that row, whose logits are compared
USABLE = 0.8  # of the free memory
EAGER_TOKENS, RECOMPUTED_TOKENS = 4096, 512  # longer documents: attention by sdpa; layers computed again in backward
SAMPLED, ALL_SAMPLED = 2**20, 2**25  # elements of a document's gradient that are kept, and of all documents together
EPS = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ROUNDINGS = 5.0  # times the rounding that was measured, up to which a difference counts as rounding
UNMOVED, STUCK = 0.5, 0.95  # shares of weights that cannot reach the next bf16 number: warning, failure
SIGNAL = 3.0  # movement of the whole run over the noise of stochastic rounding, from which on the noise is harmless


class Report:
    """The results so far, in a file: if this process dies, what it has found stays."""

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, list[Result]()
        self.reference: dict[str, object] | None = None

    def add(self, *results: Result) -> None:
        """Add results and write the file."""
        self.results += results
        content = {"results": [vars(result) for result in self.results], "reference": self.reference}
        write_json(self.path, content)


def main() -> int:
    """Read the options, check, write. Returns 0 whatever is found: the results say it. Raises UserError for a bad config."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--devices", type=Path)
    parser.add_argument("--model", help="a directory in place of model.path")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run, for the deal of its steps")
    options, rest = parser.parse_known_args()
    if options.devices:
        return measure_devices(options.devices)
    sys.argv = [sys.argv[0], *rest]
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    config = read_command_line(__doc__, options.world_size, lambda text: None).config
    if options.model:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=options.model))
    check(read_run(config, options.world_size, choose_device(0, 1)), Report(options.out), SECONDS)
    return 0


def measure_devices(out: Path) -> int:
    """Write what others have taken of the GPUs, and the seconds in which the slowest rank adds up REDUCED bytes. A collective."""
    with process_group(5.0) as ranks:
        mine = None
        if ranks.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(ranks.device)
            mine = (host_name(), ranks.local_rank, total - free - torch.cuda.memory_reserved(), total)
        tensor, times = torch.ones(REDUCED // 4, device=ranks.device), []
        for _ in range(REDUCTIONS if ranks.world_size > 1 else 0):
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        gathered = gather_objects((mine, min(times, default=0.0)), ranks)
        if ranks.rank == 0:
            slowest = max(seconds for _, seconds in gathered)
            write_json(out, {"seconds": slowest, "bytes": REDUCED, "gpus": [gpu for gpu, _ in gathered if gpu]})
    return 0


def read_run(config: Config, world_size: int, device: torch.device) -> RunInputs:
    """Read config, tokenizer, headers of the weights and data, in the order of train.py. Not a collective. Raises UserError.

    world_size: of the run, on which the deal of a step to micro-batches depends. device: where the checks compute.
    """
    settings, run_directory = config.model, Path(config.run.directory) / config.run.name
    check_memory(config.optimizer.memory)
    check_model_directory(settings.path, "model.path")
    model_config = read_model_config(
        settings.path, settings.rope_type, settings.rope_factor, settings.rope_original_length
    )
    tokenizer = load_tokenizer(settings.path, config.data.chat_template)
    check_length(config.data.sequence_length, model_config, settings.path)
    model = build_to_train(config, model_config)
    decoder_layers(model, settings.layer_class)
    check_weights(model, settings.path)
    config = settle_chat_settings(config, tokenizer, run_directory, world_size=1)
    config = settle_micro_batch(config, model, model_config, run_directory, 1, lambda text: None)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=False)
    dtype = DTYPES[settings.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # as every run decides
    return RunInputs(config, tokenizer, model_config, inputs, device, dtype)


def check(run: RunInputs, report: Report, seconds: float) -> None:
    """All checks, in the order of what they cost."""
    documents, losses = list[Document](), list[float]()

    def own_model() -> None:
        packed = load_packed(run)
        report.add(check_isolation(run, packed))
        found, sums = packed_losses(run, packed)
        documents.extend(found)
        losses.extend(sums)

    def reference_model() -> None:
        reference = load_reference(run, documents)
        if reference is None:
            text = "memory does not hold transformers' model in fp32: use --layers 2, or a larger device"
            report.add(Result("model", "loss", SKIPPED, text))
            return
        finite = check_finite(reference)
        report.add(finite)
        if finite.status == FAILS:
            return
        report.add(check_movement(run, reference))
        compute(reference, seconds)
        report.reference = reference.as_json(run)
        if reference.complete and reference.has_gradient:
            write_sample(reference, report.path.with_suffix(".safetensors"))
        report.add(compare_losses(run, losses, reference))

    _guarded(report, "data", lambda: report.add(*check_data(run)))
    report.add(check_bf16(run))
    _guarded(report, "model", own_model)
    _free()
    if documents:
        _guarded(report, "model", reference_model)


def _guarded(report: Report, group: str, do: Callable[[], None]) -> None:
    """Run some checks; too little memory leaves them out with a line, and a UserError fails with its sentence."""
    started = time.perf_counter()
    try:
        do()
    except UserError as error:
        report.add(Result(group, "inputs", FAILS, str(error)))
    except (torch.OutOfMemoryError, MemoryError):
        _free()
        text = "memory holds no more checks of the model on one device: use --layers 2"
        report.add(Result(group, "memory", SKIPPED, text))
    print(f"{group} checked in {time.perf_counter() - started:.1f} s, going on", file=sys.stderr, flush=True)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Documents do not see each other ----------------------------------------------------------------------------------


def check_isolation(run: RunInputs, packed: PackedLanguageModel) -> Result:
    """Edit every document of a packed row in turn: the logits of all others keep their bits. Edit the last token of all: no
    logit before it moves."""
    documents = _documents_to_edit(run)
    lengths = np.array([len(document) for document in documents])
    starts = np.cumsum(lengths) - lengths
    spread = np.linspace(0, lengths.sum() - 1, POSITIONS).astype(int)
    where = np.unique(np.concatenate([spread, starts, starts + lengths - 1]))
    owner = np.searchsorted(starts, where, side="right") - 1
    base = _logits(packed, documents, where, run)
    leaks, moved = dict[tuple[int, int], float](), []
    for edited, document in enumerate(documents):
        others = [*documents[:edited], _other_ids(document, run), *documents[edited + 1 :]]
        change = (_logits(packed, others, where, run) - base).abs().amax(dim=1).numpy()
        moved.append(float(change[owner == edited].max()))
        for seen in set(range(len(documents))) - {edited}:
            if largest := float(change[owner == seen].max()):
                leaks[edited, seen] = largest
    ends = [np.append(document[:-1], _other_ids(document[-1:], run)) for document in documents]
    before = ~np.isin(where, starts + lengths - 1)
    later = float((_logits(packed, ends, where, run) - base)[torch.from_numpy(before)].abs().max())
    figures = {"documents": len(documents), "tokens": int(lengths.sum()), "leak": max(leaks.values(), default=0.0)}
    figures |= {"later": later, "moved": min(moved)}
    mend = (
        "do not train with this attention; check model/packed_attention.py and the versions of torch and transformers"
    )
    if leaks:
        (edited, seen), largest = max(leaks.items(), key=lambda item: item[1])
        text = (
            f"documents see each other: changing document {edited + 1} of {len(documents)} moves the logits of document "
            f"{seen + 1} by up to {largest:.3g}; {mend}"
        )
        return Result("model", "isolation", FAILS, text, figures)
    if later:
        text = f"a token sees later ones: changing the last token moves logits before it by up to {later:.3g}; {mend}"
        return Result("model", "isolation", FAILS, text, figures)
    if not min(moved):
        text = "changing a document does not even move its own logits: the model does not read its input"
        return Result("model", "isolation", FAILS, text, figures)
    text = (
        f"{len(documents)} documents of a row changed in turn: the logits of all others keep their bits "
        f"({dtype_name(run.compute_dtype)}, {run.device.type}); no token sees later ones"
    )
    return Result("model", "isolation", OK, text, figures)


def _documents_to_edit(run: RunInputs) -> list[np.ndarray]:
    """Token ids of the beginnings of a few documents of the first steps; if there are too few, they are repeated."""
    least, most = EDITED
    found: list[np.ndarray] = []
    for step in range(min(8, run.inputs.total_steps)):
        for document in documents_of_items(run, run.inputs.plan.batch(step).items):
            ids = np.asarray(document.ids[: EDITED_TOKENS // least], dtype=np.int64)
            if len(ids) > 1 and len(found) < most and sum(map(len, found)) + len(ids) <= EDITED_TOKENS:
                found.append(ids)
    return list(itertools.islice(itertools.cycle(found), max(least, len(found)))) if found else []


def _other_ids(ids: np.ndarray, run: RunInputs) -> np.ndarray:
    """Random ids, none of which is the original one at its place."""
    vocabulary = run.model_config.vocab_size
    return (ids + np.random.default_rng(0).integers(1, vocabulary, len(ids))) % vocabulary


def _logits(packed: PackedLanguageModel, ids: list[np.ndarray], where: np.ndarray, run: RunInputs) -> torch.Tensor:
    """fp32 logits at some positions of the packed documents, `(positions, vocabulary)`, on the CPU."""
    weights = [np.arange(len(part)) > 0 for part in ids]
    lengths = np.array([len(part) for part in ids])
    batch = collate(tuple(range(len(ids))), Documents(ids, weights, lengths, lengths - 1, "", ""))
    positions = torch.from_numpy(where)
    batch = dataclasses.replace(batch, target_positions=positions, target_ids=torch.zeros_like(positions))
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        packed(batch.to(run.device), visit=lambda logits, _: parts.append(logits.cpu()))
    return torch.cat(parts)


# --- The documents of step 1 in our packed model, and one by one in transformers' model -------------------------------


@dataclass(frozen=True)
class Document:
    """A document of the first step. ids, weights: `(tokens,)`; weights[t] is the factor of the loss of token t.

    micro_batch: its number over all ranks."""

    ids: np.ndarray
    weights: np.ndarray
    micro_batch: int = 0

    @property
    def divisor(self) -> float:
        """The sum of the weights."""
        return float(self.weights.sum(dtype=np.float64))


def documents_of_items(run: RunInputs, items: tuple[int, ...], micro_batch: int = 0) -> list[Document]:
    """The documents of some items of the training corpus, in order; a window of a token store has several."""
    documents = []
    for item in items:
        ids, weights = run.inputs.train.get(item)
        ends = np.cumsum(run.inputs.train.document_lengths(item))[:-1]
        parts = zip(np.split(ids, ends), np.split(weights, ends), strict=True)
        documents += [Document(part, factors, micro_batch) for part, factors in parts]
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
    for number, items in enumerate(bins):
        here = documents_of_items(run, items, number)
        batch = collate(items, run.inputs.train)
        owner = torch.searchsorted(batch.cu_seq_lens.long(), batch.target_positions, right=True) - 1
        batch, sums = dataclasses.replace(batch, target_sources=owner), LossSums(len(here) + 1, run.device)
        with torch.no_grad():
            packed(batch.to(run.device), sums)
        documents += here
        losses += sums.by_source[: len(here)].tolist()
    return documents, losses


@dataclass
class Reference:
    """What transformers computed for the first documents. losses: nats times weight, `(targets,)` of each document.

    model: with the gradient of (sum of losses / sum of weights of the whole step) until it is rounded, if `has_gradient`.
    """

    model: PreTrainedModel
    documents: list[Document]
    trained: dict[str, nn.Parameter]
    has_gradient: bool = True
    losses: list[np.ndarray] = field(default_factory=list)
    rounded_losses: list[np.ndarray] = field(default_factory=list)  # the same in bf16, maybe of fewer documents
    gradient_norm: float | None = None
    tensors: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # name -> (elements, stride of those that are kept)
    gradients: list[torch.Tensor] = field(default_factory=list)  # fp32 `(elements,)` of each document
    rounded_gradient: torch.Tensor | float = 0.0  # `(elements,)`, of the documents of `rounded_losses`

    @property
    def complete(self) -> bool:
        """Whether all documents of the step were computed in fp32."""
        return len(self.losses) == len(self.documents)

    @property
    def done(self) -> list[Document]:
        """The documents that were computed in fp32."""
        return self.documents[: len(self.losses)]

    @property
    def loss(self) -> float:
        """Nats per target token (by weight) of the documents that were computed."""
        return float(sum(map(np.sum, self.losses))) / (sum(document.divisor for document in self.done) or 1.0)

    def rounding(self, targets: float, dtype: torch.dtype) -> float:
        """How far rounding may move the mean loss of so many targets, in nats: a constant part, and one that averages out.

        Both are measured: bf16 against fp32. An fp32 run rounds 2^16 times finer; what its sums in another order do comes on top.
        """
        errors = [one - other for one, other in zip(self.rounded_losses, self.losses, strict=False) if len(one)]
        constant = falling = 0.0
        if errors:
            each = np.concatenate(errors)
            of_documents = [error.sum() ** 2 / len(error) for error in errors]  # the targets of one err alike
            constant, falling = abs(each.mean()), math.sqrt(max((each**2).mean(), np.mean(of_documents)))
        scale = EPS[dtype] / EPS[torch.bfloat16]
        measured = float(constant + falling / math.sqrt(max(1.0, targets)))
        return ROUNDINGS * scale * measured + 1e-5 * (1 + abs(self.loss))

    def as_json(self, run: RunInputs) -> dict[str, object]:
        """What the run's own first step is compared with."""
        targets = sum(document.divisor for document in self.documents)
        return {
            "loss": self.loss,
            "loss_allowed": self.rounding(targets, run.compute_dtype),
            "grad_norm": self.gradient_norm,
            "documents": len(self.losses),
            "of_documents": len(self.documents),
            "rounded_documents": len(self.rounded_losses),
            "complete": self.complete,
            "eps": EPS[run.compute_dtype],
        }


def load_reference(run: RunInputs, documents: list[Document]) -> Reference | None:
    """transformers' model of the run in fp32, with room for its gradient if memory has it; None if it does not fit at all.

    Raises UserError if transformers cannot load it.
    """
    path, lora = run.config.model.path, run.config.lora
    longest = max(len(document.ids) for document in documents)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(run.model_config).parameters())
    # The logits and one layer's scores of a document in fp32, four of each: forward, backward and temporaries.
    scores = run.model_config.num_attention_heads * longest**2 if longest <= EAGER_TOKENS else 0
    free = USABLE * free_bytes(run.device, 1) - 16 * (longest * run.model_config.vocab_size + scores)
    if 4 * count > free:
        return None
    gradient = 8 * count <= free and not lora.dropout  # which makes the run's own gradient random
    softcap = getattr(run.model_config, "attn_logit_softcapping", None)
    attention = "eager" if longest <= EAGER_TOKENS or softcap else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=run.model_config, dtype=torch.float32, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load {path}: {str(error).splitlines()[0]}") from error
    if lora.rank:
        add_adapters(model, lora, path)
        init_adapters(dict(model.named_parameters()), run.config.run.seed)
    model = cast(PreTrainedModel, nn.Module.to(model, run.device)).train(not lora.dropout)
    with torch.no_grad():  # the run's own weights are these
        for parameter in model.parameters():
            frozen = lora.rank and not parameter.requires_grad
            kept = DTYPES[run.config.model.compute_dtype] if frozen else parameter_dtype(run.config.optimizer.memory)
            parameter.copy_(parameter.to(kept))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not gradient:
        model.requires_grad_(False)
    elif longest > RECOMPUTED_TOKENS:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Reference(model, documents, trained, gradient)


def compute(reference: Reference, seconds: float) -> None:
    """Losses and gradients of the documents one by one in fp32, for about `seconds`, then in bf16; at least one document each.

    On a CPU they are seconds of this process's threads, so that other work on the machine does not change what is computed.
    """
    # The gradient of LoRA's A is zero as long as B is.
    parameters = {name: parameter for name, parameter in reference.trained.items() if ".lora_A." not in name}
    if reference.has_gradient:
        elements = min(SAMPLED, ALL_SAMPLED // len(reference.documents)) // len(parameters)
        reference.tensors = {name: (p.numel(), -(-p.numel() // max(1, elements))) for name, p in parameters.items()}
    gradients = _pass(reference, parameters, reference.losses, seconds)
    if reference.has_gradient:
        before = torch.zeros(())
        for total in gradients:
            reference.gradients.append(total - before)
            before = total
        squares = [p.grad.double().square().sum() for p in parameters.values() if p.grad is not None]
        reference.gradient_norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    reference.model.zero_grad(set_to_none=True)
    for parameter in reference.model.parameters():  # not its buffers, which a run keeps in fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded = _pass(reference, parameters, reference.rounded_losses, seconds)
    reference.rounded_gradient = sum(rounded, torch.zeros(()))


def _pass(reference: Reference, parameters: dict, losses: list[np.ndarray], seconds: float) -> list[torch.Tensor]:
    """Fill `losses`; returns the sampled gradient after each document: the sum so far in fp32, that of the document in bf16."""
    divisor = sum(document.divisor for document in reference.documents) or 1.0
    threads = torch.get_num_threads() if reference.model.device.type == "cpu" else 0
    clock = (lambda: time.process_time() / threads) if threads else time.monotonic
    end, found = clock() + seconds, []
    for document in reference.documents:
        try:
            loss = _document_losses(reference, document, divisor)
        except torch.OutOfMemoryError:
            if not reference.has_gradient:
                return found  # what was computed before still counts
            reference.has_gradient = False
            reference.model.zero_grad(set_to_none=True)
            _free()
            loss = _document_losses(reference, document, divisor)
        losses.append(loss)
        if reference.has_gradient:
            found.append(torch.cat([_sampled(p, reference.tensors[name][1]) for name, p in parameters.items()]))
            if reference.model.dtype == torch.bfloat16:  # which would lose what is small beside the sum
                reference.model.zero_grad(set_to_none=True)
        if clock() > end:
            break
    return found


def _sampled(parameter: nn.Parameter, stride: int) -> torch.Tensor:
    gradient = parameter.detach().new_zeros(()).expand(parameter.shape) if parameter.grad is None else parameter.grad
    return gradient.reshape(-1)[::stride].float().cpu()


def _document_losses(reference: Reference, document: Document, divisor: float) -> np.ndarray:
    """The weighted losses of one document in nats, `(targets,)`; the gradient of its part of the step is added to the others."""
    targets, model = np.flatnonzero(document.weights), reference.model
    if not len(targets):
        return np.zeros(0)
    ids = torch.from_numpy(np.asarray(document.ids, dtype=np.int64)).to(model.device)
    where = torch.from_numpy(targets).to(model.device)
    weights = torch.from_numpy(document.weights[targets].astype(np.float32)).to(model.device)
    with torch.set_grad_enabled(reference.has_gradient):
        scores = model(ids[None], use_cache=False).logits[0, where - 1].float()
        losses = F.cross_entropy(scores, ids[where], reduction="none") * weights
        if losses.requires_grad:
            (losses.sum() / divisor).backward()
    return losses.detach().double().cpu().numpy()


def write_sample(reference: Reference, path: Path) -> None:
    """Write the sampled gradient of each micro-batch `(micro-batches, elements)`, the `rounding` of their sum `(elements,)`, and
    in the metadata the size and stride of each tensor, in order."""
    gradients, done = torch.stack(reference.gradients), len(reference.rounded_losses)
    numbers = torch.tensor([document.micro_batch for document in reference.documents])
    sums = torch.zeros(int(numbers.max()) + 1, gradients.shape[1]).index_add_(0, numbers, gradients)
    rounding = reference.rounded_gradient - gradients[:done].sum(0)
    rounding *= math.sqrt(len(gradients) / done)  # errors of other documents are independent
    save_file({"gradients": sums, "rounding": rounding}, path, {"tensors": json.dumps(reference.tensors)})


def compare_losses(run: RunInputs, losses: list[float], reference: Reference) -> Result:
    """Our losses of step 1 against those of transformers, document by document."""
    done = [i for i, document in enumerate(reference.done) if document.divisor]
    if not done:
        return Result("model", "loss", SKIPPED, "step 1 has no target")
    weights = np.array([reference.documents[i].divisor for i in done])
    ours, theirs = (
        np.array([losses[i] for i in done]) / weights,
        np.array([reference.losses[i].sum() for i in done]) / weights,
    )
    allowed = np.array([reference.rounding(weight, run.compute_dtype) for weight in weights])
    excess = np.nan_to_num(np.abs(ours - theirs) / allowed, nan=np.inf)
    mean_ours, mean = float(np.average(ours, weights=weights)), float(np.average(theirs, weights=weights))
    mean_allowed = reference.rounding(weights.sum(), run.compute_dtype)
    worst = int(excess.argmax())
    figures = {
        "ours": mean_ours,
        "transformers": mean,
        "allowed": mean_allowed,
        "largest_relative": float(np.max(np.abs(ours - theirs) / np.maximum(1e-6, np.abs(theirs)))),
        "largest_excess": float(excess[worst]),
        "documents": len(done),
        "of_documents": len(reference.documents),
    }
    text = (
        f"step 0: {mean_ours:.4f} nats a target, transformers {mean:.4f} ({dtype_name(run.compute_dtype)} against float32, "
        f"{mean_allowed:.2g} allowed); over {len(done)} of {len(reference.documents)} documents the largest difference is "
        f"{figures['largest_relative']:.2%}"
    )
    if excess[worst] <= 1 and abs(mean_ours - mean) <= mean_allowed:
        return Result(
            "model", "loss", OK, text + " (the rest is left out for time)" * (not reference.complete), figures
        )
    text += (
        f"; document {done[worst] + 1} has {ours[worst]:.4f} against {theirs[worst]:.4f}, where rounding explains "
        f"{allowed[worst]:.2g}: the packed model does not compute what transformers computes; do not train before this is explained"
    )
    return Result("model", "loss", FAILS, text, figures)


# --- Precision --------------------------------------------------------------------------------------------------------


def check_bf16(run: RunInputs) -> Result:
    """Whether the device computes in the dtype of the config."""
    asked = DTYPES[run.config.model.compute_dtype]
    if asked != run.compute_dtype:
        text = f"no native bf16 on this device ({run.device.type}): the run computes in fp32, more slowly"
        return Result("precision", "compute dtype", WARNING, text)
    where = "natively" if asked == torch.bfloat16 else "as the config says"
    return Result("precision", "compute dtype", OK, f"{run.config.model.compute_dtype} {where} on {run.device.type}")


def check_finite(reference: Reference) -> Result:
    """Whether all weights are finite numbers."""
    named = list(reference.model.named_parameters())
    bad = [name for name, parameter in named if not bool(torch.isfinite(parameter.detach()).all())]
    if bad:
        text = f"{len(bad)} tensors have weights that are not finite, the first is {bad[0]}: download the model again"
        return Result("precision", "finite", FAILS, text, {"tensors": bad[:10]})
    return Result("precision", "finite", OK, f"the weights are finite in {len(named)} tensors")


def check_movement(run: RunInputs, reference: Reference) -> Result:
    """Whether a run of this length can move its weights further than the rounding of bf16, and than its noise.

    No weight moves further than about the sum of all learning rates: that of a gradient that never changes its sign. With
    stochastic rounding, each step adds noise of variance rate x ulp, so the movement over the noise is at most the root of
    (sum of rates / ulp). The noise of a weight is no failure: over many weights it averages out, and the mean is exact.
    """
    settings, steps, warmup = run.config.optimizer, run.inputs.total_steps, run.inputs.warmup_steps
    total = sum_of_rates(settings.learning_rate, settings.min_lr_ratio, steps, warmup)
    matrices = [p.detach() for p in reference.trained.values() if p.dim() >= 2]
    gaps = torch.cat([ulp(p.flatten()[:: max(1, p.numel() // 2**15)], torch.bfloat16).cpu() for p in matrices])
    unmoved = float((total < gaps / 2).double().mean())
    signal = math.sqrt(total / float(gaps.median()))
    figures = {"sum_of_rates": total, "unmoved": unmoved, "signal": signal, "steps": steps}
    limit, mend = (
        f"{steps} steps move a weight by {total:.2g} at most",
        "raise optimizer.learning_rate or the number of steps",
    )
    stored = parameter_dtype(settings.memory)
    if torch.bfloat16 in (run.compute_dtype, stored) and unmoved > UNMOVED:
        text = f"{limit}, less than half of the gap between two bf16 numbers for {unmoved:.1%} of the weights: bf16 loses it; {mend}"
        return Result("precision", "movement", FAILS if unmoved > STUCK else WARNING, text, figures)
    if stored == torch.float32:
        text = f"{limit}; {unmoved:.1%} of the weights cannot reach the next bf16 number"
        return Result("precision", "movement", OK, text, figures)
    text = f"{limit}, {signal:.1f} times the noise of stochastic rounding at the median weight"
    if signal < SIGNAL:
        return Result("precision", "movement", WARNING, f"{text}: {mend}, or set optimizer.memory=16N", figures)
    return Result("precision", "movement", OK, text, figures)


def sum_of_rates(peak: float, min_ratio: float, steps: int, warmup: int) -> float:
    """The learning rates of all steps added up: half of the peak in warm-up, then the mean of the cosine."""
    return peak * (min(steps, warmup) / 2 + max(0, steps - warmup) * (1 + min_ratio) / 2)


def ulp(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gap between a number and the next larger one in magnitude, fp32, for numbers of `dtype`. Of 0: the smallest normal one."""
    smallest = torch.finfo(dtype).tiny
    _, exponent = torch.frexp(weight.float().abs().clamp(min=smallest))
    return torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent + int(math.log2(EPS[dtype])))


if __name__ == "__main__":
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if "--devices" not in sys.argv:  # this process stands alone, and nothing may wait for its peers
            os.environ.pop(name, None)
    run_script(main)
