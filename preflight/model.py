"""The checks of the model: documents do not see each other, and the loss of each equals transformers' own."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from common.dtypes import dtype_name
from data.batches import MicroBatch, collate
from data.examples import Documents
from model.language_model import PackedLanguageModel, load_for_evaluation
from model.loss import LossSums
from preflight.read import RunInputs
from preflight.reference import Document, Reference, bins_of_first_step, documents_of_items
from preflight.result import FAILS, OK, SKIPPED, Result

LEAK_TOKENS = 2048  # at most so many tokens are packed for the leak edit
POSITIONS = 256  # whose logits are compared
OTHER_LENGTH = 0.05  # of the largest logit: rounding of other matrix shapes, where bits cannot be asked for
# Largest difference of a document's loss: a share of it plus nats per target, by compute dtype
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.01, 0.02)}
MEAN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01}  # of the mean over all documents, as a share


def load_packed(run: RunInputs) -> PackedLanguageModel:
    """Our own model as the run computes it, unsharded, in the compute dtype."""
    return load_for_evaluation(run.model_config, run.config.model.path, run.compute_dtype, run.device)


# --- The leak edit ----------------------------------------------------------------------------------------------------


def check_leak(run: RunInputs, packed: PackedLanguageModel) -> Result:
    """Change document 1 of a packed row: the logits of the others keep their bits. Change the last token: none before it moves."""
    documents = _two_documents(run)
    if len(documents) < 2:
        return Result("model", "leak edit", SKIPPED, "the run has a single document, so none can leak into another")
    base, edited = documents, [_other_ids(documents[0], len(documents[0]), run), *documents[1:]]
    before = len(documents[0])
    total = sum(map(len, documents))
    spread = np.unique(np.linspace(before, total - 1, POSITIONS).astype(int))
    first = _logits(packed, base, [before - 1, *spread], run)
    second = _logits(packed, edited, [before - 1, *spread], run)
    longer = [_other_ids(documents[0], before + 7, run), *documents[1:]]
    third = _logits(packed, longer, [before + 6, *(spread + 7)], run)
    last = documents[-1].copy()
    last[-1] = (last[-1] + 1) % run.model_config.vocab_size
    causal = _logits(packed, [*documents[:-1], last], [before - 1, *spread], run)
    moved = float((first[0] - second[0]).abs().max())
    leak = float((first[1:] - second[1:]).abs().max())
    later = float((first[:-1] - causal[:-1]).abs().max())
    other = float((first[1:] - third[1:]).abs().max()) / max(1e-30, float(first.abs().max()))
    figures = {"leak": leak, "later": later, "other_length": other, "moved": moved, "documents": len(documents)}
    return Result("model", "leak edit", *_judge_leak(moved, leak, later, other, run), figures)


def _judge_leak(moved: float, leak: float, later: float, other: float, run: RunInputs) -> tuple[str, str]:
    """(status, text) for the largest changes of logits; `other` is a share of the largest logit."""
    mend = (
        "do not train with this attention; check model/packed_attention.py and the versions of torch and transformers"
    )
    if leak > 0 or other > OTHER_LENGTH:
        how = f"by up to {leak:.3g}" if leak else f"by {other:.1%} when its length changes"
        return FAILS, f"documents see each other: changing document 1 moves the logits of the next one {how}; {mend}"
    if later > 0:
        return (
            FAILS,
            f"a token sees later ones: changing the last token moves logits before it by up to {later:.3g}; {mend}",
        )
    if moved == 0:
        return FAILS, "changing document 1 does not even move its own logits: the model does not read its input"
    same = "the same bits" if other == 0 else f"equal to {other:.1g} of the largest logit"
    return OK, (
        f"document 1 changed: the next documents' logits keep their bits ({dtype_name(run.compute_dtype)}, "
        f"{run.device.type}), with another length {same}; no token sees later ones"
    )


def _two_documents(run: RunInputs) -> list[np.ndarray]:
    """Token ids of documents of the first steps: those of a micro-batch, at most LEAK_TOKENS, but two in any case."""
    found: list[np.ndarray] = []
    for step in range(min(8, run.inputs.total_steps)):
        for document in documents_of_items(run, run.inputs.plan.batch(step).items):
            ids = document.ids[: LEAK_TOKENS // 2]
            if len(ids) > 1 and (len(found) < 2 or (len(found) < 4 and sum(map(len, found)) + len(ids) <= LEAK_TOKENS)):
                found.append(np.asarray(ids, dtype=np.int64))
        if len(found) >= 2:
            break
    return found


def _other_ids(ids: np.ndarray, length: int, run: RunInputs) -> np.ndarray:
    """`length` random ids, none of which is the original one at its place."""
    vocabulary = run.model_config.vocab_size
    added = np.random.default_rng(0).integers(1, vocabulary, length)
    return (np.resize(ids, length) + added) % vocabulary


def _logits(
    packed: PackedLanguageModel, ids: list[np.ndarray], positions: Sequence[int], run: RunInputs
) -> torch.Tensor:
    """fp32 logits at some positions of the packed documents, `(positions, vocabulary)`, on the CPU."""
    weights = [np.arange(len(part)) > 0 for part in ids]
    lengths = np.array([len(part) for part in ids])
    batch = collate(tuple(range(len(ids))), Documents(ids, weights, lengths, lengths - 1, "", ""))
    where = torch.tensor([int(position) for position in positions])
    batch = dataclasses.replace(batch, target_positions=where, target_ids=torch.zeros_like(where))
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        packed(batch.to(run.device), visit=lambda logits, _: parts.append(logits.cpu()))
    return torch.cat(parts)


# --- Loss per document ------------------------------------------------------------------------------------------------


def packed_losses(run: RunInputs, packed: PackedLanguageModel) -> tuple[list[Document], list[float]]:
    """The documents of step 1 in the order of its micro-batches, and the sum of losses of each in our packed model."""
    documents: list[Document] = []
    losses: list[float] = []
    for items in bins_of_first_step(run):
        here = documents_of_items(run, items)
        batch, sums = _by_document(collate(items, run.inputs.train)), LossSums(len(here) + 1, run.device)
        with torch.no_grad():
            packed(batch.to(run.device), sums)
        documents += here
        losses += sums.by_source[: len(here)].tolist()
    return documents, losses


def _by_document(batch: MicroBatch) -> MicroBatch:
    """The micro-batch with each document as a source of its own, so that the losses are added up by document."""
    owner = torch.searchsorted(batch.cu_seq_lens.long(), batch.target_positions, right=True) - 1
    return dataclasses.replace(batch, target_sources=owner)


def compare_losses(run: RunInputs, losses: list[float], reference: Reference) -> Result:
    """Our losses of step 1 against those of transformers, document by document."""
    done = [i for i, document in enumerate(reference.documents[: len(reference.losses)]) if document.divisor]
    if not done:
        return Result("model", "loss", SKIPPED, "step 1 has no target")
    ours = np.array([losses[i] / reference.documents[i].divisor for i in done])
    theirs = np.array([reference.losses[i] / reference.documents[i].divisor for i in done])
    share, nats = TOLERANCE[run.compute_dtype]
    excess = np.abs(ours - theirs) / (share * np.abs(theirs) + nats)
    weights = np.array([reference.documents[i].divisor for i in done])
    mean_ours, mean = float(np.average(ours, weights=weights)), float(np.average(theirs, weights=weights))
    off, worst = mean_ours / mean - 1, int(np.nan_to_num(excess, nan=np.inf).argmax())
    figures = {
        "ours": mean_ours,
        "transformers": mean,
        "largest_relative": float(np.max(np.abs(ours - theirs) / np.maximum(1e-6, np.abs(theirs)))),
        "documents": len(done),
        "of_documents": len(reference.documents),
        "tokens": sum(len(reference.documents[i].ids) for i in done),
    }
    text = (
        f"step 0: {mean_ours:.4f} nats a target, transformers {mean:.4f} ({dtype_name(run.compute_dtype)} against "
        f"{dtype_name(reference.model.dtype)}); over {len(done)} of {len(reference.documents)} documents the largest "
        f"difference is {figures['largest_relative']:.2%}"
    )
    if not (excess[worst] <= 1 and abs(off) <= MEAN_TOLERANCE[run.compute_dtype]):
        text += (
            f", in document {done[worst] + 1} ({ours[worst]:.4f} against {theirs[worst]:.4f}): the packed model does not compute "
            "what transformers computes; do not train before this is explained"
        )
        return Result("model", "loss", FAILS, text, figures)
    if not reference.complete:
        return Result("model", "loss", OK, text + " (the rest is left out for time)", figures)
    return Result("model", "loss", OK, text, figures)


def describe_gradient(reference: Reference) -> Result:
    """The norm of the first step's gradient from transformers alone, with which the run's own is compared."""
    norm, json = reference.gradient_norm(), reference.as_json()
    if norm is None:
        text = (
            "no gradient of transformers' model is computed here, because memory does not hold it (run the check on a larger "
            "device for it) or lora.dropout makes the run's own random"
        )
        return Result("model", "gradient", SKIPPED, text, json)
    if not np.isfinite(norm):
        return Result("model", "gradient", FAILS, f"the gradient of step 1 is {norm}: check weights and data", json)
    if not reference.complete:
        text = f"norm of {len(reference.losses)} of {len(reference.documents)} documents: {norm:.4f}; the rest is left out for time"
        return Result("model", "gradient", SKIPPED, text, json)
    return Result("model", "gradient", OK, f"norm of step 1 from transformers, document by document: {norm:.4f}", json)
