"""A sample of the examples as the encoder sees them: prompts of training and of generation, ends of answers, odd tokens."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config
from data.encoding import PROBE, Encoded, ExampleEncoder, Outcome, kept_parts
from data.sources import MAIN
from data.token_texts import one_line, run_text
from eval.asked_examples import has_answer
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from training.chat_settings import chat_settings
from training.show_data import Examples

AMONG, NUMBER = 4096, 256  # the examples of a sample are chosen among the first of a source
RARE = 0.01  # a smaller share of the sample warns
MANY, MOST = 0.05, 0.5  # shares of what is lost from which a check warns, or fails


@dataclass(frozen=True)
class Sampled:
    """An example of a source and what became of it."""

    where: str  # "FILE, line 3"
    example: dict
    outcome: Outcome

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """The encoded sequences that have a target."""
        return tuple(sequence for sequence in self.outcome.sequences if sequence.spans)


def sample(config: Config, encoder: ExampleEncoder, name: str = MAIN) -> list[Sampled]:
    """Up to NUMBER examples of a source, a random choice that is always the same; none of a token store."""
    try:
        among = list(itertools.islice(Examples(config.data, name), AMONG))
    except UserError:
        return []
    chosen = sorted(random.Random(0).sample(range(len(among)), min(NUMBER, len(among))))
    outcomes = encoder.encode([among[i][1] for i in chosen])
    return [Sampled(*among[i], outcome) for i, outcome in zip(chosen, outcomes, strict=True) if not outcome.error]


def check_chats(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Result]:
    """The checks of this file, on the main source; odd tokens are looked for in all sources."""
    encoder = ExampleEncoder(tokenizer, chat_settings(config.data))
    samples = {name: sample(config, encoder, name) for name in (MAIN, *(source.name for source in config.data.mix))}
    main = samples[MAIN]
    everything = [item for items in samples.values() for item in items]
    if not everything:
        return [Result("data", "chats", SKIPPED, "all sources are token stores, which keep no examples")]
    return [
        check_prompts(main, encoder, config.data.chat_template_options),
        check_ends(main, encoder, config),
        check_tokens(everything, encoder),
    ]


# --- The prompt of training equals the prompt of generation -----------------------------------------------------------


def check_prompts(samples: list[Sampled], encoder: ExampleEncoder, options: dict[str, object]) -> Result:
    """Whether the tokens before the last answer are those that evaluation and `apply_chat_template` give to the model."""
    asked = [
        s
        for s in samples
        if has_answer(s.example) and s.sequences and not any("weight" in message for message in s.example["messages"])
    ]
    if not asked:
        return Result("data", "prompt", SKIPPED, "no chat with an answer in the sample of data.train")
    different = []
    for item in asked:
        last = item.sequences[-1]
        trained = last.ids[: last.spans[-1].start].tolist()
        different += [(item, trained, prompt) for prompt in _prompts(item, encoder, options) if prompt != trained][:1]
    figures = {"examples": len(asked), "different": len(different)}
    if not different:
        text = (
            f"what stands before the answer equals the prompt of generation, token by token, in {len(asked)} examples"
        )
        return Result("data", "prompt", OK, text, figures)
    item, trained, prompt = different[0]
    status = WARNING if len(different) <= RARE * len(asked) else FAILS
    text = (
        f"in {len(different)} of {len(asked)} examples training and generation begin the answer after other tokens "
        f"({one_line(item.where)}: training {_tail(encoder.tokenizer, trained, prompt)}, generation "
        f"{_tail(encoder.tokenizer, prompt, trained)}); let the chat template end its prompt where the answer's first token begins"
    )
    return Result("data", "prompt", status, text, figures)


def _prompts(item: Sampled, encoder: ExampleEncoder, options: dict[str, object]) -> Iterator[list[int]]:
    """The prompt of scripts/evaluate.py, and that of transformers alone where the template writes no date."""
    messages, tools = item.example["messages"], item.example.get("tools")
    yield encoder.prompt(messages, tools)
    if encoder.settings.date or any(message["role"] == "developer" for message in messages):
        return
    arguments: dict[str, Any] = {"tools": tools, "tokenize": True, "return_dict": False, **options}
    ids = encoder.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **arguments)
    yield cast(list[int], ids)


def _tail(tokenizer: PreTrainedTokenizerBase, ids: list[int], other: list[int]) -> str:
    """The tokens from the first difference on, as text in quotes, with one token before it."""
    same = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    first = max(0, same - 1)
    text = one_line(run_text(tokenizer, ids, first, min(len(ids), same + 4)))
    return f"{len(ids)} tokens, '...{text}'"


# --- The end of an answer is learned ----------------------------------------------------------------------------------


def check_ends(samples: list[Sampled], encoder: ExampleEncoder, config: Config) -> Result:
    """Whether the last target of each example is a token at which generation stops."""
    stops = {*encoder.stop_ids, *_own_stops(config.model.path)}
    names = ", ".join(one_line(str(encoder.tokenizer.convert_ids_to_tokens(i))) for i in sorted(stops))
    if any("messages" in s.example for s in samples) and not _template_ends_answers(encoder, stops):
        text = (
            f"the chat template writes no end token ({names}) after an answer, so only the last answer of a chat, to which EOS "
            "is added, teaches where to stop: write eos_token after the assistant's content (data.chat_template)"
        )
        return Result("data", "EOS", FAILS, text)
    data, unended, cut, total = config.data, [], 0, 0
    for item in samples:
        for sequence in item.sequences[-1:]:
            total += 1
            last = kept_parts(len(sequence.ids), "text" in item.example, data.sequence_length, data.too_long)[-1:]
            if int(sequence.ids[sequence.spans[-1].end - 1]) not in stops:
                unended.append(item)
            elif last and last[0][1] < sequence.spans[-1].end:
                cut += 1
    figures = {"examples": total, "without_end": len(unended), "truncated": cut, "stop_ids": sorted(stops)}
    if not total:
        return Result("data", "EOS", SKIPPED, "data.train is a token store, whose documents end as they were built")
    if unended:
        text = (
            f"{len(unended)} of {total} examples do not end with a token at which generation stops ({names}), the first in "
            f"{one_line(unended[0].where)}: correct the chat template"
        )
        return Result("data", "EOS", FAILS, text, figures)
    if cut:
        status = FAILS if cut > MOST * total else WARNING if cut > MANY * total else OK
        text = f"{cut} of {total} examples lose the end of their answer to data.sequence_length={data.sequence_length}"
        return Result("data", "EOS", status, text + (": raise it" if status != OK else ""), figures)
    return Result("data", "EOS", OK, f"the last target of {total} examples is an end token ({names})", figures)


def _own_stops(path: str) -> set[int]:
    """eos_token_id of generation_config.json, which the export keeps."""
    file = Path(path, "generation_config.json")
    if not file.is_file():
        return set()
    try:
        stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return set()  # the export names a damaged file
    return set(stops if isinstance(stops, list) else [] if stops is None else [stops])


def _template_ends_answers(encoder: ExampleEncoder, stops: set[int]) -> bool:
    """Whether an answer that is not the last one is followed by a stop token. True if the template renders no plain chat."""
    try:
        text = encoder.template.render([*PROBE, *PROBE])
    except UserError:
        return True
    after = text.split(PROBE[1]["content"])[1] if text.count(PROBE[1]["content"]) == 2 else ""
    ends = [encoder.tokenizer.convert_ids_to_tokens(i) for i in stops]
    between = after.split(PROBE[0]["content"])[0]
    return not after or any(str(end) in between for end in ends)


# --- Odd tokens -------------------------------------------------------------------------------------------------------


def check_tokens(samples: list[Sampled], encoder: ExampleEncoder) -> Result:
    """BOS twice, unknown tokens, and end tokens within an answer."""
    tokenizer, stops = encoder.tokenizer, set(encoder.stop_ids)
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    doubled = tokens = unknowns = inside = 0
    for item in samples:
        for sequence in item.outcome.sequences:
            ids = sequence.ids.tolist()
            tokens += len(ids)
            doubled += bos is not None and ids[:2] == [bos, bos]
            unknowns += ids.count(unknown) if unknown is not None and unknown not in stops else 0
            if "messages" in item.example:
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
