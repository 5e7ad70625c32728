"""The quick check: before the first step of new data or a new model, and what the first losses say of the learning rate.

It takes seconds, on the model that the run has loaded, and proves three things: packed documents do not see each other, every
answer ends with a trained end token, and transformers gives the examples the same ids. scripts/check.py proves more, with runs of
its own.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config
from data.batches import collate
from data.encoding import ExampleEncoder
from data.examples import Documents, in_memory
from data.files import expand, reading_of
from data.formats import read_files
from data.show import one_line, run_text
from data.sources import MAIN
from data.store import is_store
from distributed.process_group import gather_objects, read_on_first
from distributed.sharding import evaluating
from model.architectures import has_experts
from model.dtypes import dtype_name
from model.loss import visit_logits
from training.chat_settings import chat_settings
from training.check_result import FAILS, OK, SKIPPED, WARNING, Result
from training.identity import FIRST_STEP, fingerprint
from training.inputs import WARMUP_FLOOR, Inputs

if TYPE_CHECKING:
    from training.start import TrainingRun

LogitsOf = Callable[[list[np.ndarray], np.ndarray], torch.Tensor]
"""(documents of a row, positions) -> fp32 logits `(positions, vocabulary)` on the CPU."""

ROUNDINGS = 5.0  # multiple of the measured rounding up to which a difference counts as rounding
EPS = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
POSITIONS = 256  # of a row, whose logits are compared
COMPARED = 20_000  # documents whose ends are read, at most
QUICK_LENGTHS = (60, 9, 100, 30)  # tokens of the documents of the row
QUICK_STEPS = 20  # first steps whose answers are checked
QUICK_EXAMPLES = 32  # first examples of data.train that transformers encodes too
GROWTH, GROWTH_NATS = 2.0, 2.0  # a loss above this multiple of the first loss, and by so many nats, has grown
LAST = 3  # losses in a row that are compared with the first
OF_IDENTITY = ("the data", "the weights", "the tokenizer", "config.json", "versions")


def quick_check(run: "TrainingRun", step: int, say: Callable[[str], None]) -> str:
    """Check a run that is at `step` 0 with new data or a new model, and return run.check. Every rank must call this.

    The model must have its base weights, and may be sharded. A check that has passed is remembered in data.cache, or in the run's
    directory without a cache. Raise UserError on all ranks if a line fails.
    """
    mode, config, ranks = run.config.run.check, run.config, run.ranks
    if mode == "off" or (step and mode == "auto"):
        return mode
    parts = {name: run.identity[name] for name in OF_IDENTITY}
    parts["the data"] = {name: value for name, value in parts["the data"].items() if name != FIRST_STEP}
    options = {"options": [str(chat_settings(config.data)), str(run.compute_dtype), ranks.device.type]}
    passed = Path(config.data.cache or run.directory, f"checked-{fingerprint(parts | options)[:32]}")
    if mode == "auto" and read_on_first(passed.exists, ranks):
        return mode
    begin = time.monotonic()
    ranks.watch.at("the quick check")
    masks = _masks(run)
    results = {f"masks on rank {rank}": result for rank, result in enumerate(gather_objects(masks, ranks))}

    def read() -> dict[str, Result]:
        ends = check_ends(config, run.tokenizer, run.data, QUICK_STEPS)
        own_ids = ["input_ids" in example for _, example in _first_examples(run.data.local)]
        if ends.status == FAILS and own_ids and all(own_ids):
            ends = Result(WARNING, ends.text)  # the user has made these tokens, and may mean what is missing
        return {"ends": ends, "labels": check_labels(run.data.local, run.tokenizer)}

    results |= read_on_first(read, ranks)
    for name, result in results.items():
        if result.status == FAILS:
            raise UserError(f"quick check, {name}: {result.text}; run.check=off starts without this check")
    results["masks"] = masks  # of this rank; those of all ranks have passed
    lines = {name: results[name] for name in ("masks", "ends", "labels")}
    for name, result in lines.items():
        if mode == "only" or result.status == WARNING:
            say(f"{result.status:<7}  {name:<6}  {result.text}")
    passed_lines = ", ".join(name for name, result in lines.items() if result.status == OK)
    ways = "--quick-check prints the lines, run.check=off leaves it out"
    say(f"quick check in {time.monotonic() - begin:.1f} s: {passed_lines or 'no line'} ok ({ways})")

    def remember() -> None:
        with suppress(OSError):  # a cache that cannot be written: the next start checks again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()

    read_on_first(remember, ranks)
    return mode


def _masks(run: "TrainingRun") -> Result:
    """Check the attention of the run's own model. Every rank must call this, and computes the same row."""
    if run.model.context is not None:
        return Result(
            SKIPPED, "ranks share a micro-batch (sharding.context): scripts/check.py checks the unsharded model"
        )

    def logits_of(documents: list[np.ndarray], where: np.ndarray) -> torch.Tensor:
        row = in_memory(documents, [np.zeros(len(ids), dtype=bool) for ids in documents])
        positions, parts = torch.from_numpy(where), list[torch.Tensor]()
        batch = replace(
            collate(tuple(range(len(documents))), row),
            target_positions=positions,
            target_ids=torch.zeros_like(positions),
        )
        hidden = run.model(batch.to(run.ranks.device))
        visit_logits(run.model.head, hidden, lambda logits, start: parts.append(logits.cpu()))
        return torch.cat(parts)

    rounding = ROUNDINGS * EPS[run.compute_dtype] if has_experts(run.model_config) else 0.0
    with evaluating(run.model):
        vocabulary, device = run.model_config.vocab_size, run.ranks.device.type
        return check_isolation(logits_of, vocabulary, run.compute_dtype, device, rounding, QUICK_LENGTHS)


