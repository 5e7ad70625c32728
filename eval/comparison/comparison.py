"""The comparison as one dictionary, ready for JSON: every table, figure and sentence is made from it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Arm
from eval.comparison.contrasts import Contrast, holm, knows_seeds, over_seeds
from eval.comparison.disagreements import worst_disagreements
from eval.comparison.measures import (
    BASE,
    OF_MODELS,
    OWN,
    arm_terms,
    averaged,
    general_terms,
    label_f1,
    label_terms,
    named_labels,
    ordered,
)
from eval.comparison.words import final_curves, limits, verdict, warnings
from eval.intervals import Terms, change, clusters_of, interval, labels, terms_of
from eval.task import ANY_CHAT, Task

Rows = dict[str, dict[str, Terms]]  # row of the tables -> metric -> its terms
# (a row, the row that it is compared with, a metric) -> whether the two cannot differ, because their answers are equal
Same = Callable[[str, str, str], bool]


def compare(
    arms: Sequence[Arm],
    baselines: dict[str, dict],
    examples: Sequence[dict],
    primary: Sequence[Contrast] = (),
    all_pairs: bool = False,
    number: int = 10,
    task: Task = ANY_CHAT,
    curves: dict[str, dict[str, list[float]]] | None = None,
) -> dict:
    """Return all figures of the arms on the same `examples` (the asked ones), and the sentences about them.

    The first arm is the reference. baselines: name -> result, from the `task`. primary: the contrasts to test, with Holm's
    correction among them. All other differences are described, each with its interval: between pairs of `arms`, `forgetting`
    (every arm less the base) and `baselines` (each less the reference). number: of disagreements. curves: from
    `eval.comparison.arms.final_validation`.

    Raise UserError if an arm has the name of another row, or if a primary contrast cannot be tested.
    """
    names, first = [arm.name for arm in arms], arms[0].seeds[0].task
    check_names(names, baselines)
    _check_seeds(arms, examples)
    named = named_labels([*(seed.task for arm in arms for seed in arm.seeds), *baselines.values()])
    all_terms, per_answer = arm_terms(arms, named)
    # A metric that is NaN or infinite belongs to a model whose weights are damaged.
    finite = {
        arm: {metric: value for metric, value in terms.items() if np.isfinite(value.value)}
        for arm, terms in all_terms.items()
    }
    general = next((seed.general for arm in arms for seed in arm.seeds if seed.general), None)
    base = {BASE: general_terms(general, "base")} if general else {}
    of_baselines = {name: terms_of(result) | label_terms(result, named) for name, result in baselines.items()}
    terms = finite | base | of_baselines
    answers_by_arm = {arm.name: [seed.task.get("answers") for seed in arm.seeds] for arm in arms}

    def same(of: str, against: str, metric: str) -> bool:
        # Equal answers differ by exactly 0. Equal scores of different models may come from different examples.
        if metric in OF_MODELS or of not in answers_by_arm:
            return False
        return answers_by_arm[of] == answers_by_arm.get(against)

    pairs = list(combinations(names, 2)) if all_pairs else [(names[0], name) for name in names[1:]]
    families = {
        "arms": [(after, before) for before, after in pairs],
        "forgetting": [(name, BASE) for name in names if base],
        "baselines": [(name, names[0]) for name in baselines],
    }
    answers = first.get("answers") or ()
    true_labels = sorted({label for answer in answers for label in answer.get("true", ())})
    rows = [_arm_row(arm, finite[arm.name], all_terms[arm.name], true_labels) for arm in arms]
    rows += [_row(name, "base", base[name]) for name in base]
    for name, result in baselines.items():
        shown_labels = true_labels if name == task.main_baseline else ()
        rows.append(_row(name, "baseline", of_baselines[name]) | _f1_by_label([result], shown_labels))
    clusters = {answer.get("cluster") for answer in answers}
    in_clusters = f" of {len(clusters)} {task.cluster}s" if clusters and None not in clusters else ""
    main = (key for key in ordered(finite[names[0]]) if key.startswith(OWN) or key in ("f1", "rouge_l", "loss"))
    comparison = {
        "data": first["data"],
        "data_sha256": first["data_sha256"],
        "examples": len(answers),
        "examples_in_file": first["n_in_file"],
        "clusters": len(set(clusters_of(answers))),
        "unit": f"{task.example}s",
        "cluster": task.cluster,
        "label": task.label,
        "main_baseline": task.main_baseline,
        "sample": f"{len(answers) or first['n_examples']} {task.example}s{in_clusters}",
        "general": None if general is None else {key: general[key] for key in ("text", "texts", "bytes", "base")},
        "reference": names[0],
        "main": next(main, None),
        "loss_per": "answer" if per_answer else "token",
        "without_interval": _without_interval(arms),
        "labels": true_labels,
        "rows": rows,
        "primary": _tested(primary, terms, same, task.cluster),
        "differences": [
            {"family": family, "of": of, "against": against, "metric": metric}
            | _described(terms[against][metric], terms[of][metric], same(of, against, metric))
            for family, compared in families.items()
            for of, against in compared
            for metric in _shared(terms, of, against)
        ],
        "disagreements": worst_disagreements(arms, examples, number) if len(examples) == len(answers) > 0 else [],
    }
    own = {"In the runs' own last validation": final_curves(curves)} if curves else {}
    return comparison | {
        "verdict": verdict(comparison) | own,
        "warnings": warnings(comparison),
        "limits": limits(comparison),
    }


def check_names(names: Sequence[str], baselines: Collection[str], primary: Sequence[Contrast] = ()) -> None:
    """Raise UserError for an arm with the name of another row, and for a declared contrast of a row that does not exist."""
    for name in {BASE, *baselines} & {*names}:
        raise UserError(f"an arm cannot be called {name!r}, which is another row of the tables; write NAME=PATH")
    for contrast in primary:
        for name in (contrast.of, contrast.against):
            _find(contrast, name, [*names, BASE, *baselines])


def check_metrics(metrics: Collection[str], primary: Sequence[Contrast]) -> None:
    """Raise UserError for a declared contrast in a metric that no answer of this task can have."""
    for contrast in primary:
        _find(contrast, contrast.metric, [*metrics, *OF_MODELS])


def _without_interval(arms: Sequence[Arm]) -> dict[str, dict[str, list[float]]]:
    """Return the user's scores that are no means over single examples: name -> arm -> the value of each seed."""
    values: dict[str, dict[str, list[float]]] = {}
    for arm in arms:
        for own in (seed.task.get("metric") or {"scores": {}} for seed in arm.seeds):
            for name in own["scores"].keys() - own.get("each", {}).keys():
                values.setdefault(name, {}).setdefault(arm.name, []).append(own["scores"][name])
    return dict(sorted(values.items()))


