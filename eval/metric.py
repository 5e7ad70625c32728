"""Scores of answers for any task: the user's function, or exact match and ROUGE-L."""

import copy
import importlib.util
import math
import re
import reprlib
from collections.abc import Callable, Mapping

from common.errors import UserError
from configs.user_code import explain, load_function

# (answers, examples) -> name -> score. An example is a dictionary as in docs/data.md; its last message is the reference.
Metric = Callable[[list[str], list[dict]], dict[str, float]]
WRITE = "it gets (answers, examples) and must return a number or a dictionary of numbers"


def reference_of(example: dict) -> str:
    """Return the reference answer: the last message of the chat."""
    return example["messages"][-1]["content"]


def load_metric(name: str) -> Metric:
    """Import the function MODULE:FUNCTION, or the `metric` of the task MODULE (eval/task.py). Raise UserError if there is none.

    Every call checks the result (`checked_scores`) and raises UserError if the function fails. A single number becomes the
    score `metric`.
    """
    if ":" in name:
        function = load_function("eval.metric", name)
    else:
        from eval.task import load_task  # a run without a task imports no library of the evaluation

        function = load_task(name, "eval.metric").metric
    if function is None:
        raise UserError(f"eval.metric={name}: the task has no metric; name a function, MODULE:FUNCTION")

    def metric(answers: list[str], examples: list[dict]) -> dict[str, float]:
        try:
            result = function(list(answers), copy.deepcopy(examples))  # the function may modify its arguments
        except (Exception, SystemExit) as error:  # rank 0 must not leave the other ranks waiting
            raise UserError(f"eval.metric={name} fails: {explain(error)}") from error
        return checked_scores(name, result)

    return metric


def metric_figures(name: str) -> Callable[[list[str], list[dict]], dict]:
    """Return a function (answers, examples) -> the user's scores as part of a result; it returns {} if `name` is empty.

    The part is `metric` with the function's name (`by`), its `scores`, and `each`: for every score that is the mean of the
    scores of single examples, these scores, from which an interval is computed. Raise UserError if the function cannot be
    imported.
    """
    metric = load_metric(name) if name else None

    def figures(answers: list[str], examples: list[dict]) -> dict:
        if not metric:
            return {}
        scores = metric(answers, examples)
        try:
            single = [metric([answer], [example]) for answer, example in zip(answers, examples, strict=True)]
        except UserError:  # the function cannot score a single answer
            single = []
        each = {}
        for key, score in scores.items():
            values = [scores_of_example[key] for scores_of_example in single if key in scores_of_example]
            if len(values) == len(answers) and math.isclose(score, math.fsum(values) / len(values), abs_tol=1e-9):
                each[key] = values
        return {"metric": {"by": name, "scores": scores, "each": each}}

    return figures


def checked_scores(name: str, result: object) -> dict[str, float]:
    """Return the result of the metric `name` as name -> float. Raise UserError if it is anything else.

    NaN is a score without a value, such as a mean over the answers that are JSON if no answer is JSON. The other scores count.
    """
    scores = result if isinstance(result, Mapping) else {"metric": result}
    if not scores:
        raise UserError(f"eval.metric={name} returns no score; {WRITE}")
    checked = {}
    for key, value in scores.items():
        if not isinstance(key, str) or not re.fullmatch(r"[\w.-]+", key) or key in ("loss", "sample"):
            raise UserError(
                f"eval.metric={name} returns the name {key!r}; use letters, digits, `_`, `.` and `-`, but not loss or sample"
            )
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            number = float(value)  # pyright: ignore[reportArgumentType]  # NumPy's and torch's numbers too
        except Exception:  # the value may be of any class
            raise UserError(f"eval.metric={name} returns {reprlib.repr(value)} for {key}; {WRITE}") from None
        if math.isinf(number):
            raise UserError(
                f"eval.metric={name} returns {number} for {key}; a score must be finite, or NaN for no value"
            )
        checked[key] = number
    return checked


def single_scores(metric: Metric | None, answers: list[str], examples: list[dict]) -> list[float]:
    """Return the first score of each answer alone. Raise UserError if it is not between 0 and 1. For rank 0, which has the metric."""
    assert metric is not None
    values = []
    for answer, example in zip(answers, examples, strict=True):
        name, value = next(iter(metric([answer], [example]).items()))
        if not 0 <= value <= 1:
            raise UserError(f"forgetting.max_drop needs eval.metric's first score between 0 and 1; {name} is {value:g}")
        values.append(value)
    return values


def plain_scores(answers: list[str], examples: list[dict]) -> dict[str, float]:
    """Return `exact_match`, the fraction of answers that equal the reference except for white space, and the mean `rouge_l`.

    ROUGE-L needs the package rouge-score; without it the key is missing.
    """
    references = [reference_of(example) for example in examples]
    exact = [a.split() == b.split() for a, b in zip(answers, references, strict=True)]
    scores = {"exact_match": sum(exact) / len(exact)}
    if importlib.util.find_spec("rouge_score"):
        from eval.rouge import mean, rouge_l  # training needs no evaluation library

        scores["rouge_l"] = mean(rouge_l(references, answers))
    return scores
