"""The comparison as one dictionary, ready for JSON: every table, figure and sentence is made from it."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from itertools import combinations, permutations

import numpy as np

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Arm
from eval.comparison.contrasts import Contrast, holm, knows_seeds, over_seeds
from eval.comparison.disagreements import worst_disagreements
from eval.comparison.measures import (
    BASE,
    ENGINE,
    OF_MODELS,
    OWN,
    arm_terms,
    averaged,
    general_terms,
    label_terms,
    labels,
    named_rules,
    ordered,
    rule_terms,
    true_rules,
)
from eval.comparison.words import limits, verdict, warnings
from eval.intervals import Terms, change, clusters_of, interval, terms_of

Pair = tuple[str, str]  # (arm, what it is compared with)


def compare(
    arms: Sequence[Arm],
    baselines: dict[str, dict],
    examples: Sequence[dict],
    primary: Sequence[Contrast] = (),
    all_pairs: bool = False,
    number: int = 10,
) -> dict:
    """Everything that is known of the arms on the same `examples` (the asked ones), and the sentences that say it.

    The first arm is the reference.

    baselines: name -> result (`baseline_tasks`). primary: the contrasts that are tested, with Holm's correction among them.
    All other differences are described, each with its interval: of every pair of `arms`, `forgetting` (every arm less the
    base) and `baselines` (each less the reference). Raises UserError if an arm has the name of another
    row, or if a primary contrast cannot be tested.
    """
    named = named_rules([*(seed.task for arm in arms for seed in arm.seeds), *baselines.values()])
    known, per_answer = arm_terms(arms, named)
    # What is NaN or infinite is that of a model whose weights are damaged.
    terms = {
        arm: {name: one for name, one in of_arm.items() if np.isfinite(one.value)} for arm, of_arm in known.items()
    }
    rules = true_rules([arms[0].seeds[0].task])
    names = [arm.name for arm in arms]
    for name in {BASE, *baselines} & {*names}:
        raise UserError(f"an arm cannot be called {name!r}, which is another row of the tables; write NAME=PATH")
    _check_seeds(arms)
    pairs = list(combinations(names, 2)) if all_pairs else [(names[0], name) for name in names[1:]]
    others = {name: terms_of(task) | label_terms(task, named) for name, task in baselines.items()}
    general = next((s.general for arm in arms for s in arm.seeds if s.general), None)
    base = {BASE: general_terms(general, "base")} if general else {}
    pairs = [(after, before) for before, after in pairs]
    said = {arm.name: [one.task.get("answers") for one in arm.seeds] for arm in arms}
    same = {pair for pair in permutations(names, 2) if said[pair[0]] == said[pair[1]]}
    every = terms | base | others
    differences = [
        *_differences("arms", pairs, every, same),
        *_differences("forgetting", [(name, BASE) for name in names if base], every, set()),
        *_differences("baselines", [(name, names[0]) for name in others], every, set()),
    ]
    task = arms[0].seeds[0].task
    rows = [
        _arm_row(arm, terms[arm.name], rules) | {"not_finite": sorted(known[arm.name].keys() - terms[arm.name].keys())}
        for arm in arms
    ]
    rows += [_row(name, "base", base[name]) for name in base]
    rows += [
        _row(name, "engine" if name == ENGINE else "baseline", others[name]) | _rules_of([baselines[name]], rules)
        for name in others
    ]
    answers, unit = task.get("answers") or (), "reports" if rules else "examples"
    main = [name for name in ordered(terms[names[0]]) if name.startswith(OWN) or name in ("f1", "rouge_l", "loss")]
    result = {
        "data": task["data"],
        "data_sha256": task["data_sha256"],
        "examples": len(answers),
        "examples_in_file": task.get("n_in_file"),
        "clusters": len(set(clusters_of(answers))),
        "unit": unit,
        "sample": _sample(answers, unit) if answers else f"{task['n_examples']} {unit}",
        "general": None if general is None else {key: general[key] for key in ("text", "texts", "bytes", "base")},
        "reference": names[0],
        "main": next(iter(main), None),
        "loss_per": "answer" if per_answer else "token",
        "without_interval": _without_interval(arms),
        "rules": rules,
        "rows": rows,
        "primary": _tested(primary, every, same),
        "differences": differences,
        "disagreements": worst_disagreements(arms, examples, number) if len(examples) == len(answers) > 0 else [],
    }
    return result | {"verdict": verdict(result), "warnings": warnings(result), "limits": limits(result)}


def _without_interval(arms: Sequence[Arm]) -> dict[str, dict[str, list[float]]]:
    """The user's scores that are no means over single examples: name -> arm -> the value of each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for arm in arms:
        for own in (seed.task.get("metric") or {"scores": {}} for seed in arm.seeds):
            for name in own["scores"].keys() - own.get("each", {}).keys():
                found.setdefault(name, {}).setdefault(arm.name, []).append(own["scores"][name])
    return dict(sorted(found.items()))


def _check_seeds(arms: Sequence[Arm]) -> None:
    """Raise UserError if an arm has one training run twice: its seeds would seem to agree."""
    for arm in arms:
        seen: dict[str, object] = {}
        for path, task in ((one.source.path, one.task) for one in arm.seeds):
            weights = task.get("weights") or str(path.resolve())
            if weights in seen:
                raise UserError(
                    f"{arm.name}: {seen[weights]} and {path} are the same weights; name each training run once"
                )
            seen[weights] = path