def _check_seeds(arms: Sequence[Arm], examples: Sequence[dict]) -> None:
    """Raise UserError if a result has other references, or if an arm names one training run twice: its seeds would seem to agree."""
    references = [example["messages"][-1]["content"] for example in examples]
    for arm in arms:
        seen: dict[str, object] = {}
        for path, task in ((seed.source.path, seed.task) for seed in arm.seeds):
            answers = zip(task.get("answers", ()), references, strict=False)
            if any(answer.get("reference", reference) != reference for answer, reference in answers):
                raise UserError(
                    f"the result of {path} was measured with another --format or --fields: name that, or remove the result"
                )
            weights = task.get("weights") or str(path.resolve())
            if weights in seen:
                raise UserError(
                    f"{arm.name}: {seen[weights]} and {path} are the same weights; name each training run once"
                )
            seen[weights] = path


def _row(name: str, kind: str, terms: dict[str, Terms]) -> dict:
    return {
        "name": name,
        "kind": kind,
        "metrics": {metric: _json(interval(terms[metric])) for metric in ordered(terms)},
    }


def _arm_row(arm: Arm, terms: dict[str, Terms], metrics: Collection[str], true_labels: Sequence[str]) -> dict:
    """Return the row of an arm. terms: its finite metrics; metrics: the names of all its metrics."""
    row = _row(arm.name, "arm", terms)
    for metric, value in row["metrics"].items():
        value["seeds"] = list(terms[metric].seeds)
    return row | {
        "seeds": [
            {
                "path": str(seed.source.path),
                "model": seed.task["model"],
                "weights": seed.task.get("weights"),
                "tokens": seed.tokens,
                **{key: seed.task.get(key) for key in ("shots", "max_new_tokens", "cut_short", "dtype")},
            }
            for seed in arm.seeds
        ],
        **_f1_by_label([seed.task for seed in arm.seeds], true_labels),
        "not_finite": sorted({*metrics} - {*terms}),
    }


