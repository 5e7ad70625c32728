"""What a tuned model forgot against its base, both as model directories: the figures of eval/forgetting.py with intervals.

The two may have other vocabularies. Perplexity per byte and the questions are each model's own: its own tokens, summed over
the same bytes. KL and agreement need the same tokens, and are defined so:

- A token is shared if its string (as the vocabulary writes it) is in both vocabularies and both models have a row for it.
- A text is tokenised by the base's tokenizer. The tuned model reads the same tokens by the ids that it has for them,
  behind its own beginning of a text (BOS, or a line break).
- A target is compared if all tokens of its text before it are shared; what stands behind a token that the tuned model has
  no id for is left out, and counted.
- At a compared target both distributions are restricted to the shared tokens and normalised again; KL is of these, and
  agreement is whether both have the same most probable shared token.

For a vocabulary that was extended, shared is the whole old one, and every target is compared.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from data.batches import micro_batches, plan_validation
from data.examples import Documents
from distributed.process_group import Ranks
from eval.bootstrap import bootstrap
from eval.forgetting import divergence, documents_of, encode_texts, read
from eval.questions import Question, beginning, encode_options, right_answers
from model.language_model import PackedLanguageModel

FORWARD_TOKENS = 2048
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Loaded:
    """A model, whole on every rank, and its tokenizer."""

    model: PackedLanguageModel
    tokenizer: PreTrainedTokenizerBase


def before_after(
    base: Loaded,
    tuned: Loaded,
    texts: Sequence[str],
    questions: list[Question],
    ranks: Ranks,
    advance: Advance,
    seed: int,
) -> dict:
    """All figures as JSON: `value`, and `low` to `high`, 95% by the bootstrap over texts or questions; with what they are of.

    advance: called with the number of documents (texts, options) just read. Every rank calls it and gets the same.
    """
    kl, agreements, compared, shared = _compare(base, tuned, texts, ranks, advance)
    nats = [_nats(one, encode_texts(one.tokenizer, texts), ranks, advance) for one in (base, tuned)]
    right = [
        right_answers(questions, _nats(one, encode_options(one.tokenizer, questions), ranks, advance))
        for one in (base, tuned)
    ]
    num_bytes = np.array([len(text.encode()) for text in texts])
    of_texts = bootstrap(np.stack([*nats, num_bytes], axis=1), _perplexities, seed)
    result = {
        "texts": len(texts),
        "bytes": int(num_bytes.sum()),
        "perplexity_per_byte": {name: asdict(interval) for name, interval in of_texts.items()},
        "shared_tokens": shared,
        "targets": sum(len(ids) for ids in base.tokenizer(list(texts), add_special_tokens=False)["input_ids"]),
        "compared_targets": int(compared.sum()),
    }
    if compared.any():
        of_tokens = bootstrap(np.stack([kl, agreements, compared], axis=1), _per_token, seed)
        result |= {name: asdict(interval) for name, interval in of_tokens.items()}
    result["questions"] = {"all": _accuracies(questions, right, seed)}
    for kind in dict.fromkeys(question.kind for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.kind == kind]
        result["questions"][kind] = _accuracies(chosen, [[one[i] for i in chosen] for one in right], seed)
    return result


def shared_ids(base: Loaded, tuned: Loaded) -> tuple[list[int], list[int]]:
    """The ids of the shared tokens in the base and in the tuned model, in the order of the base's."""
    rows = [one.model.num_tokens for one in (base, tuned)]
    theirs = tuned.tokenizer.get_vocab()
    pairs = sorted((i, theirs[token]) for token, i in base.tokenizer.get_vocab().items() if token in theirs)
    pairs = [(i, j) for i, j in pairs if i < rows[0] and j < rows[1]]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _compare(
    base: Loaded, tuned: Loaded, texts: Sequence[str], ranks: Ranks, advance: Advance
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """KL, agreements and compared targets of each text, summed over its targets; and how many tokens are shared."""
    ours, theirs = shared_ids(base, tuned)
    to_tuned = dict(zip(ours, theirs, strict=True))
    columns = [torch.tensor(ids, device=ranks.device) for ids in (ours, theirs)]
    first = beginning(base.tokenizer), beginning(tuned.tokenizer)
    sequences = [], []
    for text in texts:
        ids = base.tokenizer.encode(text, add_special_tokens=False)
        readable = next((i for i, token in enumerate(ids) if token not in to_tuned), len(ids))
        ids = ids[: readable + 1]
        # The last one is only predicted: which id stands for it changes nothing.
        for one, begun, tokens in zip(sequences, first, (ids, [to_tuned.get(i, 0) for i in ids]), strict=True):
            one.append((begun + tokens, [False] * len(begun) + [True] * len(tokens)))
    documents = [documents_of(one) for one in sequences]
    sums = torch.zeros(len(texts), 3, dtype=torch.float64)
    for text in range(ranks.rank, len(texts), ranks.world_size):
        if ours:
            sums[text] = _compare_text((base.model, tuned.model), documents, columns, text, ranks.device)
        advance(2)
    dist.all_reduce(sums, group=ranks.flags)
    return *sums.T.numpy(), len(ours)


def _compare_text(
    models: Sequence[PackedLanguageModel],
    documents: Sequence[Documents],
    columns: Sequence[torch.Tensor],
    text: int,
    device: torch.device,
) -> torch.Tensor:
    """KL, agreements and compared targets of one text, fp64 `(3,)`. The base's distributions are kept, chunk by chunk."""
    chunks: deque[torch.Tensor] = deque()
    sums = torch.zeros(3, dtype=torch.float64)

    def keep(scores: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        chunks.append(_restricted(scores, columns[0]))

    def compare(scores: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        log_p, log_q = chunks.popleft(), _restricted(scores, columns[1])
        same = log_p.argmax(-1) == log_q.argmax(-1)
        parts = (divergence(log_p, log_q).double().sum(), same.double().sum())
        sums.add_(torch.tensor([*(part.item() for part in parts), len(same)]))

    for model, one, look in zip(models, documents, (keep, compare), strict=True):
        read(model, one, (text,), device, look)
    return sums


def _restricted(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return scores[:, columns].log_softmax(-1)


def _nats(one: Loaded, sequences: list[tuple[list[int], list[bool]]], ranks: Ranks, advance: Advance) -> np.ndarray:
    """-log-likelihood of the targets of each sequence, fp64; each rank reads some of them and all get all."""
    documents: Documents = documents_of(sequences)
    nats = torch.zeros(len(documents), dtype=torch.float64)

    def look(scores: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        losses = torch.nn.functional.cross_entropy(scores, target_ids, reduction="none")
        nats.index_add_(0, torch.from_numpy(owners), losses.double().cpu())

    rows = plan_validation(documents, FORWARD_TOKENS, examples_per_step=len(documents)).batch(0).rows
    for items in micro_batches(rows, documents, ranks.rank, ranks.world_size, 1):
        read(one.model, documents, items, ranks.device, look)
        advance(len(items))
    dist.all_reduce(nats, group=ranks.flags)
    return nats.numpy()


def _perplexities(sums: np.ndarray) -> dict[str, np.ndarray]:
    base, tuned = (np.exp(sums[..., column] / sums[..., 2]) for column in (0, 1))
    return {"base": base, "tuned": tuned, "change": tuned - base}


def _per_token(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"kl": sums[..., 0] / sums[..., 2], "agreement": sums[..., 1] / sums[..., 2]}


def _accuracies(questions: Sequence, right: Sequence[Sequence[bool]], seed: int) -> dict:
    def shares(sums: np.ndarray) -> dict[str, np.ndarray]:
        base, tuned = sums[..., 0] / len(questions), sums[..., 1] / len(questions)
        return {"base": base, "tuned": tuned, "change": tuned - base}

    intervals = bootstrap(np.array(right, dtype=float).T, shares, seed)
    return {"n": len(questions)} | {name: asdict(interval) for name, interval in intervals.items()}


def table(result: dict) -> str:
    """The figures as text; intervals are 95%."""
    rows = [("", "base", "tuned", "change", "95% interval", "of")]

    def add(name: str, figures: dict, of: str, scale: float = 1.0, unit: str = "", digits: int = 4) -> None:
        base, tuned, change = (figures[key]["value"] * scale for key in ("base", "tuned", "change"))
        low, high = (figures["change"][edge] * scale for edge in ("low", "high"))
        cells = (f"{base:.{digits}f}{unit}", f"{tuned:.{digits}f}{unit}", f"{change:+.{digits}f}")
        rows.append((name, *cells, f"{low:+.{digits}f} to {high:+.{digits}f}", of))

    add("perplexity per byte", result["perplexity_per_byte"], f"{result['bytes']:,} bytes in {result['texts']} texts")
    if "kl" in result:
        of = f"{result['compared_targets']:,} of {result['targets']:,} tokens, {result['shared_tokens']:,} shared"
        for name, key, scale, unit in (
            ("KL(base || tuned), nats/token", "kl", 1, ""),
            ("agreement of next tokens", "agreement", 100, "%"),
        ):
            value, low, high = (result[key][part] * scale for part in ("value", "low", "high"))
            digits = 1 if unit else 4
            rows.append((name, "", f"{value:.{digits}f}{unit}", "", f"{low:.{digits}f} to {high:.{digits}f}", of))
    for kind, figures in result["questions"].items():
        name = "questions answered rightly" if kind == "all" else f"  {kind}"
        add(name, figures, f"{figures['n']} questions", 100, "%", 1)
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if c in (0, 5) else '>'}{widths[c]}}" for c, cell in enumerate(row)).rstrip()
        for row in rows
    )
