"""What an evaluation reads, checked before any process starts: examples, their tokens, and the prompts of those that are asked."""

import argparse
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.load import FORMATS, check_fields, parse_dict
from data.chat_template import read_chat_settings
from data.encoding import ExampleEncoder
from data.files import Reading
from data.formats import read_files
from data.tokens import load_tokenizer
from eval import general_text, report
from eval.asked_examples import DEFAULT_LENGTH, LENGTH_MARGIN, choose_examples, has_answer
from eval.results import prepare_output, read_result

Sequences = list[tuple[list[int], list[float]]]  # token ids, weights of the targets


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate: the options of scripts/evaluate.py, which documents them."""

    model: str
    data: Path
    train: Path | None = None
    format: str = "auto"
    fields: str = ""
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int | None = None
    shots: int = 0
    constrained: bool = False
    dtype: str = "auto"
    sharding: str = "auto"
    general: bool = False
    json: Path | None = None
    answers: Path | None = None
    before: Path | None = None


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation reads, checked.

    sequences: (token ids, weights of the targets) of all examples. A chat whose template rewrites earlier turns has several;
    `owners` tells which example each belongs to. asked: indices of the examples with an answer (`has_answer`). prompts: their
    token ids up to that message. stop_ids: the tokens that training teaches as the end of an answer. header: the part of the
    result that identifies model and data. control_line: names the examples and shots whose content spells control tokens, and
    says if no example is asked; "" if there is nothing to say.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: list[dict]
    training: list[dict] | None
    sequences: Sequences
    owners: list[int]
    asked: list[int]
    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_positions: float  # infinite if config.json names no limit
    header: dict
    before: dict | None
    control_line: str


def read_inputs(options: EvaluationOptions) -> EvaluationInputs:
    """Read, tokenize and check everything. Raises UserError. Not a collective: call it on one rank (`read_on_first`)."""
    _check_options(options)
    reading = reading_of(options.format, options.fields)
    everything = list(read_files([options.data], reading))
    placed = choose_examples(everything, options.limit)
    examples = [example for _, example in placed]
    answered = [pair for pair in read_files([options.train], reading) if has_answer(pair[1])] if options.train else []
    training = [example for _, example in answered] if options.train else None
    before = read_result(options.before) if options.before else None
    if options.shots and not training:
        raise UserError(f"--shots {options.shots} takes examples from the training split; name it with --train")
    tokenizer = load_tokenizer(options.model)
    encoder = ExampleEncoder(tokenizer, read_chat_settings(options.model))
    sequences, owners = _encode(encoder, placed)
    shots = random.Random(0).sample(answered, min(options.shots, len(answered)))  # always the same ones
    _encode(encoder, shots)  # a shot that is refused is named by its place
    asked = [i for i, example in enumerate(examples) if has_answer(example)]
    max_new_tokens, length_from = answer_length(options, training, tokenizer)
    max_positions = getattr(AutoConfig.from_pretrained(options.model), "max_position_embeddings", None) or math.inf
    prompts, fewest_shots = _prompts(
        encoder, [examples[i] for i in asked], [shot for _, shot in shots], max_positions - max_new_tokens
    )
    longest = max([len(ids) for ids, _ in sequences] + [len(prompt) + max_new_tokens for prompt in prompts])
    if longest > max_positions:
        raise UserError(
            f"{options.data}: the longest example needs {longest} positions with --max-new-tokens {max_new_tokens}, "
            f"but {options.model} has {max_positions}; shorten the example or lower --max-new-tokens"
        )
    header = {
        "model": options.model,
        "data": str(options.data),
        "data_sha256": hashlib.sha256(options.data.read_bytes()).hexdigest(),
        "n_examples": len(examples),
        "n_in_file": len(everything),
        "general_source": general_text.SOURCE if options.general else None,
        "max_new_tokens": max_new_tokens,
        "max_new_tokens_from": length_from,
        "shots": options.shots,
        "fewest_shots": fewest_shots,  # where the context holds no more
        "constrained": options.constrained,
    }
    if before is not None:
        report.check_comparable(before, header)
    said = [encoder.control_report([*placed, *shots])]
    if not asked:
        said.append(
            f"no example of {options.data} is a chat with an answer, so its loss alone is measured (docs/data.md)"
        )
    return EvaluationInputs(
        tokenizer,
        examples,
        training,
        sequences,
        owners,
        asked,
        prompts,
        encoder.stop_ids,
        max_new_tokens,
        max_positions,
        header,
        before,
        "\n".join(filter(None, said)),
    )


def _check_options(options: EvaluationOptions) -> None:
    """What can be said without reading any example. Creates the folders of the outputs."""
    for output in filter(None, (options.json, options.answers)):
        prepare_output(output)
    if Path(options.model, "adapter_config.json").is_file():
        raise UserError(
            f"{options.model} is an adapter; evaluate the merged weights: export/ of its run, or scripts/export.py --merge-lora"
        )
    if not Path(options.model, "config.json").is_file():
        raise UserError(f"{options.model} is not a model directory (no config.json); see scripts/fetch_base_model.py")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add `--format` and `--fields`, whose values go to `reading_of`."""
    parser.add_argument("--format", choices=FORMATS, default="auto", help="like data.format of a config (%(default)s)")
    parser.add_argument("--fields", default="", help="like data.fields of a config: messages=dialogue,role=speaker")


