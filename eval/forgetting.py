"""How much general language a model forgets while it learns a domain, measured against the model it started from.

There are four metrics, on text and questions that neither replay nor the Fisher diagonal uses:

- perplexity per byte: exp(nats / bytes). It is per byte, because tokens of different vocabularies are not comparable.
- KL(base || tuned): the sum over the vocabulary of p_base (log p_base - log p_tuned), in nats, averaged over tokens. It
  sees every change of the predictions, even where the actual next token is as probable as before.
- agreement: the share of tokens at which both models have the same most probable next token.
- questions: the share of right answers in eval/questions.jsonl (eval/questions.py).

This file measures them during training, on the sharded model. The base's distributions on a fixed part of the text are
computed once, from the weights that training starts from. eval/compare_models.py compares two exported models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from data.batches import MicroBatch, collate
from data.dealing import Deal, Dealer
from data.examples import Documents
from distributed.process_group import StopSignal
from distributed.sharding import evaluating
from eval.general_text import held_out_texts, sample_evenly, split_into_pieces
from eval.questions import Question, encode_options, read_questions, right_answers, start_tokens
from model.loss import visit_logits

# Called for each chunk of targets with: logits fp32 (targets, vocabulary), target_ids (targets,), and owners int64
# (targets,), the index of each target's document.
VisitChunk = Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]
TEXT_BYTES = 8192  # about 2,000 tokens, spread evenly over the held-out text


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions of one chunk of targets, in host memory.

    log_p: fp16 `(targets, tokens)`. fp16 has an 11-bit significand, so the rounding error of a log-probability is at
    most 1e-4 near 0 and at most 0.004 at -10, where p is 5e-5. The distributions are normalized again when they are
    used, so rounding affects KL only to second order: KL of a model against itself is below 1e-6 nats. most_probable:
    int64 `(targets,)`, the argmax before rounding.
    """

    log_p: torch.Tensor
    most_probable: torch.Tensor


@dataclass(frozen=True)
class ForgettingReference:
    """The texts and questions to measure on, and the base's distributions on the texts."""

    texts: Documents
    text_deal: Deal
    num_bytes: int  # of the texts
    questions: list[Question]
    options: Documents  # of all questions, in order
    option_deal: Deal
    shared_tokens: int
    base: list[Distributions] = field(default_factory=list)  # of this rank's chunks, in the order of the forwards

    @property
    def host_bytes(self) -> int:
        """Host memory that the base's distributions take on this rank."""
        return sum(tensor.nbytes for chunk in self.base for tensor in (chunk.log_p, chunk.most_probable))

    def line(self) -> str:
        """What is measured, for the run's log."""
        return (
            f"forgetting: {self.texts.targets.sum():,} tokens ({self.num_bytes:,} bytes) of general text, "
            f"{len(self.questions)} questions; the base's distributions take {self.host_bytes / 2**20:.1f} MiB of host "
            "memory on rank 0"
        )


