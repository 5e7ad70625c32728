"""Evaluate a model directory on examples: loss of the response tokens, and scores of the generated answers.

All inputs are read and checked before the model is loaded.
"""

import functools
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from common.errors import UserError
from data.chat_template import read_chat_settings
from data.encoding import ExampleEncoder
from data.formats import read_files
from data.tokens import load_tokenizer
from distributed.process_group import Ranks
from eval import report
from eval.asked_examples import DEFAULT_LENGTH, LENGTH_MARGIN, ScoreAnswers, choose_examples, has_answer, read_as
from eval.generate import greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import compute_over_ranks
from eval.results import prepare_output, read_result
from eval.target_losses import LOSS_TOKENS, loss_work, target_losses, total
from model.architectures import check_model_directory
from model.dtypes import dtype_name

INSTRUCTING = ("system", "developer")  # roles of the messages that open a conversation
Sequences = list[tuple[list[int], list[float]]]  # token ids, weights of the targets


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of scripts/evaluate.py, which documents them."""

    model: str
    data: Path
    train: Path | None = None
    format: str = "auto"
    fields: str = ""
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int | None = None
    shots: int = 0
    dtype: str = "auto"
    sharding: str = "auto"
    json: Path | None = None
    answers: Path | None = None
    before: Path | None = None


@dataclass(frozen=True)
class EvaluationInputs:
    """The inputs of an evaluation, read and checked.

    sequences: (token ids, weights of the targets) of all examples. A chat whose template rewrites earlier turns has several;
    `owners` gives the index of each sequence's example. asked: the examples with an answer (`has_answer`), which the model is
    to answer. prompts: the token ids of each asked example up to that answer. stop_ids: the tokens that training teaches as the
    end of an answer. header: the part of the result that identifies model and data. control_line: a message that names the
    examples and shots whose content spells control tokens, and says if no example is asked; "" if neither is the case.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: list[dict]
    training: list[dict] | None
    sequences: Sequences
    owners: list[int]
    asked: list[dict]
    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    header: dict
    before: dict | None
    control_line: str


def read_inputs(options: EvaluationOptions) -> EvaluationInputs:
    """Read, tokenize and check the inputs, and create the folders of the outputs. Raise UserError for any mistake in them.

    Not a collective: call it on one rank (`read_on_first`).
    """
    for output in filter(None, (options.json, options.answers)):
        prepare_output(output)
    check_model_directory(options.model)
    reading = read_as(options.format, options.fields)
    everything = list(read_files([options.data], reading))
    placed = choose_examples(everything, options.limit)
    examples = [example for _, example in placed]
    answered = [pair for pair in read_files([options.train], reading) if has_answer(pair[1])] if options.train else []
    training = [example for _, example in answered] if options.train else None
    before = read_result(options.before) if options.before else None
    if options.shots > len(answered):
        raise UserError(
            f"--shots {options.shots} takes answered examples from the training split, which has {len(answered)}; name a file "
            "with --train that has more"
        )
    tokenizer = load_tokenizer(options.model)
    encoder = ExampleEncoder(tokenizer, read_chat_settings(options.model))
    sequences, owners = _encode(encoder, placed)
    asked = [*filter(has_answer, examples)]
    if not (sequences or asked):
        raise UserError(
            f"nothing of {options.data} can be measured: a chat needs an answer, and a weight above 0 (docs/data.md)"
        )
    shots = random.Random(0).sample(answered, options.shots)  # the same shots in every evaluation
    _encode(encoder, shots)  # raises an error that names the line of a shot
    max_new_tokens, length_from = _answer_length(options, training, tokenizer)
    max_positions = getattr(
        AutoConfig.from_pretrained(options.model).get_text_config(), "max_position_embeddings", None
    )
    max_positions = max_positions or math.inf
    room = max_positions - max_new_tokens
    prompts = [_prompt(encoder, example, [shot for _, shot in shots], room) for example in asked]
    longest = max([len(ids) for ids, _ in sequences] + [len(ids) + max_new_tokens for ids, _ in prompts])
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
        "max_new_tokens": max_new_tokens,
        "max_new_tokens_from": length_from,
        "shots": options.shots,
        "fewest_shots": min((used for _, used in prompts), default=0),  # of the prompt with the least room
    }
    if before is not None:
        report.check_comparable(before, header)
    messages = [encoder.control_report([*placed, *shots])]
    if not asked:
        messages.append(
            f"no example of {options.data} is a chat with an answer, so its loss alone is measured (docs/data.md)"
        )
    return EvaluationInputs(
        tokenizer,
        examples,
        training,
        sequences,
        owners,
        asked,
        [ids for ids, _ in prompts],
        encoder.stop_ids,
        header,
        before,
        "\n".join(filter(None, messages)),
    )