def check_isolation(
    logits_of: LogitsOf, vocabulary: int, dtype: torch.dtype, device: str, rounding: float, lengths: Sequence[int]
) -> Result:
    """Check that packed documents do not see each other, and that no token sees later ones.

    Each document of a row of random tokens is edited in turn: the logits of all others must keep their bits. Then the last token
    of every document is edited: no logit before it may move. With experts, logits may move by rounding, because the rounding of a
    product over the tokens of an expert depends on their number: `rounding` says how far, relative to the largest logit.
    lengths: tokens of the documents of the row.
    """
    random, sizes = np.random.default_rng(0), np.array(lengths)
    documents = [random.integers(0, vocabulary, length) for length in sizes]
    starts = np.cumsum(sizes) - sizes
    spread = np.linspace(0, sizes.sum() - 1, POSITIONS).astype(int)
    positions = np.unique(np.concatenate([spread, starts, starts + sizes - 1]))
    owner = np.searchsorted(starts, positions, side="right") - 1  # the document of each position
    base = logits_of(documents, positions)
    if not bool(base.isfinite().all()):
        return Result(FAILS, "logits of random tokens are not finite: see model.path and model.compute_dtype")

    def change(edited: list[np.ndarray]) -> np.ndarray:
        """Return the largest move of a logit at each position. A logit that is not finite moves by infinity."""
        moves = (logits_of(edited, positions) - base).abs().amax(dim=1).numpy()
        return np.nan_to_num(moves, nan=np.inf, posinf=np.inf)

    moves = np.zeros((len(documents), len(documents)))  # [edited document, document of the logit]
    for edited, document in enumerate(documents):
        replacement = (document + random.integers(1, vocabulary, len(document))) % vocabulary
        np.maximum.at(moves[edited], owner, change([*documents[:edited], replacement, *documents[edited + 1 :]]))
    leaks = np.where(np.eye(len(documents)), 0.0, moves)
    edited, seen = np.unravel_index(leaks.argmax(), leaks.shape)
    ends = [np.append(document[:-1], (document[-1:] + 1) % vocabulary) for document in documents]
    later = float(change(ends)[~np.isin(positions, starts + sizes - 1)].max())
    leak, moved = float(leaks.max()), float(moves.diagonal().min())
    rounding *= float(base.abs().max())
    advice = (
        "do not train with this attention; check model/packed_attention.py and the versions of torch and transformers"
    )
    if leak > rounding:
        text = (
            f"documents see each other: changing document {edited + 1} of {len(documents)} moves the logits of document "
            f"{seen + 1} by up to {leak:.3g}; {advice}"
        )
        return Result(FAILS, text)
    if later > rounding:
        text = f"a token sees later ones: changing the last token moves logits before it by up to {later:.3g}; {advice}"
        return Result(FAILS, text)
    if not moved:
        return Result(FAILS, "changing a document does not even move its own logits: the model does not read its input")
    text = (
        f"{len(documents)} documents of a row changed in turn: the logits of all others "
        f"{f'move by {rounding:.2g} at most, as experts round' if rounding else 'keep their bits'} "
        f"({dtype_name(dtype)}, {device}); no token sees later ones"
    )
    return Result(OK, text)


