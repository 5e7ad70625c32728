"""The metrics of a comparison: each as sums over examples, texts or questions, averaged over the seeds of an arm."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.asked_examples import UNREADABLE
from eval.comparison.arms import Arm, Seed
from eval.intervals import Terms, clusters_of, labels, ratio, terms_of

BASE = "base model"  # the row with the base model's perplexity and questions
OWN = "own/"  # the prefix of the scores of --metric


@dataclass(frozen=True)
class Measure:
    """How a metric is shown and judged. better: +1 if more is better, -1 if less is, 0 if that is unknown.

    units: the things over which its intervals are computed; "" stands for the examples.
    """

    heading: str
    better: int = 1
    digits: int = 3
    units: str = ""


MEASURES = {
    "f1": Measure("F1"),
    "macro_f1": Measure("macro-F1"),
    "precision": Measure("precision"),
    "recall": Measure("recall"),
    "exact": Measure("all labels right"),
    "exact_match": Measure("exact match"),
    "rouge_l": Measure("ROUGE-L"),
    "loss": Measure("loss, nats/token", better=-1, digits=4),
    "perplexity": Measure("general perplexity/byte", better=-1, units="texts"),
    "kl": Measure("KL from base, nats/token", better=-1, units="texts"),
    "questions": Measure("general questions", units="questions"),
}
GENERAL = ("perplexity", "kl", "questions")  # measured on general language
OF_MODELS = ("loss", *GENERAL)  # metrics in which two models differ although their answers are equal


def measure_of(metric: str) -> Measure:
    """Return how a metric is shown. Which value of a user's own score is better is unknown."""
    if metric.startswith(OWN):
        return Measure(metric.removeprefix(OWN), better=0)
    return MEASURES.get(metric) or Measure(metric.replace("_f1", "-F1"))


def ordered(metrics: Iterable[str]) -> list[str]:
    """Sort metrics as tables show them: the user's own first, the F1 of a task's other counts (`terms_of`) after macro-F1."""
    places = {name: place for place, name in enumerate(MEASURES)}
    return sorted(dict.fromkeys(metrics), key=lambda name: -1 if name.startswith(OWN) else places.get(name, 1.5))


def with_metric(
    arms: Sequence[Arm], examples: list[dict], figures: Callable[[list[str], list[dict]], dict]
) -> list[Arm]:
    """Return the arms with the user's scores of their answers (`eval.metric.metric_figures`). examples: the asked ones.

    Scores in a stored result are dropped: another function, or an earlier version of this one, may have computed them.
    """

    def scored(seed: Seed) -> Seed:
        task = {key: value for key, value in seed.task.items() if key != "metric"}
        answers = [answer["answer"] for answer in task.get("answers", ())]
        return replace(seed, task=task | figures(answers, examples) if len(answers) == len(examples) > 0 else task)

    return [replace(arm, seeds=tuple(map(scored, arm.seeds))) for arm in arms]


def arm_terms(arms: Sequence[Arm], named: Sequence[str]) -> tuple[dict[str, dict[str, Terms]], bool]:
    """Return (arm -> metric -> its terms averaged over the seeds, whether the loss is per answer instead of per token).

    named: from `named_labels`. A metric that a seed lacks is left out. Models with different tokenizers split the same
    answers into different numbers of tokens. Nats per token cannot be compared then, nats per answer can.
    """
    targets = {seed.task["loss"]["targets"] for arm in arms for seed in arm.seeds if seed.task.get("loss")}
    per_answer = len(targets) > 1

    def of_seed(seed: Seed) -> dict[str, Terms]:
        terms = terms_of(seed.task)
        if per_answer and "loss" in terms:
            nats = terms["loss"].rows[:, :1]
            terms["loss"] = replace(terms["loss"], rows=np.concatenate([nats, np.ones_like(nats)], axis=1))
        terms |= label_terms(seed.task, named)
        return terms | (general_terms(seed.general, "tuned") if seed.general else {})

    terms_by_arm = {}
    for arm in arms:
        seeds = [*map(of_seed, arm.seeds)]
        shared = [name for name in seeds[0] if all(name in terms for terms in seeds)]
        terms_by_arm[arm.name] = {name: averaged([terms[name] for terms in seeds]) for name in shared}
    return terms_by_arm, per_answer


