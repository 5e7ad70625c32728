"""Measure how much a tuned model has forgotten, from two model directories, with the metrics of eval/forgetting.py.

The two models may have different vocabularies. Perplexity per byte and the questions use each model's own tokens,
summed over the same bytes. KL and agreement need the same tokens in both models and are defined as follows:

- A token is shared if its string (as written in the vocabulary) is in both vocabularies and both models have a row for
  it.
- A text is tokenized with the base's tokenizer. The tuned model gets the same tokens under its own ids, after its own
  start tokens (BOS, or a newline).
- A target is compared if all tokens of its text before it are shared. Targets after a token for which the tuned model
  has no id are excluded, and the number of compared targets is reported.
- At a compared target, both distributions are restricted to the shared tokens and renormalized. KL compares the
  restricted distributions. The models agree if both have the same most probable shared token.

If the vocabulary was only extended, the shared tokens are the whole old vocabulary and every target is compared.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from common.durable_files import write_json
from data.dealing import Deal, Dealer
from data.examples import Documents
from data.tokens import load_tokenizer
from distributed.process_group import StopSignal, read_on_first, start_process_group
from eval.bootstrap import bootstrap
from eval.forgetting import Reference, as_documents, compare, encode_texts, kl_divergence, visit_documents
from eval.general_text import SOURCE, evaluation_texts
from eval.intervals import Terms, change, interval, ratio
from eval.load_over_ranks import agreed_dtype, is_sharded, load_packed
from eval.over_ranks import TIMEOUT_MINUTES, in_turns, stop_all, token_bar
from eval.questions import Question, encode_options, read_questions, right_answers, start_tokens
from eval.report import aligned
from eval.results import prepare_output
from model.architectures import read_model_config
from model.dtypes import dtype_name
from model.fingerprint import fingerprint_of_base
from model.flops import count_work, document_costs
from model.language_model import PackedLanguageModel

FORWARD_TOKENS = 2048


@dataclass(frozen=True)
class ModelAndTokenizer:
    """A model, whole on every rank or sharded over all of them, and its tokenizer."""

    model: PackedLanguageModel
    tokenizer: PreTrainedTokenizerBase


def measure_forgetting(
    base: str,
    tuned: str,
    texts: Sequence[Path] | None = None,
    max_bytes: int = 200_000,
    dtype: str = "auto",
    sharding: str = "auto",
    json: Path | None = None,
) -> str | None:
    """Run `compare_models` on two model directories. Write the result to `json`, and return it as a table on rank 0.

    texts: files of general text, by default the text of `eval.general_text`. max_bytes: the approximate amount of text to read.
    dtype, sharding: the values of `--dtype` and `--sharding`. Starts and ends the process group. Raises UserError, on all
    ranks, if a file or a model cannot be read or written.
    """
    start = time.perf_counter()
    ranks = start_process_group(TIMEOUT_MINUTES)
    paths = (base, tuned)

    def read() -> tuple:
        if json:
            prepare_output(json)
        text_and_questions = evaluation_texts(texts, max_bytes), read_questions()
        return (
            *text_and_questions,
            [read_model_config(path) for path in paths],
            [load_tokenizer(path) for path in paths],
        )

    read_texts, questions, configs, tokenizers = read_on_first(read, ranks)
    compute_dtype = agreed_dtype(dtype, ranks)
    sharded = is_sharded(sharding, paths, ranks)
    models = [
        ModelAndTokenizer(load_packed(config, path, compute_dtype, sharded, ranks), tokenizer)
        for config, path, tokenizer in zip(configs, paths, tokenizers, strict=True)
    ]
    metrics = compare_models(models[0], models[1], read_texts, questions, StopSignal(ranks))
    shown = None
    if ranks.rank == 0:
        result = {
            "base": base,
            "tuned": tuned,
            "weights": {"base": fingerprint_of_base(base), "tuned": fingerprint_of_base(tuned)},
            "text": ", ".join(map(str, texts)) if texts else SOURCE,
            "dtype": dtype_name(compute_dtype),
            "processes": ranks.world_size,
            "sharding": "full" if sharded else "none",
            "seconds": round(time.perf_counter() - start, 1),
            **metrics,
        }
        where = f"{result['text']} ({result['dtype']}, {result['seconds']:.0f} s)"
        shown = f"{tuned} against {base} on {where}\n\n{table(result)}"
        if json:
            write_json(json, result)
    dist.destroy_process_group()
    return shown


def compare_models(
    base: ModelAndTokenizer,
    tuned: ModelAndTokenizer,
    texts: Sequence[str],
    questions: list[Question],
    stop: StopSignal,
) -> dict:
    """Compute all metrics, ready for JSON. A collective: every rank gets the same result.

    Each metric has its `value` and the bounds `low` and `high` of a 95% interval over texts (bootstrap) or questions (`eval.intervals`).
    `per_text` and `per_question` have the sums behind them, for paired tests between several tuned models
    (eval/comparison). Every rank runs the same number of forwards. A signal ends all ranks with KeyboardInterrupt.
    """
    kl, agreements, compared, num_shared = compare_distributions(base, tuned, texts, stop)
    models = (("base", base), ("tuned", tuned))
    nats = [_nats(model, encode_texts(model.tokenizer, texts), stop, f"perplexity of {name}") for name, model in models]
    right = [
        right_answers(
            questions, _nats(model, encode_options(model.tokenizer, questions), stop, f"questions to {name}").tolist()
        )
        for name, model in models
    ]
    num_bytes = np.array([len(text.encode()) for text in texts])
    perplexities = bootstrap(np.stack([*nats, num_bytes], axis=1), _perplexities)
    result = {
        "texts": len(texts),
        "bytes": int(num_bytes.sum()),
        "perplexity_per_byte": {name: asdict(bounds) for name, bounds in perplexities.items()},
        "shared_tokens": num_shared,
        "targets": sum(len(ids) for ids in base.tokenizer(list(texts), add_special_tokens=False)["input_ids"]),
        "compared_targets": int(compared.sum()),
    }
    if compared.any():
        per_token = bootstrap(np.stack([kl, agreements, compared], axis=1), _per_token)
        result |= {name: asdict(bounds) for name, bounds in per_token.items()}
    result["questions"] = {"all": _accuracies(questions, right)}
    for kind in dict.fromkeys(question.kind for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.kind == kind]
        result["questions"][kind] = _accuracies(chosen, [[is_right[i] for i in chosen] for is_right in right])
    result["per_text"] = {
        "base_nats": nats[0].tolist(),
        "tuned_nats": nats[1].tolist(),
        "bytes": num_bytes.tolist(),
        "kl": kl.tolist(),
        "compared": compared.tolist(),
    }
    result["per_question"] = {"base": [*map(bool, right[0])], "tuned": [*map(bool, right[1])]}
    return result


def shared_ids(base: ModelAndTokenizer, tuned: ModelAndTokenizer) -> tuple[list[int], list[int]]:
    """Return the ids of the shared tokens in the base and in the tuned model, in the order of the base's ids."""
    rows = [side.model.num_tokens for side in (base, tuned)]
    tuned_vocabulary = tuned.tokenizer.get_vocab()
    pairs = sorted(
        (i, tuned_vocabulary[token]) for token, i in base.tokenizer.get_vocab().items() if token in tuned_vocabulary
    )
    pairs = [(i, j) for i, j in pairs if i < rows[0] and j < rows[1]]
    return [i for i, _ in pairs], [j for _, j in pairs]


