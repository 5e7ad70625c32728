"""What a check says about the data of a run: what is shown, what ends an answer, what is lost, repeated or shared."""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Data
from data.encoding import PROBE, ExampleEncoder, Outcome
from data.examples import Documents
from data.held_out import content_hash, is_held_out, num_shared
from data.show import Style
from data.sources import MAIN, Corpus
from data.token_texts import one_line, run_text
from eval.asked_examples import has_answer
from training.chat_settings import chat_settings
from training.inputs import Inputs
from training.show_data import Examples

OK, WARNING, FAILS, SKIPPED = "ok", "warning", "fails", "skipped"
AMONG, NUMBER = 4096, 256  # the examples of a sample are chosen among the first of a source
STEPS, DEALS = 200, 50  # first steps whose documents are read, and whose micro-batches are counted
COMPARED = 20_000  # examples of each side whose prompts are compared, and documents whose ends are read
RARE, MANY, MOST = 0.01, 0.05, 0.5  # shares from which on a line warns or fails
FEW_TARGETS = 0.01  # of the tokens of a step, or of the targets of the mean step
SHOWN, SHOWN_CHARACTERS, SHOWN_BEFORE = 3, 100, 12  # examples; characters at each end of a target; tokens before it
LOST = {  # counts of the reader -> what happened
    "drop": "dropped as too long",
    "truncate": "truncated",
    "empty": "without a target",
    "empty_truncated": "without a target after truncation",
    "skipped": "malformed",
}


