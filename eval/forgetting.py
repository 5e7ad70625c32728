"""How much of its general language a model forgets while it learns a domain, measured against the model it started from.

Four figures, on text and questions that neither replay nor a Fisher has seen:

- perplexity per byte: exp(nats / bytes). Bytes, since tokens of another vocabulary cannot be compared;
- KL(base || tuned): the mean over tokens, in nats, of the sum over the vocabulary of p_base (log p_base - log p_tuned). It sees
  all that the model would now say otherwise, also where the one token that the text has is as probable as before;
- agreement: the share of tokens at which both find the same next token most probable;
- questions: the share of eval/questions.jsonl that is answered rightly (eval/questions.py).

Here they are measured during training, on the sharded model: the base's distributions on a fixed part of the text are
computed once at the start, from the weights that training starts from. eval/compare_models.py compares two exported models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from data.batches import collate, micro_batches, plan_validation
from data.examples import Documents
from distributed.process_group import StopSignal
from distributed.sharding import evaluating
from eval.general_text import held_out_texts, pieces
from eval.questions import Question, beginning, encode_options, read_questions, right_answers

# (logits fp32 (targets, vocabulary), target_ids (targets,), the document of each target: int64 (targets,)) of a chunk
Look = Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]
TEXT_BYTES = 8192  # of text, about 2,000 tokens, spread over what is held out


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions of one chunk of targets, in host memory.

    log_p: fp16 `(targets, tokens)`. fp16 has 11 bits: a log-probability near 0 is kept to 1e-4 or better, one of -10 to
    0.004, where p is 5e-5. It is normalised again when it is read, so that what remains of the rounding in KL is its square:
    below 1e-6 nats for a model against itself. most_probable: int64 `(targets,)`, from before the rounding.
    """

    log_p: torch.Tensor
    most_probable: torch.Tensor


@dataclass(frozen=True)
class General:
    """What is measured, and what the base said to it."""

    texts: Documents
    num_bytes: int  # of the texts
    questions: list[Question]
    options: Documents  # of all questions, in order
    row_tokens: int
    micro_batch: int
    shared_tokens: int | None
    base: list[Distributions] = field(default_factory=list)  # of this rank's chunks, in the order of the forwards

    @property
    def host_bytes(self) -> int:
        """What this rank keeps in host memory of the base."""
        return sum(tensor.nbytes for one in self.base for tensor in (one.log_p, one.most_probable))

    def line(self) -> str:
        """What is measured, for the run's log."""
        return (
            f"forgetting: {self.texts.targets.sum():,} tokens ({self.num_bytes:,} bytes) of general text, "
            f"{len(self.questions)} questions; the base's distributions take {self.host_bytes / 2**20:.1f} MiB of host memory "
            "on rank 0"
        )


