"""How much general language a model forgets while it learns a domain, measured against the model it started from.

There are four metrics, on text and questions that neither replay nor the Fisher diagonal uses:

- perplexity per byte: exp(nats / bytes). It is per byte, because tokens of different vocabularies are not comparable.
- KL(base || tuned): the sum over the vocabulary of p_base (log p_base - log p_tuned), in nats, averaged over tokens. It
  sees every change of the predictions, even where the actual next token is as probable as before.
- agreement: the share of tokens at which base and tuned model have the same most probable next token.
- questions: the share of right answers in eval/questions.jsonl (eval/questions.py).

A fifth one, KL(base || tuned) on prompts of the task, predicts forgetting (arXiv:2509.04259).

This file measures them during training, on the sharded model. The base's distributions on a fixed part of the text are
computed once, from the weights that training starts from. eval/compare_models.py compares two exported models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from data.batches import MicroBatch, collate
from data.dealing import Deal, Dealer
from data.examples import Documents, in_memory
from data.sources import Windows
from distributed.process_group import StopSignal
from distributed.sharding import evaluating
from eval.general_text import held_out_texts, sample_evenly, split_into_pieces
from eval.questions import Question, encode_options, read_questions, right_answers, start_tokens
from model.loss import visit_logits

# Called for each chunk of targets with: logits fp32 (targets, vocabulary), target_ids (targets,), and owners int64
# (targets,), the index of each target's document.
VisitChunk = Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]
TEXT_BYTES = 8192  # about 2,000 tokens, spread evenly over the held-out text
TASK_TOKENS = 1024  # of prompts of the task on which distributions are compared
FEWEST_PROMPTS = 8  # where prompts are long, only the last tokens of each are compared


# Next-token distributions of one chunk of targets, in host memory: their logarithms fp16 (targets, tokens), and the most
# probable tokens int64 (targets,), the argmax before rounding. fp16 has an 11-bit significand, so the rounding error of a
# log-probability is at most 1e-4 near 0 and at most 0.004 at -10, where p is 5e-5. The distributions are normalized again when
# they are used, so rounding affects KL only to second order: KL of a model against itself is below 1e-6 nats.
Distributions = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """Documents dealt to the ranks, and the base model's distribution over the first `shared_tokens` tokens at each target.

    base: the distributions of this rank's chunks, in the order of its forwards. None if only the nats are measured.
    """

    documents: Documents
    deal: Deal
    shared_tokens: int = 0
    base: list[Distributions] | None = None


@dataclass(frozen=True)
class ForgettingReference:
    """The texts, questions and prompts on which forgetting is measured."""

    texts: Reference
    num_bytes: int  # of the texts
    prompts: Reference | None  # prompts of the task
    questions: list[Question]
    options: Reference  # of all questions, in order; without the base

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the base's distributions take on this rank."""
        references = (self.texts, self.prompts)
        chunks = [chunk for reference in references if reference for chunk in reference.base or ()]
        return sum(tensor.nbytes for chunk in chunks for tensor in chunk)

    def line(self) -> str:
        """Describe the reference in one line of the run's log."""
        prompts = ""
        if self.prompts:
            documents = self.prompts.documents
            prompts = f", {documents.targets.sum():,} tokens of {len(documents)} prompts of data.validation"
        return (
            f"forgetting: {self.texts.documents.targets.sum():,} tokens ({self.num_bytes:,} bytes) of general text, "
            f"{len(self.questions)} questions{prompts}; the base's distributions take {self.host_bytes / 2**20:.1f} MiB of "
            "host memory on rank 0"
        )


