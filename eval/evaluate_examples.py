"""Evaluate a model directory on examples: loss of the response tokens, and scores of the generated answers."""

import functools
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from common.dtypes import dtype_name
from common.errors import UserError
from configs.loading.config_file import parse_dict
from configs.loading.names import check_fields
from data.chat_settings import read_chat_settings
from data.encoding import ExampleEncoder
from data.examples import read_examples
from data.formats import Reading
from data.tokens import load_tokenizer
from distributed.process_group import Ranks
from eval import general_text, report
from eval.generate import greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import compute_over_ranks
from eval.perplexity import LossSum, general_perplexity, target_losses, total
from eval.results import prepare_output, read_result

ScoreAnswers = Callable[[list[dict], list[str], str, list[dict] | None, str], dict]

GENERAL_WINDOW = 1024  # maximum context in tokens when the perplexity on general text is measured


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate: the options of scripts/evaluate.py, which documents them."""

    model: str
    data: Path
    train: Path | None = None
    format: str = "auto"
    fields: str = ""
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    dtype: str = "auto"
    sharding: str = "auto"
    general: bool = False
    json: Path | None = None
    before: Path | None = None


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation reads, checked.

    sequences: (token ids, weights of the targets) of all examples; a chat whose template rewrites earlier turns has several,
    and `owners` tells which example each belongs to. asked: indices of the examples with an answer (`has_answer`);
    prompts: their token ids up to that message. stop_ids: the tokens that training teaches as the end of an answer. header: the part of the result that identifies model and data.
    """

    tokenizer: PreTrainedTokenizerBase
    examples: list[dict]
    training: list[dict] | None
    sequences: list[tuple[list[int], list[float]]]
    owners: list[int]
    asked: list[int]
    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_positions: float  # infinite if config.json names no limit
    header: dict
    before: dict | None


def read_inputs(options: EvaluationOptions) -> EvaluationInputs:
    """Read, tokenize and check everything. Raises UserError. Not a collective: call it on one rank (`read_on_first`)."""
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    fields = {key: str(name) for key, name in parse_dict(options.fields, str, "--fields").items()}
    check_fields(fields, "--fields")
    reading = Reading(options.format, fields)
    examples = choose_examples(read_examples(options.data, reading), options.limit)
    training = list(filter(has_answer, read_examples(options.train, reading))) if options.train else None
    before = read_result(options.before) if options.before else None
    if options.json:
        prepare_output(options.json)
    if not Path(options.model, "config.json").is_file():
        raise UserError(f"{options.model} is not a model directory (no config.json); see scripts/fetch_base_model.py")
    tokenizer = load_tokenizer(options.model)
    encoder = ExampleEncoder(tokenizer, read_chat_settings(options.model))
    encoded = []
    for i, (example, outcome) in enumerate(zip(examples, encoder.encode(examples), strict=True), 1):
        if outcome.error:
            raise UserError(f"{options.data}: example {example.get('id', i)}: {outcome.error}")
        encoded.append([(sequence.ids.tolist(), sequence.weights().tolist()) for sequence in outcome.sequences])
    sequences = [sequence for parts in encoded for sequence in parts]
    owners = [i for i, parts in enumerate(encoded) for _ in parts]
    asked = [i for i, example in enumerate(examples) if has_answer(example)]
    prompts = [encoder.prompt(examples[i]["messages"], examples[i].get("tools")) for i in asked]
    lengths = []
    for i, prompt in zip(asked, prompts, strict=True):
        length = len(encoded[i][-1][0]) - len(prompt) if encoded[i] else 0
        if length <= 0:  # the last answer carries no loss, so no sequence ends with it
            length = len(tokenizer.encode(examples[i]["messages"][-1]["content"], add_special_tokens=False)) + 1
        lengths.append(length)
    max_new_tokens = options.max_new_tokens or 16 + max(lengths, default=0)
    max_positions = getattr(AutoConfig.from_pretrained(options.model), "max_position_embeddings", None) or math.inf
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
        "general_source": general_text.SOURCE if options.general else None,
        "max_new_tokens": max_new_tokens,
    }
    if before is not None:
        report.check_comparable(before, header)
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
    )


def has_answer(example: dict) -> bool:
    """Whether an example is a chat that ends with a text of the assistant. A call of a tool is not scored as text."""
    last = example["messages"][-1] if "messages" in example else {}
    return last.get("role") == "assistant" and last.get("content") is not None and not last.get("tool_calls")


def choose_examples(examples: list[dict], limit: int | None) -> list[dict]:
    """At most `limit` examples in file order: a random choice, because files may be sorted, but always the same one."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), limit))]


def evaluate_examples(
    options: EvaluationOptions, inputs: EvaluationInputs, ranks: Ranks, score_answers: ScoreAnswers
) -> dict:
    """The result as it is written to JSON, without `seconds`. A collective: every rank gets the whole result.

    `score_answers` knows the task; see `eval.regulator.score.score_answers` for its arguments.
    """
    dtype = agreed_dtype(options.dtype, ranks)
    sharded = is_sharded(options.sharding, [options.model], ranks)
    model, finish = load_causal_lm(options.model, dtype, sharded, ranks)
    losses = compute_over_ranks(
        functools.partial(target_losses, model), inputs.sequences, ranks, "loss of the responses", finish
    )
    stop_ids = stop_tokens(model, inputs.stop_ids)
    answers = compute_over_ranks(
        lambda share, advance: greedy_answers(
            model, share, stop_ids, inputs.max_new_tokens, options.batch_size, advance
        ),
        inputs.prompts,
        ranks,
        "answers",
        finish,
    )
    loss = total(losses)
    by_example = [LossSum(0.0, 0) for _ in inputs.examples]
    for owner, part in zip(inputs.owners, losses, strict=True):
        by_example[owner] = total([by_example[owner], part])
    result = inputs.header | {
        "dtype": dtype_name(dtype),
        "processes": ranks.world_size,
        "sharding": "full" if sharded else "none",
        "cut_short": sum(len(answer) == inputs.max_new_tokens for answer in answers),
        "loss": {"mean": loss.mean, "targets": loss.targets},
        "losses": [(loss.nats, loss.targets) for loss in by_example],  # for intervals
    }
    if inputs.asked:
        texts = [inputs.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        asked = [inputs.examples[i] for i in inputs.asked]
        result |= score_answers(asked, texts, str(options.data), inputs.training, str(options.train))
    if options.general:
        window = min(GENERAL_WINDOW, inputs.max_positions)
        result["general"] = general_perplexity(model, inputs.tokenizer, window, ranks, finish)
    return result
