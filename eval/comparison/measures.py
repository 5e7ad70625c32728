"""What is compared: each metric of an arm as sums over reports, texts or questions, averaged over the seeds of the arm."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eval.asked_examples import UNREADABLE
from eval.comparison.arms import Arm, Seed
from eval.intervals import Terms, clusters_of, labels, ratio, terms_of

ENGINE = "rule engine"  # the name of the baseline that evaluates rules on the reported figures, without the notes
BASE = "base model"  # the row of what was measured before training
OWN = "own/"  # begins the names of the scores of --metric


@dataclass(frozen=True)
class Measure:
    """How a metric is shown and judged. better: +1 if more is better, -1 if less is, 0 if nobody says.

    of: what its intervals are over; "" stands for the examples.
    """

    heading: str
    better: int = 1
    digits: int = 3
    of: str = ""


MEASURES = {
    "f1": Measure("F1"),
    "macro_f1": Measure("macro-F1"),
    "precision": Measure("precision"),
    "recall": Measure("recall"),
    "exact": Measure("reports all right"),
    "exact_match": Measure("exact match"),
    "rouge_l": Measure("ROUGE-L"),
    "loss": Measure("loss, nats/token", better=-1, digits=4),
    "perplexity": Measure("general perplexity/byte", better=-1, of="texts"),
    "kl": Measure("KL from base, nats/token", better=-1, of="texts"),
    "questions": Measure("general questions", of="questions"),
}
GENERAL = ("perplexity", "kl", "questions")  # of general language
OF_MODELS = ("loss", *GENERAL)  # what models that give the same answers do not share


def measure_of(metric: str) -> Measure:
    """How a metric is shown; of the user's own scores nobody says which value is the better one."""
    own = Measure(metric.removeprefix(OWN), better=0) if metric.startswith(OWN) else None
    return own or MEASURES.get(metric) or Measure(metric.replace("_f1", "-F1"))


def ordered(metrics: Iterable[str]) -> list[str]:
    """The metrics as tables show them: the user's own first, and those of other counts (`terms_of`) after macro-F1."""
    places = {name: place for place, name in enumerate(MEASURES)}
    return sorted(dict.fromkeys(metrics), key=lambda name: -1 if name.startswith(OWN) else places.get(name, 1.5))


def with_metric(
    arms: Sequence[Arm], examples: list[dict], figures: Callable[[list[str], list[dict]], dict]
) -> list[Arm]:
    """The arms with the user's scores of their answers (`eval.metric.metric_figures`), and no others. examples: the asked ones.

    What a stored result has may be by another function, or by what the function was then.
    """

    def scored(seed: Seed) -> Seed:
        task = {key: value for key, value in seed.task.items() if key != "metric"}
        answers = [answer["answer"] for answer in task.get("answers", ())]
        return replace(seed, task=task | figures(answers, examples) if len(answers) == len(examples) > 0 else task)

    return [replace(arm, seeds=tuple(map(scored, arm.seeds))) for arm in arms]


def arm_terms(arms: Sequence[Arm], rules: Sequence[str]) -> tuple[dict[str, dict[str, Terms]], bool]:
    """(arm -> metric -> its terms averaged over the seeds, whether the loss is per answer instead of per token).

    rules: those of `named_rules`. A metric that a seed lacks is left out. Models with different tokenizers split the same
    answers into different numbers of tokens. Nats per token cannot be compared then, nats per answer can.
    """
    targets = {seed.task["loss"]["targets"] for arm in arms for seed in arm.seeds if seed.task.get("loss")}
    per_answer = len(targets) > 1

    def of_seed(seed: Seed) -> dict[str, Terms]:
        terms = terms_of(seed.task)
        if per_answer and "loss" in terms:
            nats = terms["loss"].rows[:, :1]
            terms["loss"] = replace(terms["loss"], rows=np.concatenate([nats, np.ones_like(nats)], axis=1))
        terms |= label_terms(seed.task, rules)
        return terms | (general_terms(seed.general, "tuned") if seed.general else {})

    found = {}
    for arm in arms:
        first, *others = map(of_seed, arm.seeds)
        known = [name for name in first if all(name in terms for terms in others)]
        found[arm.name] = {name: averaged([terms[name] for terms in (first, *others)]) for name in known}
    return found, per_answer


def averaged(terms: Sequence[Terms]) -> Terms:
    """The mean of the terms of an arm's seeds: a report counts once, however many seeds answered it."""
    rows, bounded = np.mean([one.rows for one in terms], axis=0), all(one.bounded for one in terms)
    return replace(terms[0], rows=rows, bounded=bounded, seeds=tuple(one.value for one in terms))


def named_rules(tasks: Sequence[dict]) -> list[str]:
    """The rules that occur in the truth or are predicted, sorted; all that macro-F1 is a mean over."""
    answers = [answer for task in tasks for answer in task.get("answers", ()) if "true" in answer]
    return sorted({rule for answer in answers for rule in (*answer["true"], *(answer["predicted"] or ()))})


def label_terms(task: dict, rules: Sequence[str]) -> dict[str, Terms]:
    """Micro precision and recall, and F1 as the mean over the `rules` that occur in the truth or are predicted (macro).

    rules: those of `named_rules`. Empty for another task.
    """
    answers = task.get("answers") or ()
    if not answers or not all("true" in answer for answer in answers):
        return {}
    clusters, counts = clusters_of(answers), rule_counts(answers, [*dict.fromkeys([*rules, UNREADABLE])])
    right, said, true = counts.sum(axis=1).T
    return {
        "precision": Terms(np.stack([right, said], axis=1), clusters, ratio),
        "recall": Terms(np.stack([right, true], axis=1), clusters, ratio),
        "macro_f1": Terms(counts[:, : len(rules)].reshape(len(answers), -1), clusters, _macro_f1),
    }


def rule_f1(task: dict, rule: str) -> Terms:
    """F1 of one rule. Not a number where no report has it and no answer names it."""
    right, said, true = rule_counts(task["answers"], [rule])[:, 0].T
    return Terms(np.stack([2 * right, said + true], axis=1), clusters_of(task["answers"]), _defined_ratio)


def rule_counts(answers: Sequence[dict], rules: Sequence[str]) -> np.ndarray:
    """`(reports, rules, 3)`: whether a rule was found, predicted, true."""
    pairs = map(labels, answers)
    rows = [[[rule in true & said, rule in said, rule in true] for rule in rules] for true, said in pairs]
    return np.array(rows, dtype=float).reshape(len(answers), len(rules), 3)


def general_terms(general: dict, side: str) -> dict[str, Terms]:
    """perplexity (per byte), questions and, for the `tuned` model, KL from the `base`. Units are texts and questions."""
    texts, questions = general["per_text"], general["per_question"][side]
    each = range(len(texts["bytes"]))
    perplexity = np.array([texts[f"{side}_nats"], texts["bytes"]], dtype=float).T
    right = np.array([[float(one), 1.0] for one in questions])
    terms = {
        "perplexity": Terms(perplexity, each, lambda sums: np.exp(ratio(sums)), bounded=False),
        "questions": Terms(right, range(len(questions)), ratio),
    }
    if side == "tuned" and any(texts["compared"]):
        terms["kl"] = Terms(np.array([texts["kl"], texts["compared"]], dtype=float).T, each, ratio, bounded=False)
    return terms


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """sums `(..., 3 x rules)`: the mean F1 of the rules that occur in these reports, or are predicted for them."""
    right, said, true = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    occurs = true + said > 0
    f1 = 2 * right / np.maximum(said + true, 1e-9)
    return (f1 * occurs).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)


def _defined_ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]