def _encode(encoder: ExampleEncoder, placed: Sequence[tuple[str, dict]]) -> tuple[Sequences, list[int]]:
    """Return (the sequences of all examples, the index of each sequence's example). `placed` has (file and line, example).

    Raise UserError, with file and line, for an example that cannot be encoded.
    """
    sequences, owners = [], []
    outcomes = encoder.encode([example for _, example in placed])
    for i, ((where, _), outcome) in enumerate(zip(placed, outcomes, strict=True)):
        if outcome.error:
            raise UserError(f"{where}: {outcome.error}")
        sequences += [(sequence.ids.tolist(), sequence.weights().tolist()) for sequence in outcome.sequences]
        owners += [i] * len(outcome.sequences)
    return sequences, owners


def _prompt(encoder: ExampleEncoder, example: dict, shots: Sequence[dict], room: float) -> tuple[list[int], int]:
    """Return (token ids of the example's prompt, the number of shots in it).

    The first `shots`, as many as fit into `room` tokens, become earlier turns of the conversation, after its system or
    developer message.
    """
    messages, number = example["messages"], len(shots)
    start = next((i for i, message in enumerate(messages) if message["role"] not in INSTRUCTING), len(messages))
    while True:
        turns = [turn for shot in shots[:number] for turn in shot["messages"] if turn["role"] not in INSTRUCTING]
        ids = encoder.prompt([*messages[:start], *turns, *messages[start:]], tools=example.get("tools"))
        if len(ids) <= room or not number:
            return ids, number
        number -= 1


def _answer_length(
    options: EvaluationOptions, training: list[dict] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, str]:
    """Return (maximum tokens of an answer, the source of the number). It never depends on the references of the evaluated file."""
    if options.max_new_tokens:
        return options.max_new_tokens, "--max-new-tokens"
    if not training:
        return DEFAULT_LENGTH, "the default without --train"
    texts = [example["messages"][-1]["content"] for example in training]
    longest = max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    return math.ceil(LENGTH_MARGIN * (longest + 1)), "the longest answer of --train plus 25%"


def evaluate_examples(
    options: EvaluationOptions, inputs: EvaluationInputs, ranks: Ranks, score_answers: ScoreAnswers
) -> dict:
    """Return the result in the form of its JSON, without `seconds`. A collective: every rank gets the whole result.

    `score_answers` gets (answers, asked examples, --data, training examples or None, --train), as `eval.task.Score` says.
    """
    limit, tokenizer = inputs.header["max_new_tokens"], inputs.tokenizer
    dtype = agreed_dtype(options.dtype, ranks)
    sharded = is_sharded(options.sharding, [options.model], ranks)
    model, stop = load_causal_lm(options.model, dtype, sharded, ranks)
    losses = compute_over_ranks(
        functools.partial(target_losses, model),
        inputs.sequences,
        [loss_work(sequence) for sequence in inputs.sequences],
        ranks,
        "loss of the responses",
        stop,
        max_tokens=LOSS_TOKENS,
    )
    stop_ids = stop_tokens(model, inputs.stop_ids)
    answers = compute_over_ranks(
        lambda prompts: greedy_answers(model, prompts, stop_ids, limit, stop),
        inputs.prompts,
        [len(prompt) + limit for prompt in inputs.prompts],
        ranks,
        "answers",
        stop,
        options.batch_size,
    )
    loss = total(losses)
    losses_by_example = [[] for _ in inputs.examples]
    for owner, sequence_loss in zip(inputs.owners, losses, strict=True):
        losses_by_example[owner].append(sequence_loss)
    result = inputs.header | {
        "dtype": dtype_name(dtype),
        "processes": ranks.world_size,
        "sharding": "full" if sharded else "none",
        "cut_short": sum(len(answer) == limit for answer in answers),
        "loss": {"mean": loss.mean, "targets": loss.targets},
        "losses": [(example.nats, example.targets) for example in map(total, losses_by_example)],  # for intervals
    }
    if inputs.asked:
        texts = [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
        result |= score_answers(texts, inputs.asked, str(options.data), inputs.training, str(options.train))
    return result
