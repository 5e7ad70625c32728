"""The task interface: how to check, score and show the answers to one kind of example.

A task is a module with an object `TASK`. The scripts take it as `--task MODULE`, and a run takes it as `eval.metric=MODULE` for
its curves. Without a name the task is `ANY_CHAT`: exact match, ROUGE-L, and the user's --metric.
"""

import argparse
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError, missing_package
from configs.user_code import explain
from data.files import Reading
from eval import report
from eval.report import Figure

# (examples, their file): raises UserError for the first field that is missing or malformed; the result is ignored.
Check = Callable[[Sequence[dict], str], object]
# (answers, examples, file of the examples, training examples or None, their file, **options) -> a result. It has the key
# `answers`, whose rows `Task` describes, and the keys that `figures` and `more_lines` read.
Score = Callable[..., dict]
# (examples, training examples or None, file of the examples, **options) -> name -> result with the key `answers`
Baselines = Callable[..., dict[str, dict]]


def _score_chats(
    texts: Sequence[str], examples: Sequence[dict], where: str, training: Sequence[dict] | None, train_where: str
) -> dict:
    from eval.rouge import score_whole_answers  # not for --task of a vocabulary, which scores no answers

    return score_whole_answers(texts, examples)


@dataclass(frozen=True)
class Task:
    """The functions and words of a task. The defaults suit any chat. docs/runs.md has an example.

    The rows `answers` in the result of `score` stand in the order of the examples. Each row is a dictionary that JSON can hold,
    with `id` (or None) and `answer`, the text. The other keys are optional. Except for `pair`, a metric is left out unless every
    row has its keys:

    - `reference`: a text that --show prints below the answer.
    - `true`, `predicted`: lists of labels. They give micro-averaged `f1` and the fraction `exact` of rows whose two sets are
      equal. `predicted` is None if the whole answer cannot be read, which is never exact. In a row with `unreadable` true, F1
      counts one more wrong label.
    - [right, true, claimed] under any other name: three integers that count items of the answer. Beside `true` and `predicted`
      they give F1 = 2 right / (true + claimed), summed over the rows. `fields` gives the metric `field_f1`.
    - `pair`: two rows with the same value are a minimal pair. `pairs` is the fraction of pairs with both rows exact.
    - `exact` (a boolean) and `rouge_l` (a number): their means are `exact_match` and `rouge_l`.
    - `cluster`: a name that alike rows share, such as their customer. Intervals draw whole clusters. A row without it, or with
      None, is a cluster of its own.

    `eval.intervals.terms_of` computes these metrics, scripts/compare.py shows all of them, and the other scripts show the figures
    of `figures`. There, `Figure.metric` names the metric whose interval stands beside a figure.
    """

    check: Check = lambda examples, where: None
    score: Score = _score_chats
    baselines: Baselines = lambda examples, training, where, **options: {}
    # Options of the command line: add them, set their defaults, and read the files that they name. The dictionary of
    # `read_options` is passed to `score` and `baselines` as keyword arguments.
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    set_defaults: Callable[[argparse.Namespace], None] = lambda arguments: None
    read_options: Callable[[argparse.Namespace, Reading], dict[str, Any]] = lambda arguments, reading: {}
    # The rows of the printed table, and the lines below it.
    figures: Callable[[dict], list[Figure]] = report.figures
    more_lines: Callable[[dict], list[str]] = lambda result: []
    # (answers, examples) -> name -> score: the curves of a run with eval.metric=MODULE.
    metric: Callable[[list[str], list[dict]], dict[str, float]] | None = None
    # For a vocabulary: regular expressions of strings that may become one token, and (names) -> more texts to search for them.
    patterns: Sequence[str] = ()
    forms: Callable[[Sequence[str]], Iterable[str]] | None = None
    # For a comparison: the words for an example, a cluster of examples and a label, and the baseline that is always shown.
    example: str = "example"
    cluster: str = "cluster"
    label: str = "label"
    main_baseline: str = ""


ANY_CHAT = Task()


def load_task(name: str, key: str = "--task") -> Task:
    """Import the module `name` and return its `TASK`; `ANY_CHAT` for "". Raise UserError, which names `key`."""
    if not name:
        return ANY_CHAT
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the module may be the user's
        if missing_package(error):
            raise
        raise UserError(f"{key}={name}: the module cannot be imported: {explain(error)}") from error
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise UserError(
            f"{key}={name}: {module.__file__ or name} has no TASK (eval/task.py); a function is named MODULE:FUNCTION"
        )
    return task


def add_task_option(parser: argparse.ArgumentParser) -> Task:
    """Add `--task`. Return the task that the command line of this process names, so that its own options can be added."""
    early = argparse.ArgumentParser(add_help=False)
    for each in (parser, early):
        each.add_argument("--task", default="", metavar="MODULE", help="the task of the examples (default: any chat)")
    return load_task(early.parse_known_args()[0].task)


def full_report(task: Task, result: dict, before: dict | None, show: int) -> str:
    """Return the table, the comparison with an earlier result if there is one, and the first `show` answers."""
    parts = ["\n".join([report.table(result, task.figures), *task.more_lines(result)])]
    parts += [report.compare(before, result, task.figures)] if before else []
    parts += [report.one_answer(result, index) for index in range(min(show, len(result.get("answers", ()))))]
    return "\n\n".join(parts)
