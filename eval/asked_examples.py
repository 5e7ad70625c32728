"""Which examples of a file are read and asked, and what scores their answers."""

import argparse
import random
from collections.abc import Callable
from typing import TypeVar

from configs.load import FORMATS, check_fields, parse_dict
from data.files import Reading

DEFAULT_LENGTH = 256  # tokens of an answer, if nothing else is known
LENGTH_MARGIN = 1.25  # over the longest answer of the training split
UNREADABLE = "(unreadable)"  # the label that an answer predicts which cannot be read, in whole or in a line

Item = TypeVar("Item")  # an example, alone or with its place
# (examples, answers, name of the file, training examples, name of their file) -> scores
ScoreAnswers = Callable[[list[dict], list[str], str, list[dict] | None, str], dict]


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add `--format` and `--fields`, whose values go to `read_as`, and `--metric`, whose value goes to `metric_figures`."""
    parser.add_argument("--format", choices=FORMATS, default="auto", help="like data.format of a config (%(default)s)")
    parser.add_argument("--fields", default="", help="like data.fields of a config: messages=dialogue,role=speaker")
    metric = "MODULE:FUNCTION, scores of your own, like eval.metric of a config (docs/runs.md)"
    parser.add_argument("--metric", default="", help=metric)


def read_as(format: str, fields: str) -> Reading:
    """How files are read. Raises UserError for a key that is not ours."""
    names = {key: str(name) for key, name in parse_dict(fields, str, "--fields").items()}
    check_fields(names, "--fields")
    return Reading(format, names)


def report_of(example: dict) -> str:
    """The first user message of an example: what the model is asked about, without the system message; "" without one."""
    return next((message["content"] for message in example["messages"] if message["role"] == "user"), "")


def has_answer(example: dict) -> bool:
    """Whether an example is a chat that ends with a text of the assistant. A call of a tool is not scored as text."""
    last = example["messages"][-1] if "messages" in example else {}
    return last.get("role") == "assistant" and last.get("content") is not None and not last.get("tool_calls")


def choose_examples(examples: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` examples in file order: a random choice, because files may be sorted, but always the same one."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), limit))]
