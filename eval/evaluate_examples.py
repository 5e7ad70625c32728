"""Evaluate a model directory on examples: loss of the response tokens, and scores of the generated answers.

What is read is checked before the model is loaded.
"""

import functools
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from common.dtypes import dtype_name
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

INSTRUCTING = ("system", "developer")  # roles of what stands before a conversation
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
    dtype: str = "auto"
    sharding: str = "auto"
    json: Path | None = None
    answers: Path | None = None
    before: Path | None = None


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation reads, checked.

    sequences: (token ids, weights of the targets) of all examples. A chat whose template rewrites earlier turns has several;
    `owners` tells which example each belongs to. asked: the examples with an answer (`has_answer`). prompts: their
    token ids up to that message. stop_ids: the tokens that training teaches as the end of an answer. header: the part of the
    result that identifies model and data. control_line: names the examples and shots whose content spells control tokens, and
    says if no example is asked; "" if there is nothing to say.
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
    """Read, tokenize and check everything. Raises UserError. Not a collective: call it on one rank (`read_on_first`).

    Creates the folders of the outputs.
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
    shots = random.Random(0).sample(answered, options.shots)  # always the same ones
    _encode(encoder, shots)  # a shot that is refused is named by its place
    max_new_tokens, length_from = _answer_length(options, training, tokenizer)
    max_positions = getattr(AutoConfig.from_pretrained(options.model), "max_position_embeddings", None) or math.inf
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
        "fewest_shots": min((used for _, used in prompts), default=0),  # where the context holds no more
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
        [ids for ids, _ in prompts],
        encoder.stop_ids,
        header,
        before,
        "\n".join(filter(None, said)),
    )


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


def _prompt(encoder: ExampleEncoder, example: dict, shots: Sequence[dict], room: float) -> tuple[list[int], int]:
    """(token ids of the prompt of an example, the number of shots in it).

    As many of the `shots` as `room` tokens hold, from the first on, are earlier turns of the conversation, after its system
    or developer message.
    """
    messages, number = example["messages"], len(shots)
    start = next((i for i, message in enumerate(messages) if message["role"] not in INSTRUCTING), len(messages))
    while True:
        turns = [one for shot in shots[:number] for one in shot["messages"] if one["role"] not in INSTRUCTING]
        ids = encoder.prompt([*messages[:start], *turns, *messages[start:]], tools=example.get("tools"))
        if len(ids) <= room or not number:
            return ids, number
        number -= 1


def _answer_length(
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


def evaluate_examples(
    options: EvaluationOptions,
    inputs: EvaluationInputs,
    ranks: Ranks,
    score_answers: ScoreAnswers,
) -> dict:
    """The result as it is written to JSON, without `seconds`. A collective: every rank gets the whole result.

    `score_answers` knows the task; see `xbrl.answers.scores.score_answers` for its arguments.
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
    of_examples = [[] for _ in inputs.examples]
    for owner, part in zip(inputs.owners, losses, strict=True):
        of_examples[owner].append(part)
    result = inputs.header | {
        "dtype": dtype_name(dtype),
        "processes": ranks.world_size,
        "sharding": "full" if sharded else "none",
        "cut_short": sum(len(answer) == limit for answer in answers),
        "loss": {"mean": loss.mean, "targets": loss.targets},
        "losses": [(one.nats, one.targets) for one in map(total, of_examples)],  # for intervals
    }
    if inputs.asked:
        texts = [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
        result |= score_answers(inputs.asked, texts, str(options.data), inputs.training, str(options.train))
    return result
