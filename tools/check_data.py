"""What a check says about the data of a run: what is shown, what ends an answer, what is lost, repeated or shared."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Data
from data.encoding import ExampleEncoder, Outcome
from data.examples import Documents
from data.held_out import BUT_FOR, num_shared
from data.show import Style, one_line, run_text
from data.sources import MAIN
from eval.asked_examples import has_answer
from training.chat_settings import chat_settings
from training.inputs import Inputs
from training.show_data import examples_of

OK, WARNING, FAILS, SKIPPED = "ok", "warning", "fails", "skipped"
NUMBER = 256  # examples of a source whose prompts are compared
STEPS = 200  # first steps whose documents are read
COMPARED = 20_000  # documents whose ends are read, at most
RARE, MANY, MOST = 0.01, 0.05, 0.5  # shares from which on a line warns or fails
RUN = 13  # tokens by which sequences are compared, as in GPT-3's search for its test sets (arXiv:2005.14165)
_FACTORS = np.random.default_rng(0).integers(2**63, size=RUN, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
SHOWN, SHOWN_CHARACTERS, SHOWN_BEFORE = 3, 100, 12  # examples; characters at each end of a target; tokens before it


@dataclass(frozen=True)
class Result:
    """One line of the report. text: what was found; where it fails or warns, it also says what to do. figures: for the JSON.
    lines: printed below it."""

    status: str  # ok | warning | fails | skipped
    text: str
    figures: Mapping[str, object] = field(default_factory=dict)
    lines: Sequence[str] = ()
    group: str = ""  # data | model | run | machine
    name: str = ""


@dataclass(frozen=True)
class RunInputs:
    """A run before its first step, as one process without a process group has read it."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    inputs: Inputs
    device: torch.device  # where the check computes: the first GPU, or the CPU
    compute_dtype: torch.dtype  # of the run on this device
    code: ModuleType  # the train.py of the run


def check_data(run: RunInputs) -> list[Result]:
    """All lines of the group `data`."""
    inputs, data = run.inputs, run.inputs.local.data  # on this machine
    encoder = ExampleEncoder(run.tokenizer, chat_settings(data))
    samples = {name: _sample(data, encoder, name) for name in (MAIN, *(source.name for source in data.mix))}
    found = {
        "examples": show_examples(inputs, run.tokenizer),
        "prompt": check_prompts(samples[MAIN], encoder, data.chat_template_options),
        "EOS": check_ends(run, samples, encoder),
        "validation": check_disjoint(inputs),
    }
    return [replace(one, group="data", name=name) for name, one in found.items()]


Sampled = tuple[str, dict, Outcome]  # ("FILE, line 3", example, what became of it)


def _sample(data: Data, encoder: ExampleEncoder, name: str) -> list[Sampled]:
    """The first NUMBER examples of a source; none of a token store."""
    try:
        chosen = list(itertools.islice(examples_of(data, name), NUMBER))
    except UserError:
        return []
    outcomes = encoder.encode([example for _, example in chosen])
    return [(*item, outcome) for item, outcome in zip(chosen, outcomes, strict=True) if not outcome.error]


def show_examples(inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> Result:
    """The first documents of the first step with their targets."""
    items = inputs.plan.batch(0).items
    lines = []
    for item in items[:SHOWN]:
        ids, weights = inputs.train.get(item)
        lines.append(_brief(tokenizer, ids.tolist(), _runs(weights)))
    text = f"the first {len(lines)} of {len(items)} documents of step 1; targets stand between ⟦ and ⟧"
    return Result(OK, text, lines=lines)


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
    text = one_line(run_text(tokenizer, ids, first, end))
    if len(text) > 2 * SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} ... {text[-SHOWN_CHARACTERS:]}"
    more = f" and {len(runs) - 1} more answers" if len(runs) > 1 else ""
    return f"{size}: {'...' * (first > SHOWN_BEFORE)}{before}{Style().target(text, 1)}{more}"


