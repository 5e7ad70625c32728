"""The examples and the metric of run.eval_generate, chosen before a process group starts."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.sha256 import sha256
from configs.config import Config
from configs.load import is_of_answers, parse_best_by
from data.encoding import ExampleEncoder
from data.examples import Documents
from data.files import expand
from data.formats import read_files
from data.held_out import group_hash, is_held_out
from data.reader import Reader
from data.sources import Windows
from data.store import is_store
from eval.asked_examples import DEFAULT_LENGTH, LENGTH_MARGIN, choose_examples, has_answer
from eval.metric import Metric, load_metric, plain_scores, reference_of, single_scores
from eval.upper_bound import BET, BETS, CAP, bounded_mean
from model.architectures import read_model_config
from model.rope import window
from training.description import counted
from training.inputs import Questions

KEPT_TOKENS = 64  # of the base's answer to a prompt of forgetting.keep
SELECTING = 5  # each 5th prompt of forgetting.keep selects, the others certify


def choose_questions(config: Config, reader: Reader, train: Documents | Windows, is_first: bool) -> Questions:
    """Choose run.eval_generate chats of data.validation, encode their prompts, and try the metric on their references.

    `scripts/evaluate.py --limit` chooses the same chats if the file has no other examples. Only the first process gets the
    metric. Raise UserError if there is no chat, if none fits into the model's window, for a chat that cannot be rendered
    (unless data.on_bad=skip leaves it out), and for a metric that cannot be used.
    """
    model, encoder = config.model, reader.encoder
    candidates = _candidates(config, reader)
    limit = config.eval.max_new_tokens or _answer_length(train)
    shape = read_model_config(model.path, model.rope_type, model.rope_factor, model.rope_original_length)
    examples, prompts, num_refused, num_long = [], [], 0, 0
    for where, example in choose_examples(candidates, config.run.eval_generate):
        try:
            prompt = encoder.prompt(example["messages"], example.get("tools"))
        except UserError as error:
            if reader.reading.on_bad == "error":
                raise UserError(f"{where}: {error}") from error
            num_refused += 1
            continue
        if len(prompt) + limit > window(shape):
            num_long += 1
            continue
        examples.append(example)
        prompts.append(prompt)
    if not prompts:
        raise UserError(
            f"run.eval_generate: no prompt of data.validation can be rendered and leaves room for an answer of {limit} tokens in "
            f"the model's window of {window(shape)}; lower eval.max_new_tokens"
        )
    metric, ideal = _metric(config, examples) if is_first else (None, {})
    line = f"answers at each evaluation: {len(examples)} of {len(candidates):,} chats of data.validation"
    line += f", {num_long} more leave no room for an answer" if num_long else ""
    line += f", {num_refused} more are refused" if num_refused else ""
    return Questions(examples, prompts, encoder.stop_ids, limit, metric, line, ideal)


def prompts_to_keep(config: Config, encoder: ExampleEncoder, is_first: bool) -> tuple[Questions, str]:
    """Return the different prompts of forgetting.keep, and the SHA-256 of the file.

    A final answer is read only with forgetting.max_drop; the first process tries the metric on it. Raise UserError for too few
    prompts, for a row that is no chat or has no answer or no room for it, and for a metric that cannot be used.
    """
    model, path, max_drop = config.model, config.forgetting.keep or "", config.forgetting.max_drop
    shape = read_model_config(model.path, model.rope_type, model.rope_factor, model.rope_original_length)
    examples, limit, chosen, metric, ideal = list(read_files([path])), KEPT_TOKENS, {}, None, {}
    if max_drop is not None:
        if missing := [where for where, example in examples if not has_answer(example)]:
            raise UserError(f"{missing[0]} does not end with an answer; forgetting.max_drop scores it as the reference")
        lengths = [len(encoder.tokenizer.encode(reference_of(example))) for _, example in examples]
        limit = config.eval.max_new_tokens or max(limit, math.ceil(LENGTH_MARGIN * max(lengths, default=0)))
    for where, example in examples:
        if not example.get("messages"):
            raise UserError(f"{where} is no chat; rows of forgetting.keep need `messages` that end with a prompt")
        try:
            prompt = encoder.prompt(example["messages"], example.get("tools"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if len(prompt) + limit > window(shape):
            raise UserError(
                f"{where}: its {len(prompt):,} tokens leave no room for an answer of {limit} in the model's window; "
                "remove it from forgetting.keep"
            )
        chosen.setdefault(tuple(prompt), example)
    bets, budget = ((BET,), 1 / CAP) if max_drop is None else (BETS, max_drop)
    least = bounded_mean(np.zeros(max(1, len(chosen) - math.ceil(len(chosen) / SELECTING))), 1.0, bets).bound
    if least > budget:
        raise UserError(
            f"forgetting.keep={path} has {counted(len(chosen), 'different prompt')}, which is too few: even if nothing is "
            f"forgotten, the bound is {least / budget:.4g} times the budget"
        )
    ids, asked = [list(prompt) for prompt in chosen], [*chosen.values()]
    line = f"answers for forgetting.keep at the end: {len(ids)} prompts"
    if max_drop is not None and is_first:
        metric, _ = _metric(config, asked)
        scores = single_scores(metric, [reference_of(example) for example in asked], asked)
        ideal = {config.eval.metric or "exact_match": float(np.mean(scores))}
    return Questions(asked, ids, encoder.stop_ids, limit, metric, line, ideal), sha256(Path(path))


def _candidates(config: Config, reader: Reader) -> list[tuple[str, dict]]:
    """Return (file and line, chat) for each validation chat of the main source that ends with an answer, in file order."""
    data, share = config.data, config.data.validation_share
    paths = data.train if share else data.validation
    chats = []
    reading = reader.reading if share else replace(reader.reading, max_samples=None)
    files = expand(tuple(path for path in paths if not is_store(path)))
    for where, example in read_files(files, reading):  # skipped rows are counted when the loss's data are read
        if has_answer(example) and (not share or is_held_out(group_hash(example, data.split_by), share)):
            chats.append((where, example))
    if not chats:
        raise UserError(
            "run.eval_generate asks chats, and the validation data have no chat that ends with an answer; set it to 0, or give prompt "
            "and completion as lists of messages"
        )
    return chats


def _answer_length(train: Documents | Windows) -> int:
    if isinstance(train, Windows) or not train.longest_span:
        return DEFAULT_LENGTH
    return math.ceil(LENGTH_MARGIN * train.longest_span)


def _metric(config: Config, examples: list[dict]) -> tuple[Metric, dict[str, float]]:
    """Return the metric and its scores of the references. A mistake in it ends here, before anything is trained."""
    name = config.eval.metric
    references = [reference_of(example) for example in examples]
    metric: Metric = load_metric(name) if name else plain_scores
    ideal = metric(references, examples)
    curve, _ = parse_best_by(config.run.best_by)
    if is_of_answers(curve) and curve not in [f"validation/{name}" for name in ideal]:
        by = f"eval.metric={name} scores" if name else "the data's own scores are"
        raise UserError(f"run.best_by={config.run.best_by}: {by} {', '.join(ideal)}; choose one of them")
    return metric, ideal
