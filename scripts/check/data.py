"""Check the data of a run: the tokens before an answer, the token that ends it, and overlap of training and validation."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Data
from data.encoding import ExampleEncoder, Outcome
from data.examples import Documents
from data.held_out import BUT_FOR, num_shared
from data.show import one_line, run_text
from data.sources import MAIN
from eval.asked_examples import has_answer
from scripts.check.result import FAILS, OK, SKIPPED, WARNING, Result
from training.chat_settings import chat_settings
from training.inputs import Inputs
from training.show_data import examples_of

NUM_PROMPTS = 256  # examples of a source whose prompts are compared
STEPS = 200  # first steps whose documents are read
COMPARED = 20_000  # documents that are read, at most
RARE, MANY, MOST = 0.01, 0.05, 0.5  # fractions from which on a line warns or fails
NGRAM = 13  # tokens by which sequences are compared, as in GPT-3's search for its test sets (arXiv:2005.14165)
_FACTORS = np.random.default_rng(0).integers(2**63, size=NGRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Sampled = tuple[str, dict, Outcome]  # ("FILE, line 3", example, its encoding)


def check_data(config: Config, tokenizer: PreTrainedTokenizerBase, inputs: Inputs) -> list[Result]:
    """Return all lines of the group `data`."""
    data = inputs.local.data  # with paths on this machine
    encoder = ExampleEncoder(tokenizer, chat_settings(data))
    samples = {name: _sample(data, encoder, name) for name in (MAIN, *(source.name for source in data.mix))}
    results = {
        "prompt": check_prompts(samples[MAIN], encoder, data.chat_template_options),
        "EOS": check_ends(inputs, config.data.sequence_length, samples, encoder),
        "validation": check_disjoint(inputs),
    }
    return [replace(result, group="data", name=name) for name, result in results.items()]


def _sample(data: Data, encoder: ExampleEncoder, name: str) -> list[Sampled]:
    """Encode the first examples of a source. A token store has none."""
    try:
        examples = list(itertools.islice(examples_of(data, name), NUM_PROMPTS))
    except UserError:
        return []
    outcomes = encoder.encode([example for _, example in examples])
    return [(*item, outcome) for item, outcome in zip(examples, outcomes, strict=True) if not outcome.error]


# ---- The prompt ----------------------------------------------------------------------------------------------------------


def check_prompts(samples: list[Sampled], encoder: ExampleEncoder, options: dict[str, object]) -> Result:
    """Check that the tokens before the last answer equal the prompt of evaluation and of `apply_chat_template`."""
    num_chats, different, doubled = 0, [], 0
    bos = encoder.tokenizer.bos_token_id
    for where, example, outcome in samples:
        answered = [sequence for sequence in outcome.sequences if sequence.spans]
        weighted = any("weight" in message for message in example.get("messages", ()))
        # transformers makes a control token of a text that looks like one, and we do not.
        if not answered or weighted or "control" in outcome.notes or not has_answer(example):
            continue
        num_chats += 1
        trained = answered[-1].ids[: answered[-1].spans[-1].start].tolist()
        doubled += bos is not None and trained[:2] == [bos, bos]
        prompts = _prompts(example, encoder, options)
        different += [(where, trained, prompt) for prompt in prompts if prompt != trained][:1]
    figures = {"examples": num_chats, "different": len(different), "doubled_bos": doubled}
    if not num_chats:
        return Result(SKIPPED, "no chat with an answer in the sample of data.train", figures)
    if doubled:
        text = f"{doubled} of {num_chats} examples begin with BOS twice: remove bos_token from the chat template or the data"
        return Result(FAILS, text, figures)
    if not different:
        text = f"training and generation have the same tokens before the answer in {num_chats} examples"
        return Result(OK, text, figures)
    where, trained, prompt = different[0]
    text = (
        f"in {len(different)} of {num_chats} examples training and generation begin the answer after other tokens "
        f"({one_line(where)}: training {_tail(encoder.tokenizer, trained, prompt)}, generation "
        f"{_tail(encoder.tokenizer, prompt, trained)}); let the chat template end its prompt where the answer's first token begins"
    )
    return Result(WARNING if len(different) <= RARE * num_chats else FAILS, text, figures)


def _prompts(example: dict, encoder: ExampleEncoder, options: dict[str, object]) -> Iterator[list[int]]:
    """Yield the prompt of scripts/evaluate.py and, if the template writes no date, the prompt of transformers alone."""
    messages, tools = example["messages"], example.get("tools")
    yield encoder.prompt(messages, tools)
    if encoder.settings.date or any(message["role"] == "developer" for message in messages):
        return
    arguments: dict[str, Any] = {"tools": tools, "tokenize": True, "return_dict": False, **options}
    ids: Any = encoder.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **arguments)
    yield ids


def _tail(tokenizer: PreTrainedTokenizerBase, ids: list[int], compared: list[int]) -> str:
    """Quote the tokens from the first difference on, with one token before it."""
    pairs = enumerate(zip(ids, compared, strict=False))
    num_equal = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(compared)))
    text = one_line(run_text(tokenizer, ids, max(0, num_equal - 1), min(len(ids), num_equal + 4)))
    return f"{len(ids)} tokens, '...{text}'"


# ---- The end of an answer ------------------------------------------------------------------------------------------------


def check_ends(inputs: Inputs, length: int, samples: Mapping[str, list[Sampled]], encoder: ExampleEncoder) -> Result:
    """Check that the last target of every answer is a stop token, in the documents of the first steps as training reads them.

    Every answer of a chat counts, and the last target of a prompt with completion or of a text. A document of
    data.sequence_length tokens without a stop token has lost its end, unless it is a piece of a long text.
    """
    train, plan, stops = inputs.train, inputs.plan, {*encoder.stop_ids}
    names = ", ".join(one_line(str(encoder.tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    chats = {name for name, items in samples.items() if items and all("messages" in item[1] for item in items)}
    texts = {name for name, items in samples.items() if any("text" in item[1] for item in items)}
    # A step may hold only a part of a document of a mixed-in source. `locate` leads to the whole document.
    items = (item for step in range(min(STEPS, inputs.total_steps)) for item in plan.batch(step).items)
    places = list(dict.fromkeys(map(train.locate, itertools.islice(items, COMPARED))))
    documents = answers = cut = 0
    unended: list[str] = []
    for number, index in places:
        source, name = train.sources[number], train.names[number]
        if not isinstance(source, Documents):
            continue
        ids, weights = source.get(index)
        ends = _ends_of_runs(weights)
        ends = ends if name in chats else ends[-1:]
        missed = [end for end in ends if int(ids[end - 1]) not in stops]
        documents, answers = documents + 1, answers + len(ends)
        if missed and len(ids) >= length and missed == [len(ids)]:
            cut += name not in texts
        elif missed:
            tail = one_line(run_text(encoder.tokenizer, ids.tolist(), max(0, missed[0] - 8), missed[0]))
            source_name = "data.train" if name == MAIN else name
            unended.append(f"sequence {index} of {source_name} ends an answer with '...{tail}'")
    figures: dict[str, object] = {"documents": documents, "answers": answers, "without_end": len(unended), "cut": cut}
    figures |= {"stop_ids": sorted(stops)}
    if not documents:
        return Result(SKIPPED, "data.train is a token store, whose documents end as they were built")
    of_all = f"of {documents:,} documents of the first steps"
    if unended:
        text = (
            f"{len(unended):,} {of_all} have an answer whose end token ({names}) is no target ({unended[0]}): correct the chat "
            "template or the labels, or the model will not learn where to stop"
        )
        return Result(FAILS, text, figures)
    if cut:
        status = FAILS if cut > MOST * documents else WARNING if cut > MANY * documents else OK
        advice = ": raise it" * (status != OK)
        text = f"{cut:,} {of_all} lose the end of their answer to data.sequence_length={length}{advice}"
        return Result(status, text, figures)
    text = f"the last target of {answers:,} answers in {documents:,} documents is an end token ({names})"
    return Result(OK, text, figures)


def _ends_of_runs(weights: np.ndarray) -> list[int]:
    """Return the position after each run of target tokens. weights: `(tokens,)`."""
    is_target = np.append(weights != 0, False)
    return (np.flatnonzero(is_target[:-1] & ~is_target[1:]) + 1).tolist()


# ---- Training and validation ---------------------------------------------------------------------------------------------


def check_disjoint(inputs: Inputs) -> Result:
    """Check that no example of validation is trained on, by the hash of its words and by its n-grams of tokens."""
    trained, held_out = (
        [source for source in corpus.sources if isinstance(source, Documents)] if corpus else []
        for corpus in (inputs.train, inputs.validation)
    )
    if not trained or not held_out:
        return Result(SKIPPED, "the run has no validation examples to compare with training")
    keys = np.concatenate([source.content_keys() for source in held_out])
    shared = num_shared(keys, np.concatenate([source.content_keys() for source in trained]))
    near, compared = num_near(trained, held_out)
    figures = {"validation": len(keys), "shared": shared, "near": near, "compared": compared}
    resemble = (
        f"{near:,} of {compared:,} validation sequences have more than half of their own runs of {NGRAM} tokens in one "
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


def num_near(trained: Sequence[Documents], held_out: Sequence[Documents]) -> tuple[int, int]:
    """Return (near copies, compared sequences) of the first COMPARED validation sequences, against as many of training.

    A near copy has more than half of its own n-grams in one training sequence. Its own n-grams occur in no other validation
    sequence, so that the words of a template or a form do not count. A sequence with fewer than NGRAM own n-grams is not compared.
    """
    by_sequence = [np.unique(_ngrams(ids)) for ids in _first_sequences(held_out)]
    ngrams = np.concatenate(by_sequence)
    owners = np.repeat(np.arange(len(by_sequence)), [len(of_one) for of_one in by_sequence])
    ngrams, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
    ngrams, owners = ngrams[counts == 1], owners[first[counts == 1]]
    sizes = np.bincount(owners, minlength=len(by_sequence))
    near = np.zeros(len(by_sequence), dtype=bool)
    for ids in _first_sequences(trained) if len(ngrams) else ():
        of_trained = np.unique(_ngrams(ids))
        places = np.minimum(np.searchsorted(ngrams, of_trained), len(ngrams) - 1)
        near |= 2 * np.bincount(owners[places[ngrams[places] == of_trained]], minlength=len(by_sequence)) > sizes
    compared = sizes >= NGRAM
    return int((near & compared).sum()), int(compared.sum())


def _first_sequences(sources: Sequence[Documents]) -> Iterator[np.ndarray]:
    return itertools.islice((source.get(i)[0] for source in sources for i in range(len(source))), COMPARED)


def _ngrams(ids: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each n-gram of NGRAM tokens. ids: `(tokens,)`."""
    if len(ids) < NGRAM:
        return np.zeros(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids, NGRAM)
    return (windows.astype(np.uint64) * _FACTORS).sum(1, dtype=np.uint64)