@dataclass(frozen=True)
class Result:
    """One line of the report. text: what was found; where it fails or warns, also what to do. figures: for the JSON."""

    group: str  # data | model | precision | run | machine
    name: str
    status: str  # ok | warning | fails | skipped
    text: str
    figures: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInputs:
    """A run before its first step, as one process without a process group has read it."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    inputs: Inputs
    device: torch.device  # where the check computes: the first GPU, or the CPU
    compute_dtype: torch.dtype  # of the run on this device


def check_data(run: RunInputs) -> list[Result]:
    """All lines of the group `data`."""
    data, inputs = run.config.data, run.inputs
    encoder = ExampleEncoder(run.tokenizer, chat_settings(data))
    samples = {name: _sample(data, encoder, name) for name in (MAIN, *(source.name for source in data.mix))}
    return [
        show_examples(inputs, run.tokenizer),
        check_prompts(samples[MAIN], encoder, data.chat_template_options),
        check_ends(run, samples, encoder),
        check_tokens([item for items in samples.values() for item in items], encoder),
        check_lost(inputs.train),
        check_duplicates(inputs.train),
        check_disjoint(inputs),
        check_prompts_apart(data),
        check_targets(inputs),
        check_padding(inputs, data.packing),
    ]


Sampled = tuple[str, dict, Outcome]  # ("FILE, line 3", example, what became of it)


def _sample(data: Data, encoder: ExampleEncoder, name: str) -> list[Sampled]:
    """Up to NUMBER examples of a source, a random choice that is always the same; none of a token store."""
    try:
        among = list(itertools.islice(Examples(data, name), AMONG))
    except UserError:
        return []
    chosen = [among[i] for i in sorted(random.Random(0).sample(range(len(among)), min(NUMBER, len(among))))]
    outcomes = encoder.encode([example for _, example in chosen])
    return [(*item, outcome) for item, outcome in zip(chosen, outcomes, strict=True) if not outcome.error]


def show_examples(inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> Result:
    """The first documents of the first step with their targets; `lines` of the figures are printed below the line."""
    items = inputs.plan.batch(0).items
    lines = []
    for item in items[:SHOWN]:
        ids, weights = inputs.train.get(item)
        lines.append(_brief(tokenizer, ids.tolist(), _runs(weights)))
    text = f"the first {len(lines)} of {len(items)} documents of step 1; targets stand between ⟦ and ⟧"
    return Result("data", "examples", OK, text, {"lines": lines})


def _runs(weights: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of each run of target tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights != 0, [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _brief(tokenizer: PreTrainedTokenizerBase, ids: list[int], runs: list[tuple[int, int]]) -> str:
    """The first run of targets of a document with what stands before it, shortened in its middle."""
    size = f"{len(ids):,} tokens, {sum(end - first for first, end in runs):,} targets"
    if not runs:
        return size
    first, end = runs[0]
    before = one_line(run_text(tokenizer, ids, max(0, first - SHOWN_BEFORE), first))
    text = one_line(run_text(tokenizer, ids, first, min(end, first + 2 * SHOWN_CHARACTERS)))
    if end - first > 2 * SHOWN_CHARACTERS:
        text += one_line(run_text(tokenizer, ids, max(first + 2 * SHOWN_CHARACTERS, end - SHOWN_CHARACTERS), end))
    if len(text) > 2 * SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} ... {text[-SHOWN_CHARACTERS:]}"
    more = f" and {len(runs) - 1} more answers" if len(runs) > 1 else ""
    return f"{size}: {'...' * (first > SHOWN_BEFORE)}{before}{Style().target(text, 1)}{more}"


def check_prompts(samples: list[Sampled], encoder: ExampleEncoder, options: dict[str, object]) -> Result:
    """Whether the tokens before the last answer are those that evaluation and `apply_chat_template` give to the model."""
    asked, different = 0, []
    for where, example, outcome in samples:
        spoken = [sequence for sequence in outcome.sequences if sequence.spans]
        weighted = any("weight" in message for message in example.get("messages", ()))
        if not spoken or weighted or not has_answer(example):
            continue
        asked += 1
        trained = spoken[-1].ids[: spoken[-1].spans[-1].start].tolist()
        for prompt in _prompts(example, encoder, options):
            if prompt != trained:
                different.append((where, trained, prompt))
                break
    figures = {"examples": asked, "different": len(different)}
    if not asked:
        return Result("data", "prompt", SKIPPED, "no chat with an answer in the sample of data.train", figures)
    if not different:
        text = f"what stands before the answer equals the prompt of generation, token by token, in {asked} examples"
        return Result("data", "prompt", OK, text, figures)
    where, trained, prompt = different[0]
    text = (
        f"in {len(different)} of {asked} examples training and generation begin the answer after other tokens "
        f"({one_line(where)}: training {_tail(encoder.tokenizer, trained, prompt)}, generation "
        f"{_tail(encoder.tokenizer, prompt, trained)}); let the chat template end its prompt where the answer's first token begins"
    )
    return Result("data", "prompt", WARNING if len(different) <= RARE * asked else FAILS, text, figures)


def _prompts(example: dict, encoder: ExampleEncoder, options: dict[str, object]) -> Iterator[list[int]]:
    """The prompt of scripts/evaluate.py, and that of transformers alone where the template writes no date."""
    messages, tools = example["messages"], example.get("tools")
    yield encoder.prompt(messages, tools)
    if encoder.settings.date or any(message["role"] == "developer" for message in messages):
        return
    arguments: dict[str, Any] = {"tools": tools, "tokenize": True, "return_dict": False, **options}
    ids: Any = encoder.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **arguments)
    yield ids


def _tail(tokenizer: PreTrainedTokenizerBase, ids: list[int], other: list[int]) -> str:
    """The tokens from the first difference on, as text in quotes, with one token before it."""
    same = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    text = one_line(run_text(tokenizer, ids, max(0, same - 1), min(len(ids), same + 4)))
    return f"{len(ids)} tokens, '...{text}'"


def check_ends(run: RunInputs, samples: Mapping[str, list[Sampled]], encoder: ExampleEncoder) -> Result:
    """Whether a stop token is the last target of every answer, in the documents of the first steps as training reads them.

    Every answer of a chat counts, and the last target of a prompt with completion or of a text. A document of
    data.sequence_length tokens without a stop token has lost its end, unless it is a piece of a long text.
    """
    train, plan, length = run.inputs.train, run.inputs.plan, run.config.data.sequence_length
    stops = {*encoder.stop_ids, *_own_stops(run.config.model.path)}
    names = ", ".join(one_line(str(encoder.tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    chats = {name for name, items in samples.items() if items and all("messages" in item[1] for item in items)}
    texts = {name for name, items in samples.items() if any("text" in item[1] for item in items)}
    if chats and not _template_ends_answers(encoder, stops):
        text = (
            f"the chat template writes no end token ({names}) after an answer, so only the last answer of a chat, to which EOS "
            "is added, teaches where to stop: write eos_token after the assistant's content (data.chat_template)"
        )
        return Result("data", "EOS", FAILS, text)
    # A mixed-in source may give a part of a document to a step: the whole one is read.
    items = (item for step in range(min(STEPS, run.inputs.total_steps)) for item in plan.batch(step).items)
    places = list(dict.fromkeys(map(train.locate, itertools.islice(items, COMPARED))))
    documents = answers = cut = 0
    unended: list[str] = []
    for number, index in places:
        source, name = train.sources[number], train.names[number]
        if not isinstance(source, Documents):
            continue
        ids, weights = source.get(index)
        ends = [end for _, end in _runs(weights)]
        ends = ends if name in chats else ends[-1:]
        missed = [end for end in ends if int(ids[end - 1]) not in stops]
        documents, answers = documents + 1, answers + len(ends)
        if missed and len(ids) >= length and missed == [len(ids)]:
            cut += name not in texts
        elif missed:
            tail = one_line(run_text(encoder.tokenizer, ids.tolist(), max(0, missed[0] - 8), missed[0]))
            unended.append(
                f"sequence {index} of {'data.train' if name == MAIN else name} ends an answer with '...{tail}'"
            )
    figures = {
        "documents": documents,
        "answers": answers,
        "without_end": len(unended),
        "cut": cut,
        "stop_ids": sorted(stops),
    }
    if not documents:
        return Result("data", "EOS", SKIPPED, "data.train is a token store, whose documents end as they were built")
    of = f"of {documents:,} documents of the first steps"
    if unended:
        text = (
            f"{len(unended):,} {of} have an answer whose end token ({names}) is no target ({unended[0]}): correct the chat "
            "template or the labels, or the model will not learn where to stop"
        )
        return Result("data", "EOS", FAILS, text, figures)
    if cut:
        status = FAILS if cut > MOST * documents else WARNING if cut > MANY * documents else OK
        text = (
            f"{cut:,} {of} lose the end of their answer to data.sequence_length={length}{': raise it' * (status != OK)}"
        )
        return Result("data", "EOS", status, text, figures)
    text = f"the last target of {answers:,} answers in {documents:,} documents is an end token ({names})"
    return Result("data", "EOS", OK, text, figures)


def _own_stops(path: str) -> set[int]:
    """eos_token_id of generation_config.json, which the export keeps."""
    try:
        stops = json.loads(Path(path, "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return set()  # there is none, or the export names it as damaged
    return set(stops if isinstance(stops, list) else [] if stops is None else [stops])


def _template_ends_answers(encoder: ExampleEncoder, stops: set[int]) -> bool:
    """Whether an answer that is not the last one is followed by a stop token. True if the template renders no plain chat."""
    try:
        text = encoder.template.render([*PROBE, *PROBE])
    except UserError:
        return True
    after = text.split(PROBE[1]["content"])[1] if text.count(PROBE[1]["content"]) == 2 else ""
    between = after.split(PROBE[0]["content"])[0]
    return not after or any(str(encoder.tokenizer.convert_ids_to_tokens(i)) in between for i in stops)


def check_tokens(samples: list[Sampled], encoder: ExampleEncoder) -> Result:
    """BOS twice, unknown tokens, and end tokens within an answer."""
    if not samples:
        return Result("data", "tokens", SKIPPED, "all sources are token stores, which keep no examples")
    tokenizer, stops = encoder.tokenizer, set(encoder.stop_ids)
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    doubled = tokens = unknowns = inside = 0
    for _, example, outcome in samples:
        for sequence in outcome.sequences:
            ids = sequence.ids.tolist()
            tokens += len(ids)
            doubled += bos is not None and ids[:2] == [bos, bos]
            unknowns += ids.count(unknown) if unknown is not None and unknown not in stops else 0
            if "messages" in example:
                inside += any(stops & set(ids[span.start : span.end - 1]) for span in sequence.spans)
    figures = {"examples": len(samples), "doubled_bos": doubled, "unknown": unknowns, "end_inside": inside}
    problems = []
    if doubled:
        problems.append(
            f"{doubled} sequences begin with BOS twice: remove bos_token from the chat template or the data"
        )
    if unknowns > RARE * tokens:
        problems.append(f"{unknowns / tokens:.1%} of the tokens are unknown to the tokenizer: use another tokenizer")
    if inside:
        problems.append(f"{inside} answers have an end token in their middle, where generation stops: clean the data")
    if problems:
        status = FAILS if doubled > RARE * len(samples) else WARNING
        return Result("data", "tokens", status, "; ".join(problems), figures)
    text = f"no doubled BOS, no end token within an answer, {unknowns} unknown tokens among {tokens:,}"
    return Result("data", "tokens", OK, text, figures)


def check_lost(train: Corpus) -> Result:
    """Examples that were dropped, truncated, skipped or left without a target, in the worst source."""
    worst, sentences, figures = 0.0, [], {}
    for name, source in _stores(train):
        counts = source.store.info["counts"] if source.store else {}
        read = counts.get("examples", 0) + counts.get("skipped", 0)
        lost = {key: counts[key] for key in LOST if counts.get(key)}
        figures[name] = {"read": read, **lost}
        if lost:
            worst = max(worst, sum(lost.values()) / read)
            parts = ", ".join(f"{count:,} {LOST[key]}" for key, count in lost.items())
            sentences.append(f"{parts} of {read:,} in {name}")
    status = FAILS if worst > MOST else WARNING if worst > MANY else OK
    text = "; ".join(sentences) or "no example is dropped, truncated or left out"
    mend = ": raise data.sequence_length, or look at them with scripts/data.py show" if status != OK else ""
    return Result("data", "lost", status, text + mend, figures)


def check_duplicates(train: Corpus) -> Result:
    """Examples with the content of an earlier one of the same source."""
    infos = {name: source.store.info for name, source in _stores(train) if source.store}
    figures = {name: info["repeated"] for name, info in infos.items() if info.get("repeated")}
    if not figures:
        return Result("data", "duplicates", OK, "no example occurs twice in a source")
    shares = {name: count / max(1, infos[name]["counts"].get("examples", 0)) for name, count in figures.items()}
    text = ", ".join(f"{figures[name]:,} ({share:.1%}) in {name}" for name, share in shares.items())
    status = WARNING if max(shares.values()) > RARE else OK
    mend = ": each is trained several times an epoch; remove them" if status == WARNING else ""
    return Result("data", "duplicates", status, f"examples that repeat an earlier one: {text}{mend}", figures)


def check_disjoint(inputs: Inputs) -> Result:
    """Whether examples of validation are trained on, by the hash of their content."""
    if inputs.validation is None:
        text = "the run has no validation: set data.validation or data.validation_share"
        return Result("data", "validation", SKIPPED, text)
    trained, held = (
        np.concatenate([np.zeros(0, np.uint64), *(source.content_keys() for _, source in _stores(corpus))])
        for corpus in (inputs.train, inputs.validation)
    )
    if not len(trained) or not len(held):
        return Result("data", "validation", SKIPPED, "token stores keep no examples to compare")
    shared = num_shared(held, trained)
    figures = {"validation": len(held), "shared": shared}
    if not shared:
        return Result("data", "validation", OK, f"none of {len(held):,} validation examples is in training", figures)
    status = FAILS if shared > RARE * len(held) else WARNING
    text = f"{shared:,} of {len(held):,} validation examples are also in training, so its loss means nothing: remove them from one"
    return Result("data", "validation", status, text, figures)


def check_prompts_apart(data: Data) -> Result:
    """Whether validation asks what training answers, with another answer."""
    name, share = "validation prompts", data.validation_share
    if not (data.validation or share):
        return Result("data", name, SKIPPED, "the run has no validation of its main source")
    try:
        trained = _asked(data, held_out=False)
        held = _asked(data, held_out=True) if share else _asked(dataclasses.replace(data, train=data.validation), False)
    except UserError as error:  # a token store
        return Result("data", name, SKIPPED, str(error))
    known, contents = {prompt for prompt, _ in trained}, {content for _, content in trained}
    shared = sum(prompt in known and content not in contents for prompt, content in held)
    figures = {"training": len(trained), "validation": len(held), "shared": shared}
    of = f"{len(held):,} prompts of validation, compared with {len(trained):,} of training"
    if not shared:
        return Result("data", name, OK, f"no prompt with another answer in training ({of})", figures)
    text = f"{shared:,} prompts occur in training with another answer ({of}): split the data by prompt"
    return Result("data", name, WARNING, text, figures)


def _asked(data: Data, held_out: bool) -> list[tuple[str, bytes]]:
    """(what stands before the last answer, hash of the content) of the first COMPARED examples that have both."""

    def pairs() -> Iterator[tuple[str, bytes]]:
        for _, example in Examples(data):
            content, prompt = content_hash(example), example.get("prompt")
            if example.get("messages") and example["messages"][-1]["role"] == "assistant":
                prompt = [{**message, "weight": None} for message in example["messages"][:-1]]
            if prompt and is_held_out(content, data.validation_share) == held_out:
                yield json.dumps(prompt, sort_keys=True), content

    return list(itertools.islice(pairs(), COMPARED))


def check_targets(inputs: Inputs) -> Result:
    """The target tokens of the first steps: a step with few of them is a noisy step at the full learning rate."""
    batches = [inputs.plan.batch(step) for step in range(min(STEPS, inputs.total_steps))]
    targets = np.array([batch.num_target_tokens for batch in batches], dtype=np.float64)
    shares = targets / np.maximum(1, [sum(batch.document_lengths) for batch in batches])
    few = int(((shares < FEW_TARGETS) | (targets < FEW_TARGETS * targets.mean())).sum())
    figures = {
        "steps": len(batches),
        "least": float(targets.min()),
        "mean": float(targets.mean()),
        "share": float(shares.mean()),
        "few": few,
    }
    text = f"{targets.min():,.0f} to {targets.max():,.0f} a step, {shares.mean():.1%} of its tokens, in {len(batches)} steps"
    if few:
        text += (
            f"; {few} of them have few, under {FEW_TARGETS:.0%} of their tokens or of the mean: use batch.global_tokens"
        )
    return Result("data", "targets", WARNING if few else OK, text, figures)


def check_padding(inputs: Inputs, packing: bool) -> Result:
    """How full the micro-batches are. Documents are never padded; an empty micro-batch lets a rank wait."""
    deals = [inputs.deal(step) for step in range(min(DEALS, inputs.total_steps))]
    bins = [items for deal in deals for micro_batch in deal.items for items in micro_batch]
    empty = sum(not items for items in bins)
    used = sum(sum(map(inputs.train.num_tokens, items)) if packing else len(items) for items in bins)
    fill = used / (len(bins) * inputs.dealer.capacity)
    figures = {"padding": 0.0, "micro_batches": len(bins), "empty": empty, "fill": fill}
    text = (
        f"no padding: {len(bins)} micro-batches of {len(deals)} steps are {fill:.0%} full on average, {empty} are empty"
    )
    if empty > MANY * len(bins):
        return Result("data", "padding", WARNING, f"{text}: use fewer ranks or larger steps", figures)
    return Result("data", "padding", OK, text, figures)


def _stores(corpus: Corpus) -> list[tuple[str, Documents]]:
    """The sources that keep examples, with what the config calls them."""
    pairs = zip(corpus.names, corpus.sources, strict=True)
    return [("data.train" if name == MAIN else name, source) for name, source in pairs if isinstance(source, Documents)]