def _f1_by_label(tasks: Sequence[dict], true_labels: Sequence[str]) -> dict:
    """Return `per_label` of the answers of all seeds: F1, and the number of examples with the label. {} without labels."""
    if not true_labels:
        return {}
    pairs = [labels(answer) for task in tasks for answer in task["answers"]]
    invented = {label for _, predicted in pairs for label in predicted} - {*true_labels}
    per_label = {}
    for label in [*true_labels, *sorted(invented)]:
        count = sum(label in true for true, _ in pairs) / len(tasks)
        f1 = interval(averaged([label_f1(task, label) for task in tasks]))
        per_label[label] = {"f1": _json(f1), "n_true": count}
    return {"per_label": per_label}


def _shared(terms: Rows, of: str, against: str) -> list[str]:
    return ordered(metric for metric in terms[of] if metric in terms[against])


def _described(before: Terms, after: Terms, same: bool) -> dict:
    """Return value, low and high of a change, and `over_seeds`: whether the interval also covers the spread over seeds."""
    moved = change(before, after, same)
    over = not same and knows_seeds(before, after) and bool(np.isfinite([moved.low, moved.high]).all())
    return _json(over_seeds(moved, before, after).interval() if over else moved) | {"over_seeds": over}


def _tested(primary: Sequence[Contrast], terms: Rows, same: Same, cluster: str) -> list[dict]:
    """Test the primary contrasts. Return for each its intervals of 95% and 90%, and its p-values after Holm's correction.

    `p` is of no difference, `p_margin` of a difference as large as the margin.
    """
    tested = []
    for contrast in primary:
        of, against = (_find(contrast, name, terms) for name in (contrast.of, contrast.against))
        metric = _find(contrast, contrast.metric, _shared(terms, of, against))
        before, after = terms[against][metric], terms[of][metric]
        runs = change(before, after, same(of, against, metric))
        if before.n < 2 or not np.isfinite([runs.value, runs.low, runs.high]).all():
            raise UserError(
                f"--primary {of} {against} {contrast.metric}: one {cluster}, or no finite number, shows nothing of others"
            )
        estimate = over_seeds(runs, before, after, contrast.paired)
        narrow = estimate.interval(0.90)
        entry = asdict(contrast) | {"metric": metric} | asdict(estimate.interval()) | {"p": estimate.p}
        entry |= {"low_90": narrow.low, "high_90": narrow.high, "seeds": [len(after.seeds), len(before.seeds)]}
        margin = contrast.margin
        tested.append(entry | ({} if margin is None else {"p_margin": estimate.p_equivalence(margin)}))
    for key in ("p", "p_margin"):
        for i, p in holm({i: entry[key] for i, entry in enumerate(tested) if key in entry}).items():
            tested[i][f"{key}_holm"] = p
    return tested


def _find(contrast: Contrast, name: str, keys: Collection[str]) -> str:
    """Return the key of the row or metric that a contrast names. Raise UserError if there is none."""
    for key in (OWN + name, name):
        if key in keys:
            return key
    shown = ", ".join(key.removeprefix(OWN) for key in keys)
    names = f"{contrast.of} {contrast.against} {contrast.metric}"
    raise UserError(f"--primary {names}: there is no {name}; there are {shown}")


def _json(bounds: Interval) -> dict:
    """Return an interval with None in place of NaN and infinity, which JSON does not have."""
    return {key: value if np.isfinite(value) else None for key, value in asdict(bounds).items()}