def check_ends(config: Config, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, steps: int = 200) -> Result:
    """Check that the last target of every answer is a stop token, in the documents of the first `steps` as training reads them.

    A document of data.sequence_length tokens may lack its end: it is a piece of a long text, or was cut off, which train.py
    counts and prints.
    """
    train, plan, length = inputs.train, inputs.plan, config.data.length
    stops = {*ExampleEncoder(tokenizer, chat_settings(inputs.local.data)).stop_ids}
    names = ", ".join(one_line(str(tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    # A step may hold only a part of a document of a mixed-in source. `locate` leads to the whole document.
    items = (item for step in range(min(steps, inputs.total_steps)) for item in plan.batch(step).items)
    places = list(dict.fromkeys(map(train.locate, itertools.islice(items, COMPARED))))
    documents = answers = 0
    unended: list[str] = []
    for number, index in places:
        source, name = train.sources[number], train.names[number]
        if not isinstance(source, Documents):
            continue
        ids, weights = source.get(index)
        is_target = np.append(weights != 0, False)
        ends = (np.flatnonzero(is_target[:-1] & ~is_target[1:]) + 1).tolist()
        missed = [end for end in ends if int(ids[end - 1]) not in stops]
        documents, answers = documents + 1, answers + len(ends)
        if missed and not (len(ids) >= length and missed == [len(ids)]):
            tail = one_line(run_text(tokenizer, ids.tolist(), max(0, missed[0] - 8), missed[0]))
            source_name = "data.train" if name == MAIN else name
            unended.append(f"sequence {index} of {source_name} ends an answer with '...{tail}'")
    if not documents:
        return Result(SKIPPED, "data.train is a token store, whose documents end as they were built")
    if not unended:
        return Result(
            OK, f"the last target of {answers:,} answers in {documents:,} documents is an end token ({names})"
        )
    text = (
        f"{len(unended):,} of {documents:,} documents of the first steps have an answer whose end token ({names}) is no target "
        f"({unended[0]}): correct the chat template or the labels, or the model will not learn where to stop"
    )
    return Result(FAILS, text)


def check_labels(config: Config, tokenizer: PreTrainedTokenizerBase) -> Result:
    """Compare the first examples of data.train, encoded as for training, with transformers' own ids for them.

    A chat's ids before its last answer must equal `apply_chat_template(..., add_generation_prompt=True)`, and the answer's
    words must be targets. The ids of a text or a completion must equal the tokenizer's. Examples that the reader may change
    (control tokens in a content, a role that the template does not know, thinking that it drops) are left out. config: with all
    data on this machine.
    """
    settings = chat_settings(config.data)
    encoder, compared = ExampleEncoder(tokenizer, settings), 0
    for where, example in _first_examples(config):
        (outcome,) = encoder.encode([example])
        if outcome.error or outcome.notes or not outcome.sequences or "input_ids" in example:
            continue
        ids, weights = outcome.sequences[-1].ids, outcome.sequences[-1].weights()
        first = int(np.flatnonzero(weights)[0]) if weights.any() else 0
        if "messages" in example:
            messages = example["messages"]
            if messages[-1]["role"] != "assistant" or not messages[-1].get("content"):
                continue
            start = outcome.sequences[-1].spans[-1].start
            expected = encoder.template.render(messages[:-1], example.get("tools"), prompt=True)
            expected = tokenizer(expected, add_special_tokens=False)["input_ids"]
            words = str(tokenizer.decode(ids[start:][weights[start:] != 0].tolist(), skip_special_tokens=False))
            problem = (
                ""
                if ids[:start].tolist() == expected
                else "the ids before its last answer are not transformers' prompt"
            )
            if not problem and _plain(messages[-1]["content"]) not in _plain(words):
                problem = "its targets lack words of the last answer"
        else:
            text = example["text"] if "text" in example else example["prompt"] + example["completion"]
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            start = (
                len(encoder.bos)
                if ids[: len(encoder.bos)].tolist() == encoder.bos and expected[:1] != ids[:1].tolist()
                else 0
            )
            problem = "" if ids[start : start + len(expected)].tolist() == expected else "its ids are not transformers'"
            words = str(tokenizer.decode(ids[max(first, 1) :].tolist(), skip_special_tokens=False))
            if not problem and _plain(example.get("completion", "")) not in _plain(words):
                problem = "its targets lack words of the completion"
        if problem:
            return Result(FAILS, f"{where}: {problem}; see scripts/data.py show and data.chat_template")
        compared += 1
    if not compared:
        return Result(SKIPPED, f"none of the first {QUICK_EXAMPLES} examples can be compared with transformers")
    return Result(
        OK, f"the first {compared} examples have transformers' ids, and the words of their answers are targets"
    )


def _first_examples(config: Config) -> Iterator[tuple[str, dict]]:
    """Yield (place, example) for the first QUICK_EXAMPLES examples of data.train; none of a token store."""
    files = expand(tuple(path for path in config.data.train if not is_store(path)))
    return itertools.islice(read_files(files, reading_of(config.data, "skip")), QUICK_EXAMPLES)


def _plain(text: str) -> str:
    """Return a text without white space, which a decoder may add or drop."""
    return "".join(text.split())


# ---- The first losses ----------------------------------------------------------------------------------------------------


def with_loss(losses: list[float], loss: float, step: int, warmup_steps: int) -> list[float]:
    """Return the first and the last LAST losses of the warm-up, now with the loss of `step`, the number of finished steps.

    The first loss is the base model's. Raise UserError if the last LAST losses are all above GROWTH times the first, and by
    GROWTH_NATS: one batch of hard examples does not stop a run. The comparison ends LAST steps after the warm-up.
    """
    if step > max(warmup_steps, WARMUP_FLOOR) + LAST or not np.isfinite(loss):
        return losses
    first, *last = [*losses, loss]
    last = last[-LAST:]
    if len(last) == LAST and has_grown(first, last):
        listed = ", ".join(f"{value:.3g}" for value in last)
        raise UserError(
            f"the loss grows at the peak learning rate: {listed} up to step {step}, after {first:.3g} at the start; lower "
            "optimizer.learning_rate or raise optimizer.warmup_steps, and start again with another run.name (run.check=off: go on)"
        )
    return [first, *last]


def has_grown(first: float, last: Sequence[float]) -> bool:
    """Return whether all of the `last` losses are far above the first."""
    return min(last) > max(GROWTH * first, first + GROWTH_NATS)
