"""Choose the examples of a file that a model answers, and read the options that name their format and metric."""

import argparse
import random
from collections.abc import Callable
from typing import TypeVar

from configs.load import FORMATS, check_fields, parse_dict
from data.files import Reading

DEFAULT_LENGTH = 256  # tokens of an answer, without a training split
LENGTH_MARGIN = 1.25  # over the longest answer of the training split
UNREADABLE = "(unreadable)"  # the predicted label of an answer that has an unreadable line, or is unreadable as a whole

Item = TypeVar("Item")  # an example, or a pair of its file and line with it
# (answers, examples, name of the file, training examples, name of their file) -> scores
ScoreAnswers = Callable[[list[str], list[dict], str, list[dict] | None, str], dict]


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add `--format` and `--fields`, whose values go to `read_as`, and `--metric`, whose value goes to `metric_figures`."""
    parser.add_argument("--format", choices=FORMATS, default="auto", help="like data.format of a config (%(default)s)")
    parser.add_argument("--fields", default="", help="like data.fields of a config: messages=dialogue,role=speaker")
    metric = "MODULE:FUNCTION, scores of your own, like eval.metric of a config (docs/runs.md)"
    parser.add_argument("--metric", default="", help=metric)


def read_as(format: str, fields: str) -> Reading:
    """Return how files are read. Raises UserError for a key that data.fields does not know."""
    names = {key: str(name) for key, name in parse_dict(fields, str, "--fields").items()}
    check_fields(names, "--fields")
    return Reading(format, names)


def report_of(example: dict) -> str:
    """Return the first user message of an example, or "" if it has none."""
    return next((message["content"] for message in example["messages"] if message["role"] == "user"), "")


def has_answer(example: dict) -> bool:
    """Return whether an example is a chat that ends with an assistant text. A tool call is not scored as text."""
    last = example["messages"][-1] if "messages" in example else {}
    return last.get("role") == "assistant" and last.get("content") is not None and not last.get("tool_calls")


def choose_examples(examples: list[Item], limit: int | None) -> list[Item]:
    """Choose at most `limit` examples at random, because files may be sorted, but always the same ones, in file order."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), limit))]