def start_forgetting(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    row_tokens: int,
    micro_batch: int,
    stop: StopSignal,
    shared_tokens: int | None = None,
) -> General:
    """Compute the base's distributions; call it on every rank while the model holds the base's weights.

    row_tokens, micro_batch: how much one forward takes, as in training. shared_tokens: with a vocabulary that was extended,
    the tokens of the old one (`model.vocabulary.rows.first_new_row`): KL and agreement are then of the distribution over these, renormalised, since what new rows
    say before they are trained is no knowledge that could be forgotten. Default: the tokens of the tokenizer. A signal ends
    it early; `measure_forgetting` then gives nothing.
    """
    texts = spread_over(pieces(held_out_texts()), TEXT_BYTES)
    questions = read_questions()
    general = General(
        documents_of(encode_texts(tokenizer, texts)),
        sum(len(text.encode()) for text in texts),
        questions,
        documents_of(encode_options(tokenizer, questions)),
        row_tokens,
        micro_batch,
        shared_tokens or len(tokenizer),
    )

    def remember(scores: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        log_p = scores[:, : general.shared_tokens].log_softmax(-1)
        general.base.append(Distributions(log_p.half().cpu(), log_p.argmax(-1).cpu()))

    _forwards(model, general.texts, general, stop, remember)
    return general


def measure_forgetting(general: General, model: torch.nn.Module, stop: StopSignal) -> dict[str, float] | None:
    """The four figures by the name of their curve. Every rank runs as many forwards. None if a signal came.

    The distributions of one chunk at a time are on the device: the logits of model.loss.VISIT_TOKENS tokens, a few times.
    """
    text_sums = torch.zeros(3, dtype=torch.float64)  # nats, KL, agreements
    option_nats = torch.zeros(len(general.options), dtype=torch.float64)
    base = iter(general.base)

    def compare(scores: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        then = next(base)
        log_q = scores[:, : general.shared_tokens].log_softmax(-1)
        kl = divergence(then.log_p.to(scores.device), log_q)
        same = log_q.argmax(-1) == then.most_probable.to(scores.device)
        nats = torch.nn.functional.cross_entropy(scores, target_ids, reduction="none")
        text_sums.add_(torch.stack([nats.double().sum(), kl.double().sum(), same.double().sum()]).cpu())

    def answer(scores: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        nats = torch.nn.functional.cross_entropy(scores, target_ids, reduction="none")
        option_nats.index_add_(0, torch.from_numpy(owners), nats.double().cpu())

    done = _forwards(model, general.texts, general, stop, compare)
    done = done and _forwards(model, general.options, general, stop, answer)
    if not done:
        return None
    sums = torch.cat([text_sums, option_nats])
    dist.all_reduce(sums, group=stop.ranks.flags)
    tokens = int(general.texts.targets.sum())
    right = right_answers(general.questions, sums[3:].tolist())
    return {
        "forgetting/perplexity_per_byte": perplexity(sums[0].item() / general.num_bytes),
        "forgetting/kl": sums[1].item() / tokens,
        "forgetting/agreement": sums[2].item() / tokens,
        "forgetting/questions": sum(right) / len(right),
    }


def spread_over(texts: list[str], most: int) -> list[str]:
    """Every k-th text, so that together they have some `most` bytes (UTF-8); all of them if that is not more."""
    return texts[:: max(1, -(-sum(len(text.encode()) for text in texts) // most))]


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row in nats, fp32 `(rows,)`. log_p `(rows, tokens)` may be rounded: it is normalised again."""
    log_p = log_p.float().log_softmax(-1)
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q).clamp(min=0)  # never negative but for rounding


def perplexity(nats: float) -> float:
    """exp(nats), infinite where that is too large for a number."""
    return math.exp(nats) if nats < 700 else math.inf


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[bool]]]:
    """(token ids, is_target) of each text; all of its tokens are targets, what stands before it (`beginning`) is not."""
    first = beginning(tokenizer)
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    return [(first + ids, [False] * len(first) + [True] * len(ids)) for ids in encoded]


def documents_of(sequences: Sequence[tuple[list[int], list[bool]]]) -> Documents:
    """(token ids, is_target) pairs as documents that can be packed."""
    ids = [np.array(tokens, dtype=np.int64) for tokens, _ in sequences]
    is_target = [np.array(flags, dtype=bool) for _, flags in sequences]
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    targets = np.array([flags.sum() for flags in is_target], dtype=np.int64)
    return Documents(ids, is_target, lengths, targets, fingerprint="", report="")


def _forwards(model: torch.nn.Module, documents: Documents, general: General, stop: StopSignal, look: Look) -> bool:
    """Read all documents, dealt to the ranks. A collective; forwards come in the same order every time.

    False after a signal, on all ranks.
    """
    ranks = stop.ranks
    batch = plan_validation(documents, general.row_tokens, examples_per_step=len(documents)).batch(0)
    with evaluating(model):
        for items in micro_batches(batch.rows, documents, ranks.rank, ranks.world_size, general.micro_batch):
            if stop.agreed():  # the same on every rank
                return False
            read(model, documents, items, ranks.device, look)
    return True


def read(model: torch.nn.Module, documents: Documents, items: Sequence[int], device: torch.device, look: Look) -> None:
    """One forward over some documents, which may be none; `look` at each chunk of their targets."""
    micro = collate(tuple(items), documents).to(device)
    owners = np.repeat(np.array(items, dtype=np.int64), documents.targets[list(items)])

    def visit(scores: torch.Tensor, start: int) -> None:
        look(scores, micro.target_ids[start : start + len(scores)], owners[start : start + len(scores)])

    with torch.no_grad():
        model(micro, visit=visit)