def averaged(terms: Sequence[Terms]) -> Terms:
    """Return the mean of the terms of an arm's seeds. An example counts once, however many seeds answered it."""
    rows, bounded = np.mean([seed.rows for seed in terms], axis=0), all(seed.bounded for seed in terms)
    return replace(terms[0], rows=rows, bounded=bounded, seeds=tuple(seed.value for seed in terms))


def named_labels(tasks: Sequence[dict]) -> list[str]:
    """Return the labels that are true or predicted in any of the results, sorted. Macro-F1 is the mean over these."""
    answers = [answer for task in tasks for answer in task.get("answers", ()) if "true" in answer]
    return sorted({label for answer in answers for label in (*answer["true"], *(answer["predicted"] or ()))})


def label_terms(task: dict, named: Sequence[str]) -> dict[str, Terms]:
    """Return the terms of micro precision, micro recall and macro-F1 over `named` (`named_labels`); {} without labels."""
    answers = task.get("answers") or ()
    if not answers or not all("true" in answer for answer in answers):
        return {}
    clusters, counts = clusters_of(answers), label_counts(answers, [*dict.fromkeys([*named, UNREADABLE])])
    right, predicted, true = counts.sum(axis=1).T
    return {
        "precision": Terms(np.stack([right, predicted], axis=1), clusters, ratio),
        "recall": Terms(np.stack([right, true], axis=1), clusters, ratio),
        "macro_f1": Terms(counts[:, : len(named)].reshape(len(answers), -1), clusters, _macro_f1),
    }


def label_f1(task: dict, label: str) -> Terms:
    """Return the terms of one label's F1, which is NaN if no example has the label and no answer names it."""
    right, predicted, true = label_counts(task["answers"], [label])[:, 0].T
    return Terms(np.stack([2 * right, predicted + true], axis=1), clusters_of(task["answers"]), _defined_ratio)


def label_counts(answers: Sequence[dict], named: Sequence[str]) -> np.ndarray:
    """Return `(examples, labels, 3)`: whether each label was rightly predicted, predicted, true."""
    rows = []
    for true, predicted in map(labels, answers):
        rows.append([[label in true & predicted, label in predicted, label in true] for label in named])
    return np.array(rows, dtype=float).reshape(len(answers), len(named), 3)


def general_terms(general: dict, side: str) -> dict[str, Terms]:
    """Return the terms of perplexity (per byte), of the questions and, for the side "tuned", of the KL from the base.

    Units are texts and questions. side: "tuned" or "base".
    """
    texts, questions = general["per_text"], general["per_question"][side]
    clusters = range(len(texts["bytes"]))
    perplexity = np.array([texts[f"{side}_nats"], texts["bytes"]], dtype=float).T
    right = np.array([[float(is_right), 1.0] for is_right in questions])
    terms = {
        "perplexity": Terms(perplexity, clusters, lambda sums: np.exp(ratio(sums)), bounded=False),
        "questions": Terms(right, range(len(questions)), ratio),
    }
    if side == "tuned" and any(texts["compared"]):
        kl = np.array([texts["kl"], texts["compared"]], dtype=float).T
        terms["kl"] = Terms(kl, clusters, ratio, bounded=False)
    return terms


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the labels that are true or predicted in these examples. sums: `(..., 3 x labels)`."""
    right, predicted, true = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    occurs = true + predicted > 0
    f1 = 2 * right / np.maximum(predicted + true, 1e-9)
    return (f1 * occurs).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def _defined_ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