def start_forgetting(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dealer: Dealer,
    stop: StopSignal,
    shared_tokens: int | None = None,
    prompts: Documents | None = None,
) -> ForgettingReference:
    """Compute the base's distributions. A collective; call it while the model has the base's weights.

    dealer: sets the size of one forward, as in training. shared_tokens: the number of tokens before the vocabulary was extended
    (`model.architectures.first_new_row`), by default all tokens of the tokenizer. KL and agreement are computed on the
    distribution over these tokens, renormalized, because the untrained rows of new tokens contain nothing that could be
    forgotten. prompts: prompts of the task (`task_prompts`). A signal stops it early; `measure_forgetting` then returns None.
    """
    pieces = sample_evenly(split_into_pieces(held_out_texts()), TEXT_BYTES)
    questions = read_questions()
    texts = as_documents(encode_texts(tokenizer, pieces))
    options = as_documents(encode_options(tokenizer, questions))
    settings = dealer, shared_tokens or len(tokenizer), stop
    return ForgettingReference(
        remember_base(model, texts, *settings),
        sum(len(piece.encode()) for piece in pieces),
        remember_base(model, prompts, *settings) if prompts else None,
        questions,
        Reference(options, dealer.deal(range(len(options)), options, stop.ranks.world_size)),
    )


