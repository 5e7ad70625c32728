"""Evaluate a model directory on examples: loss of the response tokens, and scores of the generated answers."""

import functools
import hashlib
import math
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
from eval.asked_examples import ScoreAnswers, choose_examples, has_answer
from eval.constrained import Grammar
from eval.generate import greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import compute_over_ranks
from eval.perplexity import LossSum, general_perplexity, target_losses, total
from eval.results import prepare_output, read_result
from eval.shots import choose_shots, fitting_prompt

GrammarOf = Callable[[list[dict]], tuple[str, str]]

DEFAULT_LENGTH = 256  # tokens of an answer, if nothing else is known
LENGTH_MARGIN = 1.25  # over the longest answer of the training split
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
    for name, least in (("limit", 1), ("batch_size", 1), ("max_new_tokens", 1), ("shots", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {value}")
    fields = {key: str(name) for key, name in parse_dict(options.fields, str, "--fields").items()}
    check_fields(fields, "--fields")
    reading = Reading(options.format, fields)
    examples = choose_examples(read_examples(options.data, reading), options.limit)
    training = list(filter(has_answer, read_examples(options.train, reading))) if options.train else None
    before = read_result(options.before) if options.before else None
    if options.shots and not training:
        raise UserError(f"--shots {options.shots} takes examples from the training split; name it with --train")
    for output in filter(None, (options.json, options.answers)):
        prepare_output(output)
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
    max_new_tokens, length_from = answer_length(options, training, tokenizer)
    max_positions = getattr(AutoConfig.from_pretrained(options.model), "max_position_embeddings", None) or math.inf
    shots = choose_shots(training or [], options.shots)
    prompts, shots_used = [], []
    for i in asked:
        prompt, used = fitting_prompt(
            examples[i]["messages"],
            shots,
            functools.partial(encoder.prompt, tools=examples[i].get("tools")),
            max_positions - max_new_tokens,
        )
        prompts.append(prompt)
        shots_used.append(used)
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
        "max_new_tokens_from": length_from,
        "shots": options.shots,
        "fewest_shots": min(shots_used, default=0),  # where the context holds no more
        "constrained": options.constrained,
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


def evaluate_examples(
    options: EvaluationOptions,
    inputs: EvaluationInputs,
    ranks: Ranks,
    score_answers: ScoreAnswers,
    grammar_of: GrammarOf | None = None,
) -> dict:
    """The result as it is written to JSON, without `seconds`. A collective: every rank gets the whole result.

    `score_answers` knows the task; see `eval.regulator.score.score_answers` for its arguments. So does `grammar_of`, which
    gives the (pattern, text after which everything is allowed) of the answers to examples, for `options.constrained`.
    """
    asked = [inputs.examples[i] for i in inputs.asked]
    pattern = grammar_of(asked) if options.constrained and grammar_of and asked else None
    dtype = agreed_dtype(options.dtype, ranks)
    sharded = is_sharded(options.sharding, [options.model], ranks)
    model, finish = load_causal_lm(options.model, dtype, sharded, ranks)
    losses = compute_over_ranks(
        functools.partial(target_losses, model), inputs.sequences, ranks, "loss of the responses", finish
    )
    stop_ids = stop_tokens(model, inputs.stop_ids)
    grammar = Grammar(*pattern, inputs.tokenizer, frozenset(stop_ids)) if pattern else None
    answers = compute_over_ranks(
        lambda share, advance: greedy_answers(
            model, share, stop_ids, inputs.max_new_tokens, options.batch_size, advance, grammar
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
        result |= score_answers(asked, texts, str(options.data), inputs.training, str(options.train))
    if options.general:
        window = min(GENERAL_WINDOW, inputs.max_positions)
        result["general"] = general_perplexity(model, inputs.tokenizer, window, ranks, finish)
    return result
