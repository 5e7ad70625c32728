"""Scores of answers for any task: a function of the user's, or exact match and ROUGE-L."""

import copy
import importlib.util
import math
import re
import reprlib
from collections.abc import Callable, Mapping

from common.errors import UserError
from common.user_code import explain, load_function

# (answers, examples) -> name -> score. An example is a dictionary as in docs/data.md; its last message is the reference.
Metric = Callable[[list[str], list[dict]], dict[str, float]]
WRITE = "it gets (answers, examples) and must return a number or a dictionary of numbers"


def reference_of(example: dict) -> str:
    """The answer in the data: the last message of a chat."""
    return example["messages"][-1]["content"]


def load_metric(name: str) -> Metric:
    """The function MODULE:FUNCTION, whose results are checked at every call. Raises UserError.

    A number is the score `metric`.
    """
    function = load_function("eval.metric", name)

    def metric(answers: list[str], examples: list[dict]) -> dict[str, float]:
        try:
            result = function(list(answers), copy.deepcopy(examples))  # it may change what it gets
        except (Exception, SystemExit) as error:  # rank 0 must not leave the others alone
            raise UserError(f"eval.metric={name} fails: {explain(error)}") from error
        return checked_scores(name, result)

    return metric


def metric_figures(name: str) -> Callable[[list[str], list[dict]], dict]:
    """What --metric adds to a result: (answers, examples) -> `metric`, with the name and the scores; nothing without a name.

    `each` has, of every score that is the mean of those of single examples, these: an interval needs them. Raises UserError
    if there is no such function.
    """
    metric = load_metric(name) if name else None

    def figures(answers: list[str], examples: list[dict]) -> dict:
        if not metric:
            return {}
        scores = metric(answers, examples)
        try:
            single = [metric([answer], [example]) for answer, example in zip(answers, examples, strict=True)]
        except UserError:  # it cannot score one answer alone
            single = []
        each = {}
        for key, score in scores.items():
            values = [one[key] for one in single if key in one]
            if len(values) == len(answers) and math.isclose(score, math.fsum(values) / len(values), abs_tol=1e-9):
                each[key] = values
        return {"metric": {"by": name, "scores": scores, "each": each}}

    return figures


def checked_scores(name: str, result: object) -> dict[str, float]:
    """The result of a metric as name -> float. Raises UserError if it is anything else.

    NaN is a score without a value, such as a mean over the answers that are JSON where none is. The others count.
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


def plain_scores(answers: list[str], examples: list[dict]) -> dict[str, float]:
    """`exact_match`, the share of answers that are the reference but for white space, and `rouge_l` where it can be computed.

    ROUGE-L needs the package rouge-score.
    """
    references = [reference_of(example) for example in examples]
    exact = [a.split() == b.split() for a, b in zip(answers, references, strict=True)]
    scores = {"exact_match": sum(exact) / len(exact)}
    if importlib.util.find_spec("rouge_score"):
        from eval.rouge import mean, rouge_l  # training needs no evaluation library

        scores["rouge_l"] = mean(rouge_l(references, answers))
    return scores