def _sample(answers: Sequence[dict], unit: str) -> str:
    """What the intervals are over, in words."""
    banks = {answer.get("cluster") for answer in answers}
    return f"{len(answers)} {unit}" + (f" of {len(banks)} banks" if banks and None not in banks else "")


def _row(name: str, kind: str, terms: dict[str, Terms]) -> dict:
    known = {metric: _json(interval(terms[metric])) for metric in ordered(terms)}
    return {"name": name, "kind": kind, "metrics": known}


def _arm_row(arm: Arm, terms: dict[str, Terms], rules: Sequence[str]) -> dict:
    row = _row(arm.name, "arm", terms)
    for metric in row["metrics"]:
        row["metrics"][metric]["seeds"] = list(terms[metric].seeds)
    return row | {
        "seeds": [
            {
                "path": str(one.source.path),
                "model": one.task["model"],
                "weights": one.task.get("weights"),
                "tokens": one.tokens,
                **{key: one.task.get(key) for key in ("shots", "constrained", "max_new_tokens", "cut_short", "dtype")},
            }
            for one in arm.seeds
        ],
        **_rules_of([one.task for one in arm.seeds], rules),
    }


def _rules_of(tasks: Sequence[dict], rules: Sequence[str]) -> dict:
    """`per_rule` of the answers of all seeds; nothing for another task."""
    if not rules:
        return {}
    pairs = [labels(answer) for task in tasks for answer in task["answers"]]
    said = [name for _, names in pairs for name in names]
    invented = sorted(set(said) - set(rules))
    per_rule = {}
    for rule in [*rules, *invented]:
        of_seeds = [rule_terms(task, rule) for task in tasks]
        measured = {name: interval(averaged([one[name] for one in of_seeds])) for name in of_seeds[0]}
        counts = {"n_true": sum(rule in true for true, _ in pairs), "n_predicted": said.count(rule)}
        per_rule[rule] = {name: _json(one) for name, one in measured.items()} | {
            name: count / len(tasks) for name, count in counts.items()
        }
    return {"per_rule": per_rule}


def _differences(
    family: str, pairs: Iterable[Pair], terms: dict[str, dict[str, Terms]], same: Collection[Pair]
) -> list[dict]:
    """Each metric of the first of each pair less that of the second, with its interval."""
    return [
        {"family": family, "of": of, "against": against, "metric": metric}
        | _described(terms[against][metric], terms[of][metric], (of, against) in same and metric not in OF_MODELS)
        for of, against in pairs
        for metric in _shared(terms[of], terms[against])
    ]


def _shared(one: dict[str, Terms], other: dict[str, Terms]) -> list[str]:
    return ordered(metric for metric in one if metric in other)


def _described(before: Terms, after: Terms, is_same: bool) -> dict:
    """value, low and high of a change, and `over_seeds`: whether the interval is that of the recipes or of these runs alone.

    is_same: the answers are the very same, which differ by exactly 0. Other models with the same scores may differ on other
    examples.
    """
    moved = change(before, after, is_same)
    over = not is_same and knows_seeds(before, after) and bool(np.isfinite([moved.low, moved.high]).all())
    return _json(over_seeds(moved, before, after).interval() if over else moved) | {"over_seeds": over}


def _tested(primary: Sequence[Contrast], terms: dict[str, dict[str, Terms]], same: Collection[Pair]) -> list[dict]:
    """The primary contrasts: intervals of 95% and 90%, p-values of no difference and of one as large as the margin, corrected."""
    found, p_values, p_margins = [], {}, {}
    for i, one in enumerate(primary):
        of, against = (_known(one, name, terms) for name in (one.of, one.against))
        metric = _known(one, one.metric, _shared(terms[of], terms[against]))
        before, after = terms[against][metric], terms[of][metric]
        moved = change(before, after, (of, against) in same and metric not in OF_MODELS)
        if before.n < 2 or not np.isfinite([moved.value, moved.low, moved.high]).all():
            raise UserError(
                f"--primary {of} {against} {one.metric}: one bank, or no finite number, shows nothing of others"
            )
        estimate = over_seeds(moved, before, after, one.paired)
        narrow = estimate.interval(0.90)
        p_values[i] = estimate.p
        entry = asdict(one) | {"metric": metric} | asdict(estimate.interval()) | {"p": estimate.p}
        entry |= {"low_90": narrow.low, "high_90": narrow.high, "seeds": [len(after.seeds), len(before.seeds)]}
        if one.margin is not None:
            p_margins[i] = entry["p_margin"] = estimate.p_equivalence(one.margin)
        found.append(entry)
    for key, corrected in (("p_holm", holm(p_values)), ("p_margin_holm", holm(p_margins))):
        for i, p in corrected.items():
            found[i][key] = p
    return found


def _known(one: Contrast, name: str, known: Collection[str]) -> str:
    """The key of a row or a metric that a primary contrast names. Raises UserError if there is none."""
    found = next((key for key in (OWN + name, name) if key in known), None)
    if found is None:
        shown = ", ".join(key.removeprefix(OWN) for key in known)
        raise UserError(f"--primary {one.of} {one.against} {one.metric}: there is no {name}; there are {shown}")
    return found


def _json(found: Interval) -> dict:
    """An interval with None where there is no number, since JSON has none."""
    return {key: value if np.isfinite(value) else None for key, value in asdict(found).items()}
