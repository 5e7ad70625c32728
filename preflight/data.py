"""The checks of data: what is shown, lost, repeated, shared with validation, and how full the steps are."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Data
from data.examples import Documents
from data.held_out import content_hash, is_held_out, num_shared
from data.show import Style
from data.sources import MAIN, Corpus
from data.token_texts import one_line, run_text
from preflight.chats import MANY, MOST, RARE, check_chats
from preflight.read import RunInputs
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from training.inputs import Inputs
from training.show_data import Examples

SHOWN, SHOWN_CHARACTERS, SHOWN_BEFORE = 3, 100, 12  # examples; characters of a target at each end; tokens before it
STEPS, DEALS = 200, 50  # first steps whose targets are counted, and whose micro-batches are
FEW_TARGETS = 0.01  # of the tokens of a step, or of the targets of the mean step
COMPARED = 20_000  # examples of each side whose prompts are compared
LOST = {  # counts of data/example_build.py -> what happened
    "drop": "dropped as too long",
    "truncate": "truncated",
    "empty": "without a target",
    "empty_truncated": "without a target after truncation",
    "skipped": "malformed",
}


def check_data(run: RunInputs) -> list[Result]:
    """All checks of the data of a run."""
    data, inputs = run.config.data, run.inputs
    return [
        show_examples(inputs, run.tokenizer),
        *check_chats(run.config, run.tokenizer),
        check_lost(inputs.train),
        check_duplicates(inputs.train),
        check_disjoint(inputs),
        check_prompts_apart(data),
        check_targets(inputs),
        check_padding(inputs, data),
        check_vocabulary(inputs, run.model_config.vocab_size),
    ]


def show_examples(inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> Result:
    """The first documents of the first step with their targets; `lines` of the figures are to be printed."""
    lines = []
    for item in inputs.plan.batch(0).items[:SHOWN]:
        ids, weights = inputs.train.get(item)
        lines.append(_brief(tokenizer, ids.tolist(), np.flatnonzero(weights)))
    text = f"the first {len(lines)} of {len(inputs.plan.batch(0).items)} documents of step 1; targets stand between ⟦ and ⟧"
    return Result("data", "examples", OK, text, {"lines": lines})


def _brief(tokenizer: PreTrainedTokenizerBase, ids: list[int], targets: np.ndarray) -> str:
    """The first run of targets of a document with what stands before it, shortened in its middle."""
    size = f"{len(ids):,} tokens, {len(targets):,} targets"
    if not len(targets):
        return size
    runs = np.split(targets, np.flatnonzero(np.diff(targets) > 1) + 1)
    first, end = int(runs[0][0]), int(runs[0][-1]) + 1
    before = one_line(run_text(tokenizer, ids, max(0, first - SHOWN_BEFORE), first))
    if end - first > SHOWN_CHARACTERS:  # a token has at least a character, nearly always
        head = one_line(run_text(tokenizer, ids, first, first + SHOWN_CHARACTERS))[:SHOWN_CHARACTERS]
        tail = one_line(run_text(tokenizer, ids, end - SHOWN_CHARACTERS, end))[-SHOWN_CHARACTERS:]
    else:
        text = one_line(run_text(tokenizer, ids, first, end))
        head, tail = text[:SHOWN_CHARACTERS], text[SHOWN_CHARACTERS:][-SHOWN_CHARACTERS:]
    is_whole = len(head) + len(tail) == len(one_line(run_text(tokenizer, ids, first, end)))
    more = f" and {len(runs) - 1} more answers" if len(runs) > 1 else ""
    start = "..." if first > SHOWN_BEFORE else ""
    return f"{size}: {start}{before}{Style().target(head + ('' if is_whole else ' ... ') + tail, 1)}{more}"


def check_lost(train: Corpus) -> Result:
    """Examples that were dropped, truncated, skipped or left without a target, in the worst source."""
    worst, sentences, figures = 0.0, [], {}
    for name, source in _stores(train):
        counts = source.store.info["counts"] if source.store else {}
        read = counts.get("examples", 0) + counts.get("skipped", 0)
        lost = {key: counts[key] for key in LOST if counts.get(key)}
        if lost and read:
            worst = max(worst, sum(lost.values()) / read)
            parts = ", ".join(f"{count:,} {LOST[key]}" for key, count in lost.items())
            sentences.append(f"{parts} of {read:,} in {name}")
        figures[name] = {"read": read, **lost}
    status = FAILS if worst > MOST else WARNING if worst > MANY else OK
    text = "; ".join(sentences) or "no example is dropped, truncated or left out"
    mend = ": raise data.sequence_length, or look at them with scripts/data.py show" if status != OK else ""
    return Result("data", "lost", status, text + mend, figures)


def check_duplicates(train: Corpus) -> Result:
    """Examples with the content of an earlier one of the same source."""
    shares, figures = {}, {}
    for name, source in _stores(train):
        info = source.store.info if source.store else {}
        if info.get("repeated"):
            shares[name] = info["repeated"] / max(1, info["counts"].get("examples", 0))
            figures[name] = info["repeated"]
    if not shares:
        return Result("data", "duplicates", OK, "no example occurs twice in a source")
    text = ", ".join(f"{figures[name]:,} ({share:.1%}) in {name}" for name, share in shares.items())
    status = WARNING if max(shares.values()) > RARE else OK
    mend = ": each is trained several times an epoch; remove them" if status == WARNING else ""
    return Result("data", "duplicates", status, f"examples that repeat an earlier one: {text}{mend}", figures)


def check_disjoint(inputs: Inputs) -> Result:
    """Whether examples of validation are trained on, by the hash of their content."""
    if inputs.validation is None:
        text = "the run has no validation: set data.validation or data.validation_share"
        return Result("data", "validation", SKIPPED, text)
    trained = [source.content_keys() for _, source in _stores(inputs.train)]
    held = [source.content_keys() for _, source in _stores(inputs.validation)]
    if not trained or not held:
        return Result("data", "validation", SKIPPED, "token stores keep no examples to compare")
    keys = np.concatenate(held)
    shared = num_shared(keys, np.concatenate(trained))
    figures = {"validation": len(keys), "shared": shared}
    if not shared:
        return Result("data", "validation", OK, f"none of {len(keys):,} validation examples is in training", figures)
    status = FAILS if shared > RARE * len(keys) else WARNING
    text = f"{shared:,} of {len(keys):,} validation examples are also in training, so its loss means nothing: remove them from one"
    return Result("data", "validation", status, text, figures)


def check_prompts_apart(data: Data) -> Result:
    """Whether validation asks what training answers, with another answer."""
    if not (data.validation or data.validation_share):
        return Result("data", "validation prompts", SKIPPED, "the run has no validation of its main source")
    try:
        trained, held = _prompts_of_both(data)
    except UserError as error:
        return Result("data", "validation prompts", SKIPPED, str(error))
    known = {prompt for prompt, _ in trained}
    contents = {content for _, content in trained}
    shared = sum(prompt in known and content not in contents for prompt, content in held)
    figures = {"training": len(trained), "validation": len(held), "shared": shared}
    of = f"{len(held):,} prompts of validation, compared with {len(trained):,} of training"
    if not shared:
        return Result("data", "validation prompts", OK, f"no prompt with another answer in training ({of})", figures)
    text = f"{shared:,} prompts occur in training with another answer ({of}): split the data by prompt"
    return Result("data", "validation prompts", WARNING, text, figures)


def _prompts_of_both(data: Data) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """(prompt, content) hashes of the first COMPARED training and validation examples. Raises UserError for a token store."""
    share = data.validation_share
    trained = _prompts(data, lambda content: not (share and is_held_out(content, share)))
    if share:
        return trained, _prompts(data, lambda content: is_held_out(content, share))
    return trained, _prompts(dataclasses.replace(data, train=data.validation), lambda content: True)


def _prompts(data: Data, belongs: Callable[[bytes], bool]) -> list[tuple[bytes, bytes]]:
    def pairs() -> Iterator[tuple[bytes, bytes]]:
        for _, example in Examples(data):
            content, prompt = content_hash(example), _prompt(example)
            if prompt is not None and belongs(content):
                yield prompt, content

    return list(itertools.islice(pairs(), COMPARED))


def _prompt(example: dict) -> bytes | None:
    """Hash of what stands before the last answer; None for a text."""
    messages = example.get("messages", ())
    if messages and messages[-1]["role"] == "assistant":
        prompt = [{key: value for key, value in message.items() if key != "weight"} for message in messages[:-1]]
    elif example.get("prompt"):
        prompt = example["prompt"]
    else:
        return None
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=16).digest()


def check_targets(inputs: Inputs) -> Result:
    """The target tokens of the first steps: a step with few of them is a noisy step at the full learning rate."""
    batches = [inputs.plan.batch(step) for step in range(min(STEPS, inputs.total_steps))]
    targets = np.array([batch.num_target_tokens for batch in batches], dtype=np.float64)
    tokens = np.array([sum(batch.document_lengths) for batch in batches])
    shares, mean = targets / np.maximum(1, tokens), float(targets.mean())
    few = int(((shares < FEW_TARGETS) | (targets < FEW_TARGETS * mean)).sum())
    figures = {
        "steps": len(batches),
        "least": float(targets.min()),
        "mean": mean,
        "share": float(shares.mean()),
        "few": few,
    }
    text = f"{targets.min():,.0f} to {targets.max():,.0f} a step, {shares.mean():.1%} of its tokens, in {len(batches)} steps"
    if few:
        text += (
            f"; {few} of them have few, under {FEW_TARGETS:.0%} of their tokens or of the mean: use batch.global_tokens"
        )
    return Result("data", "targets", WARNING if few else OK, text, figures)


def check_padding(inputs: Inputs, data: Data) -> Result:
    """How full the micro-batches are. Documents are never padded; an empty micro-batch lets a rank wait."""
    deals = [inputs.deal(step) for step in range(min(DEALS, inputs.total_steps))]
    bins = [items for deal in deals for micro_batch in deal.items for items in micro_batch]
    empty = sum(not items for items in bins)
    used = sum(_size(items, inputs.train, data.packing) for items in bins)
    fill = used / max(1, len(bins) * inputs.dealer.capacity)
    figures = {"padding": 0.0, "micro_batches": len(bins), "empty": empty, "fill": fill}
    text = (
        f"no padding: {len(bins)} micro-batches of {len(deals)} steps are {fill:.0%} full on average, {empty} are empty"
    )
    if empty > MANY * len(bins):
        return Result("data", "padding", WARNING, text + ": use fewer ranks or larger steps", figures)
    return Result("data", "padding", OK, text, figures)


def _size(items: Sequence[int], corpus: Corpus, packing: bool) -> int:
    return sum(corpus.num_tokens(item) for item in items) if packing else len(items)


def check_vocabulary(inputs: Inputs, vocab_size: int) -> Result:
    """Whether every token id has a row in the embedding."""
    corpora = [corpus for corpus in (inputs.train, inputs.validation) if corpus]
    highest = max((source.highest_token() for corpus in corpora for _, source in _stores(corpus)), default=0)
    figures = {"highest": highest, "rows": vocab_size}
    if highest >= vocab_size:
        text = f"token id {highest} has no row in the embedding ({vocab_size} rows): use the model's own tokenizer"
        return Result("data", "vocabulary", FAILS, text, figures)
    return Result("data", "vocabulary", OK, f"token ids up to {highest:,}, embedding of {vocab_size:,} rows", figures)


def _stores(corpus: Corpus) -> list[tuple[str, Documents]]:
    """The sources that keep examples, with what the config calls them."""
    pairs = zip(corpus.names, corpus.sources, strict=True)
    return [("data.train" if name == MAIN else name, s) for name, s in pairs if isinstance(s, Documents)]