def task_prompts(documents: Documents | Windows) -> Documents | None:
    """Return the tokens of examples up to and with the first token of the first answer. None if the data are texts.

    The examples are spread evenly over the data. At most TASK_TOKENS tokens are targets, the last tokens of each prompt.
    """
    if not isinstance(documents, Documents):  # windows of a token store are text
        return None
    examples = documents.items_with_targets()
    prompts = []
    for item in examples[:: max(1, len(examples) // (TASK_TOKENS // FEWEST_PROMPTS))]:
        ids, weights = documents.get(item)
        answer = int(np.flatnonzero(weights)[0])
        if answer > 1:
            prompts.append(ids[: answer + 1].tolist())
    if not prompts:
        return None
    most = max(FEWEST_PROMPTS, TASK_TOKENS * len(prompts) // sum(map(len, prompts)))
    chosen = prompts[:: -(-len(prompts) // most)]
    targets = [min(len(ids) - 1, TASK_TOKENS // len(chosen)) for ids in chosen]
    return as_documents([(ids, [False] * (len(ids) - n) + [True] * n) for ids, n in zip(chosen, targets, strict=True)])


def remember_base(
    model: torch.nn.Module, documents: Documents, dealer: Dealer, shared_tokens: int, stop: StopSignal
) -> Reference:
    """Store the base's distributions on documents. A collective; call it while the model has the base's weights.

    A signal stops it early; `compare` then returns None.
    """
    deal, base = dealer.deal(range(len(documents)), documents, stop.ranks.world_size), list[Distributions]()

    def remember(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        log_p = logits[:, :shared_tokens].log_softmax(-1)
        base.append((log_p.half().cpu(), log_p.argmax(-1).cpu()))

    _visit_all(model, deal, documents, stop, remember)
    return Reference(documents, deal, shared_tokens, base)


def compare(
    reference: Reference,
    model: torch.nn.Module,
    stop: StopSignal,
    advance: Callable[[int], object] = lambda tokens: None,
) -> torch.Tensor | None:
    """Sum over each document's targets: 1, nats, KL and agreements, fp64 `(documents, 4)`. A collective.

    Return None after a signal, also an earlier one. Every rank gets the same sums. The base's distributions are moved to the
    device one chunk at a time, so the extra device memory is a few times the logits of model.loss.LOSS_TOKENS tokens. advance:
    called with the number of tokens that this rank has just read.
    """
    sums = torch.zeros(len(reference.documents), 4, dtype=torch.float64)
    base_chunks = iter(reference.base or ())

    def add(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        nats = torch.nn.functional.cross_entropy(logits, target_ids, reduction="none")
        columns = [torch.ones_like(nats), nats, torch.zeros_like(nats), torch.zeros_like(nats)]
        if reference.base is not None:
            log_p, most_probable = (tensor.to(logits.device) for tensor in next(base_chunks))
            log_q = logits[:, : reference.shared_tokens].log_softmax(-1)
            columns[2:] = kl_divergence(log_p, log_q), log_q.argmax(-1) == most_probable
        of_targets = torch.stack([column.double() for column in columns], dim=1)
        sums.index_add_(0, torch.from_numpy(owners), of_targets.cpu())

    if not _visit_all(model, reference.deal, reference.documents, stop, add, advance):
        return None
    dist.all_reduce(sums, group=stop.ranks.flags)
    return sums


def measure_forgetting(
    reference: ForgettingReference, model: torch.nn.Module, stop: StopSignal
) -> dict[str, float] | None:
    """Return the metrics by the names of their curves, or None after a signal. A collective.

    Every rank runs the same number of forwards.
    """
    measured = (reference.texts, reference.options, reference.prompts)
    parts = [compare(part, model, stop) for part in measured if part]
    if any(part is None for part in parts):
        return None
    texts, options, *prompts = [part for part in parts if part is not None]
    tokens, nats, kl, agreements = texts.sum(0).tolist()
    right = right_answers(reference.questions, options[:, 1].tolist())
    figures = {
        "forgetting/perplexity_per_byte": perplexity(nats / reference.num_bytes),
        "forgetting/kl": kl / tokens,
        "forgetting/agreement": agreements / tokens,
        "forgetting/questions": sum(right) / len(right),
    }
    if prompts:
        figures["forgetting/task_kl"] = (prompts[0][:, 2].sum() / prompts[0][:, 0].sum()).item()
    return figures


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of each row in nats, fp32 `(rows,)`. log_p `(rows, tokens)` may be rounded; it is normalized again."""
    log_p = log_p.float().log_softmax(-1)
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q).clamp(min=0)  # rounding may make it slightly negative


def perplexity(nats: float) -> float:
    """Return exp(nats), or infinity on overflow."""
    return math.inf if nats >= 700 else math.exp(nats)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[bool]]]:
    """Return (token ids, is_target) of each text. All its tokens are targets, except the `start_tokens` before it."""
    start = start_tokens(tokenizer)
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    return [(start + ids, [False] * len(start) + [True] * len(ids)) for ids in encoded]


def as_documents(sequences: Sequence[tuple[list[int], list[bool]]]) -> Documents:
    """Convert (token ids, is_target) pairs into documents that can be packed."""
    ids = [np.array(tokens, dtype=np.int64) for tokens, _ in sequences]
    return in_memory(ids, [np.array(flags, dtype=bool) for _, flags in sequences])


def visit_documents(
    model: torch.nn.Module,
    documents: Documents,
    items: Sequence[int],
    device: torch.device,
    visit: VisitChunk,
    part: Callable[[MicroBatch], MicroBatch] = lambda batch: batch,
) -> None:
    """Run one forward over the documents with the indices `items` (possibly none), without gradients.

    `visit` is called for each chunk of targets. part: selects this rank's part of a micro-batch, if ranks share one.
    """
    owner = torch.from_numpy(np.repeat(np.array(items, dtype=np.int64), documents.targets[list(items)]))
    micro_batch = part(replace(collate(tuple(items), documents), target_sources=owner))
    owners = cast(torch.Tensor, micro_batch.target_sources).numpy()
    micro_batch = micro_batch.to(device)

    def visit_chunk(logits: torch.Tensor, start: int) -> None:
        chunk = slice(start, start + len(logits))
        visit(logits, micro_batch.target_ids[chunk], owners[chunk])

    with torch.no_grad():
        visit_logits(cast(torch.nn.Module, model.head), model(micro_batch), visit_chunk)


def _visit_all(
    model: torch.nn.Module,
    deal: Deal,
    documents: Documents,
    stop: StopSignal,
    visit: VisitChunk,
    advance: Callable[[int], object] = lambda tokens: None,
) -> bool:
    """Run forwards over all documents, each on one rank, in the same order every time. A collective.

    Return False, on all ranks, after a signal.
    """
    ranks = stop.ranks
    with evaluating(model):
        for items in deal.of_rank(ranks.rank):
            if stop.agreed():  # the same on every rank
                return False
            visit_documents(model, documents, items, ranks.device, visit, lambda b: deal.part_of_rank(b, ranks.rank))
            advance(int(documents.lengths[list(items)].sum()))
    return True