def compare_distributions(
    base: ModelAndTokenizer, tuned: ModelAndTokenizer, texts: Sequence[str], stop: StopSignal
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Compare the models' next-token distributions on every text. A collective.

    Returns KL in nats, agreements and the number of compared targets, each `(texts,)` and summed over the targets of a
    text, and the number of shared tokens.
    """
    ranks, models = stop.ranks, (base, tuned)
    base_ids, tuned_ids = shared_ids(base, tuned)
    to_tuned = dict(zip(base_ids, tuned_ids, strict=True))
    columns = [torch.tensor(ids, device=ranks.device) for ids in (base_ids, tuned_ids)]
    sequences = [], []
    for text in texts:
        ids = base.tokenizer.encode(text, add_special_tokens=False)
        num_shared = next((i for i, token in enumerate(ids) if token not in to_tuned), len(ids))
        ids = ids[: num_shared + 1]
        # The last token is only a target, and targets are not used here, so its id in the tuned model may be any.
        for of_model, model, tokens in zip(sequences, models, (ids, [to_tuned.get(i, 0) for i in ids]), strict=True):
            start = start_tokens(model.tokenizer)
            of_model.append((start + tokens, [False] * len(start) + [True] * len(tokens)))
    documents = [as_documents(of_model) for of_model in sequences]
    sums = torch.zeros(len(texts), 3, dtype=torch.float64)
    chunks: deque[torch.Tensor] = deque()  # the base's distributions of a text, until the tuned model has read it

    def keep(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        chunks.append(logits[:, columns[0]].log_softmax(-1))

    def compare_chunk(logits: torch.Tensor, target_ids: torch.Tensor, owners: np.ndarray) -> None:
        log_p, log_q = chunks.popleft(), logits[:, columns[1]].log_softmax(-1)
        agrees = log_p.argmax(-1) == log_q.argmax(-1)
        kl = kl_divergence(log_p, log_q).double().sum().item()
        sums[owners[0]] += torch.tensor([kl, agrees.sum().item(), len(agrees)])

    # One text in each forward. A rank without a text left has empty forwards.
    deal = _deal(base, documents[0], ranks.world_size, capacity=1, packing=False)
    turns = deal.of_rank(ranks.rank) if base_ids else []
    tokens = [2 * int(documents[0].lengths[list(items)].sum()) for items in turns]  # both models read them
    for items in in_turns(turns, tokens, "KL and agreement", ranks, stop):
        for model, of_model, visit in zip(models, documents, (keep, compare_chunk), strict=True):
            visit_documents(model.model, of_model, items, ranks.device, visit)
    dist.all_reduce(sums, group=ranks.flags)
    return *sums.T.numpy(), len(base_ids)


def _nats(
    model: ModelAndTokenizer, sequences: list[tuple[list[int], list[bool]]], stop: StopSignal, description: str
) -> np.ndarray:
    """Return the negative log-likelihood of the targets of each sequence, fp64 `(sequences,)`. A collective."""
    documents, ranks = as_documents(sequences), stop.ranks
    deal = _deal(model, documents, ranks.world_size, capacity=FORWARD_TOKENS)
    mine = [item for items in deal.of_rank(ranks.rank) for item in items]
    with token_bar(int(documents.lengths[mine].sum()), description, ranks) as bar:
        sums = compare(Reference(documents, deal), model.model, stop, bar.update)
    if sums is None:
        stop_all(ranks)
    return sums[:, 1].numpy()


def _deal(model: ModelAndTokenizer, documents: Documents, ranks: int, capacity: int, packing: bool = True) -> Deal:
    """Deal all documents to the ranks by their FLOPs in this model (data/dealing.py)."""
    costs = document_costs(count_work(model.model, model.model.causal_lm.config))
    return Dealer(capacity, costs, packing).deal(range(len(documents)), documents, ranks)


def _perplexities(sums: np.ndarray) -> dict[str, np.ndarray]:
    return _with_change(*(np.exp(sums[..., column] / sums[..., 2]) for column in (0, 1)))


def _with_change(base: np.ndarray, tuned: np.ndarray) -> dict[str, np.ndarray]:
    return {"base": base, "tuned": tuned, "change": tuned - base}


def _per_token(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"kl": sums[..., 0] / sums[..., 2], "agreement": sums[..., 1] / sums[..., 2]}


def _accuracies(questions: Sequence, right: Sequence[Sequence[bool]]) -> dict:
    base, tuned = (Terms(np.array([(is_right, 1.0) for is_right in each]), range(len(each)), ratio) for each in right)
    intervals = {"base": interval(base), "tuned": interval(tuned), "change": change(base, tuned)}
    return {"n": len(questions)} | {name: asdict(bounds) for name, bounds in intervals.items()}


def table(result: dict) -> str:
    """Return the result of `compare_models` as a text table."""
    rows = [("", "base", "tuned", "change", "95% interval", "of")]

    def add(name: str, metric: dict, of: str, scale: float = 1.0, unit: str = "", digits: int = 4) -> None:
        base, tuned, change = (metric[key]["value"] * scale for key in ("base", "tuned", "change"))
        low, high = (metric["change"][bound] * scale for bound in ("low", "high"))
        cells = (f"{base:.{digits}f}{unit}", f"{tuned:.{digits}f}{unit}", f"{change:+.{digits}f}")
        rows.append((name, *cells, f"{low:+.{digits}f} to {high:+.{digits}f}", of))

    add("perplexity per byte", result["perplexity_per_byte"], f"{result['bytes']:,} bytes in {result['texts']} texts")
    if "kl" in result:
        of = f"{result['compared_targets']:,} of {result['targets']:,} tokens, {result['shared_tokens']:,} shared"
        value, low, high = (result["kl"][part] for part in ("value", "low", "high"))
        rows.append(("KL(base || tuned), nats/token", "", f"{value:.4f}", "", f"{low:.4f} to {high:.4f}", of))
        value, low, high = (100 * result["agreement"][part] for part in ("value", "low", "high"))
        rows.append(("next-token agreement", "", f"{value:.1f}%", "", f"{low:.1f} to {high:.1f}", of))
    for kind, accuracy in result["questions"].items():
        name = "questions answered correctly" if kind == "all" else f"  {kind}"
        add(name, accuracy, f"{accuracy['n']} questions", 100, "%", 1)
    return "\n".join(aligned(rows))