def reading_of(format: str, fields: str) -> Reading:
    """How files are read. Raises UserError for a key that is not ours."""
    names = {key: str(name) for key, name in parse_dict(fields, str, "--fields").items()}
    check_fields(names, "--fields")
    return Reading(format, names)


def _encode(encoder: ExampleEncoder, placed: Sequence[tuple[str, dict]]) -> tuple[Sequences, list[int]]:
    """(the sequences of all examples, the example that each belongs to). placed: (where it stands, example)."""
    sequences, owners = [], []
    outcomes = encoder.encode([example for _, example in placed])
    for i, ((where, _), outcome) in enumerate(zip(placed, outcomes, strict=True)):
        if outcome.error:
            raise UserError(f"{where}: {outcome.error}")
        sequences += [(sequence.ids.tolist(), sequence.weights().tolist()) for sequence in outcome.sequences]
        owners += [i] * len(outcome.sequences)
    return sequences, owners


def _prompts(
    encoder: ExampleEncoder, asked: Sequence[dict], shots: Sequence[dict], room: float
) -> tuple[list[list[int]], int]:
    """(token ids of the prompt of each example, the fewest shots in one of them).

    As many of the `shots` as `room` tokens hold, from the first on, are earlier turns of the conversation.
    """
    prompts, used = [], []
    for example in asked:
        number, tools = len(shots), example.get("tools")
        ids = encoder.prompt(with_shots(example["messages"], shots), tools=tools)
        while len(ids) > room and number:
            number -= 1
            ids = encoder.prompt(with_shots(example["messages"], shots[:number]), tools=tools)
        prompts.append(ids)
        used.append(number)
    return prompts, min(used, default=0)


def with_shots(messages: Sequence[dict], shots: Sequence[dict]) -> list[dict]:
    """A conversation in which the `shots` come before its own turns, and after its system message."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = [message for shot in shots for message in shot["messages"] if message["role"] != "system"]
    return [*messages[:start], *turns, *messages[start:]]


def answer_length(
    options: EvaluationOptions, training: list[dict] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str]:
    """(maximum tokens of an answer, where the number comes from). The references of the evaluated file play no part."""
    if options.max_new_tokens:
        return options.max_new_tokens, "--max-new-tokens"
    if not training:
        return DEFAULT_LENGTH, "the default without --train"
    texts = [example["messages"][-1]["content"] for example in training]
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return math.ceil(LENGTH_MARGIN * (longest + 1)), "the longest answer of --train plus 25%"