def check_prompts(samples: list[Sampled], encoder: ExampleEncoder, options: dict[str, object]) -> Result:
    """Whether the tokens before the last answer are those that evaluation and `apply_chat_template` give to the model."""
    asked, different, doubled = 0, [], 0
    bos = encoder.tokenizer.bos_token_id
    for where, example, outcome in samples:
        spoken = [sequence for sequence in outcome.sequences if sequence.spans]
        weighted = any("weight" in message for message in example.get("messages", ()))
        # Where a content has a control token, transformers makes one of it, and we do not.
        if not spoken or weighted or "control" in outcome.notes or not has_answer(example):
            continue
        asked += 1
        trained = spoken[-1].ids[: spoken[-1].spans[-1].start].tolist()
        doubled += bos is not None and trained[:2] == [bos, bos]
        for prompt in _prompts(example, encoder, options):
            if prompt != trained:
                different.append((where, trained, prompt))
                break
    figures = {"examples": asked, "different": len(different), "doubled_bos": doubled}
    if not asked:
        return Result(SKIPPED, "no chat with an answer in the sample of data.train", figures)
    if doubled:
        text = (
            f"{doubled} of {asked} examples begin with BOS twice: remove bos_token from the chat template or the data"
        )
        return Result(FAILS, text, figures)
    if not different:
        text = f"what stands before the answer equals the prompt of generation, token by token, in {asked} examples"
        return Result(OK, text, figures)
    where, trained, prompt = different[0]
    text = (
        f"in {len(different)} of {asked} examples training and generation begin the answer after other tokens "
        f"({one_line(where)}: training {_tail(encoder.tokenizer, trained, prompt)}, generation "
        f"{_tail(encoder.tokenizer, prompt, trained)}); let the chat template end its prompt where the answer's first token begins"
    )
    return Result(WARNING if len(different) <= RARE * asked else FAILS, text, figures)


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
    stops = {*encoder.stop_ids}
    names = ", ".join(one_line(str(encoder.tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    chats = {name for name, items in samples.items() if items and all("messages" in item[1] for item in items)}
    texts = {name for name, items in samples.items() if any("text" in item[1] for item in items)}
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
        return Result(SKIPPED, "data.train is a token store, whose documents end as they were built")
    of = f"of {documents:,} documents of the first steps"
    if unended:
        text = (
            f"{len(unended):,} {of} have an answer whose end token ({names}) is no target ({unended[0]}): correct the chat "
            "template or the labels, or the model will not learn where to stop"
        )
        return Result(FAILS, text, figures)
    if cut:
        status = FAILS if cut > MOST * documents else WARNING if cut > MANY * documents else OK
        text = (
            f"{cut:,} {of} lose the end of their answer to data.sequence_length={length}{': raise it' * (status != OK)}"
        )
        return Result(status, text, figures)
    text = f"the last target of {answers:,} answers in {documents:,} documents is an end token ({names})"
    return Result(OK, text, figures)


def check_disjoint(inputs: Inputs) -> Result:
    """Whether examples of validation are trained on: by the hash of their words, and by their runs of tokens."""
    trained, held = (
        [source for source in corpus.sources if isinstance(source, Documents)] if corpus else []
        for corpus in (inputs.train, inputs.validation)
    )
    if not trained or not held:
        return Result(SKIPPED, "the run has no validation examples to compare with training")
    keys = np.concatenate([source.content_keys() for source in held])
    shared = num_shared(keys, np.concatenate([source.content_keys() for source in trained]))
    near, compared = num_near(trained, held)
    figures = {"validation": len(keys), "shared": shared, "near": near, "compared": compared}
    resemble = (
        f"{near:,} of {compared:,} validation sequences have more than half of their own runs of {RUN} tokens in one "
        f"training sequence: if they are of one origin, such as a bank, name its key in data.split_by"
    )
    if shared:
        text = (
            f"{shared:,} of {len(keys):,} validation examples are also in training ({BUT_FOR}), so its loss means nothing: "
            "remove them from one"
        )
        status = FAILS if shared > RARE * len(keys) else WARNING
        return Result(status, text + f"; {resemble}" * (near > shared), figures)
    if near:
        return Result(WARNING if near > MANY * compared else OK, resemble, figures)
    return Result(OK, f"none of {len(keys):,} validation examples is in training", figures)


def num_near(trained: Sequence[Documents], held: Sequence[Documents]) -> tuple[int, int]:
    """(near copies, compared) among the first COMPARED sequences of validation, against as many of training.

    A near copy has more than half of its own runs of RUN tokens in one training sequence. Its own are those that no other
    validation sequence has: what a template or a form writes into all of them does not count. A sequence with fewer than RUN
    runs of its own is not compared.
    """
    owned = [np.unique(_runs_of_tokens(ids)) for ids in _first_sequences(held)]
    runs, owners = np.concatenate(owned), np.repeat(np.arange(len(owned)), [len(one) for one in owned])
    runs, first, counts = np.unique(runs, return_index=True, return_counts=True)
    runs, owners = runs[counts == 1], owners[first[counts == 1]]
    sizes = np.bincount(owners, minlength=len(owned))
    near = np.zeros(len(owned), dtype=bool)
    for ids in _first_sequences(trained) if len(runs) else ():
        found = np.unique(_runs_of_tokens(ids))
        places = np.minimum(np.searchsorted(runs, found), len(runs) - 1)
        near |= 2 * np.bincount(owners[places[runs[places] == found]], minlength=len(owned)) > sizes
    compared = sizes >= RUN
    return int((near & compared).sum()), int(compared.sum())


def _first_sequences(sources: Sequence[Documents]) -> Iterator[np.ndarray]:
    return itertools.islice((source.get(i)[0] for source in sources for i in range(len(source))), COMPARED)


def _runs_of_tokens(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of RUN tokens."""
    windows = (
        np.lib.stride_tricks.sliding_window_view(ids, RUN) if len(ids) >= RUN else np.zeros((0, RUN), dtype=np.int64)
    )
    return (windows.astype(np.uint64) * _FACTORS).sum(1, dtype=np.uint64)