def start_forgetting(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dealer: Dealer,
    stop: StopSignal,
    shared_tokens: int | None = None,
) -> ForgettingReference:
    """Compute the base's distributions. A collective; call it while the model has the base's weights.

    dealer: how large one forward is, as in training. shared_tokens: the number of tokens before the vocabulary was extended (`model.architectures.first_new_row`). KL and agreement are then computed on the
    distribution over these tokens, renormalized, because the untrained rows of new tokens contain nothing that could be
    forgotten. Default: all tokens of the tokenizer. A signal stops it early; `measure_forgetting` then returns None.
    """
    pieces = sample_evenly(split_into_pieces(held_out_texts()), TEXT_BYTES)
    questions = read_questions()
    texts = as_documents(encode_texts(tokenizer, pieces))
    options = as_documents(encode_options(tokenizer, questions))
    reference = ForgettingReference(
        texts,
        dealer.deal(range(len(texts)), texts, stop.ranks.world_size),
        sum(len(piece.encode()) for piece in pieces),
        questions,
        options,
        dealer.deal(range(len(options)), options, stop.ranks.world_size),
        shared_tokens or len(tokenizer),
    )

    def remember(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        log_p = logits[:, : reference.shared_tokens].log_softmax(-1)
        reference.base.append(Distributions(log_p.half().cpu(), log_p.argmax(-1).cpu()))

    _visit_all(model, reference.text_deal, texts, stop, remember)
    return reference


def measure_forgetting(
    reference: ForgettingReference, model: torch.nn.Module, stop: StopSignal
) -> dict[str, float] | None:
    """The four metrics, by the names of their curves; None after a signal. A collective.

    Every rank runs the same number of forwards. The base's distributions are moved to the device one chunk at a
    time, so the extra device memory is a few times the logits of model.loss.LOSS_TOKENS tokens.
    """
    text_sums = torch.zeros(3, dtype=torch.float64)  # nats, KL, agreements
    option_nats = torch.zeros(len(reference.options), dtype=torch.float64)
    base_chunks = iter(reference.base)

    def compare(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        base = next(base_chunks)
        log_q = logits[:, : reference.shared_tokens].log_softmax(-1)
        kl = kl_divergence(base.log_p.to(logits.device), log_q)
        agrees = log_q.argmax(-1) == base.most_probable.to(logits.device)
        nats = torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")
        text_sums.add_(torch.stack([nats.double().sum(), kl.double().sum(), agrees.double().sum()]).cpu())

    def add_option_losses(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        nats = torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")
        option_nats.index_add_(0, torch.from_numpy(owners), nats.double().cpu())

    for deal, documents, visit in (
        (reference.text_deal, reference.texts, compare),
        (reference.option_deal, reference.options, add_option_losses),
    ):
        if not _visit_all(model, deal, documents, stop, visit):
            return None
    sums = torch.cat([text_sums, option_nats])
    dist.all_reduce(sums, group=stop.ranks.flags)
    tokens = int(reference.texts.targets.sum())
    right = right_answers(reference.questions, sums[3:].tolist())
    return {
        "forgetting/perplexity_per_byte": perplexity(sums[0].item() / reference.num_bytes),
        "forgetting/kl": sums[1].item() / tokens,
        "forgetting/agreement": sums[2].item() / tokens,
        "forgetting/questions": sum(right) / len(right),
    }


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row in nats, fp32 `(rows,)`. log_p `(rows, tokens)` may be rounded; it is normalized again."""
    log_p = log_p.float().log_softmax(-1)
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q).clamp(min=0)  # rounding may make it slightly negative


def perplexity(nats: float) -> float:
    """exp(nats), or infinity on overflow."""
    return math.exp(nats) if nats < 700 else math.inf


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[bool]]]:
    """(token ids, is_target) of each text. All its tokens are targets; the `start_tokens` before them are not."""
    start = start_tokens(tokenizer)
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    return [(start + ids, [False] * len(start) + [True] * len(ids)) for ids in encoded]


def as_documents(sequences: Sequence[tuple[list[int], list[bool]]]) -> Documents:
    """(token ids, is_target) pairs as documents that can be packed."""
    ids = [np.array(tokens, dtype=np.int64) for tokens, _ in sequences]
    is_target = [np.array(flags, dtype=bool) for _, flags in sequences]
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    targets = np.array([flags.sum() for flags in is_target], dtype=np.int64)
    return Documents(ids, is_target, lengths, targets, fingerprint="", report="")


def visit_documents(
    model: torch.nn.Module,
    documents: Documents,
    items: Sequence[int],
    device: torch.device,
    visit: VisitChunk,
    part: Callable[[MicroBatch], MicroBatch] = lambda batch: batch,
) -> None:
    """One forward over the documents with the indices `items` (possibly none), without gradients.

    `visit` is called for each chunk of their targets; of those that this rank computes, if ranks share a micro-batch. part:
    what this rank computes of a micro-batch.
    """
    owner = torch.from_numpy(np.repeat(np.array(items, dtype=np.int64), documents.targets[list(items)]))
    micro_batch = part(replace(collate(tuple(items), documents), target_sources=owner))
    owners = cast(torch.Tensor, micro_batch.target_sources).numpy()
    micro_batch = micro_batch.to(device)

    def visit_chunk(logits: torch.Tensor, start: int) -> None:
        chunk = slice(start, start + len(logits))
        visit(logits, micro_batch.target_ids[chunk], owners[chunk])

    with torch.no_grad():
        visit_logits(model.head, model(micro_batch), visit_chunk)


def _visit_all(model: torch.nn.Module, deal: Deal, documents: Documents, stop: StopSignal, visit: VisitChunk) -> bool:
    """Forward over all documents, each on one rank, in the same order every time. A collective.

    Returns False after a signal, on all ranks.
    """
    ranks = stop.ranks
    with evaluating(model):
        for items in deal.of_rank(ranks.rank):
            if stop.agreed():  # the same on every rank
                return False
            visit_documents(model, documents, items, ranks.device, visit, lambda b: deal.part_of_rank(b, ranks.rank))
    return True
