"""The comparison as one dictionary, ready for JSON: every table, figure and sentence is made from it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations

import numpy as np

from common.errors import UserError
from eval.bootstrap import Interval
from eval.comparison.arms import Arm
from eval.comparison.confusion import NONE, confusion
from eval.comparison.disagreements import worst_disagreements
from eval.comparison.measures import (
    ENGINE,
    MEASURES,
    arm_terms,
    averaged,
    general_terms,
    label_terms,
    labels,
    named_rules,
    not_finite,
    rule_terms,
    true_rules,
)
from eval.comparison.recipes import knows_seeds, over_seeds
from eval.intervals import Terms, change, clusters_of, interval, terms_of
from eval.permutation import enough_exchanges, exchange_test, holm

BASE = "base model"
Pair = tuple[str, str]  # (arm, what it is compared with)


def compare(
    arms: Sequence[Arm],
    baselines: dict[str, dict],
    examples: Sequence[dict],
    all_pairs: bool = False,
    number: int = 10,
    seed: int = 0,
) -> dict:
    """Everything that is known of the arms on the same `examples` (the asked ones). The first arm is the reference.

    baselines: name -> result (`baseline_tasks`). Families of tests, each corrected with Holm's method: `arms` (every metric
    of every pair of arms), `forgetting` (every arm against the base), `baselines` (each against the reference), `rules` (the
    F1 of every rule for every pair of arms). Raises UserError if an arm has the name of another row.
    """
    terms, per_answer = arm_terms(arms, list(baselines.values()))
    rules = true_rules([arms[0].seeds[0].task])
    names = [arm.name for arm in arms]
    for name in {BASE, *baselines} & {*names}:
        raise UserError(f"an arm cannot be called {name!r}, which is another row of the tables; write NAME=PATH")
    _check_seeds(arms)
    pairs = list(combinations(names, 2)) if all_pairs else [(names[0], name) for name in names[1:]]
    named = named_rules([*(seed.task for arm in arms for seed in arm.seeds), *baselines.values()])
    others = {name: _baseline_terms(task, named) for name, task in baselines.items()}
    general = next((s.general for arm in arms for s in arm.seeds if s.general), None)
    base = {BASE: general_terms(general, "base")} if general else {}
    pairs = [(after, before) for before, after in pairs]
    said = {arm.name: [one.task.get("answers") for one in arm.seeds] for arm in arms}
    same = {pair for pair in pairs if said[pair[0]] == said[pair[1]]}
    differences = [
        *_differences("arms", pairs, terms, same, seed),
        *_differences("forgetting", [(name, BASE) for name in names if base], terms | base, set(), seed),
        *_differences("baselines", [(name, names[0]) for name in others], terms | others, set(), seed),
    ]
    task = arms[0].seeds[0].task
    rows = [_arm_row(arm, terms[arm.name], rules, seed) for arm in arms]
    rows += [_row(name, "base", base[name], seed) for name in base]
    rows += [
        _row(name, "engine" if name == ENGINE else "baseline", others[name], seed)
        | _rules_of([baselines[name]], rules, seed)
        for name in others
    ]
    answers = task.get("answers") or ()
    return {
        "data": task["data"],
        "data_sha256": task["data_sha256"],
        "examples": len(answers),
        "examples_in_file": task.get("n_in_file"),
        "clusters": len(set(clusters_of(answers))),
        "sample": _sample(answers),
        "general": None if general is None else {key: general[key] for key in ("text", "texts", "bytes", "base")},
        "reference": names[0],
        "main": next((name for name in ("f1", "rouge_l", "loss") if name in terms[names[0]]), None),
        "loss_per": "answer" if per_answer else "token",
        "rules": rules,
        "rows": rows,
        "differences": differences,
        "rule_differences": _rule_differences(pairs, arms, rules, same, seed),
        "disagreements": worst_disagreements(arms, examples, number) if len(examples) == len(answers) else [],
    }


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


def _sample(answers: Sequence[dict]) -> str:
    """What the intervals are over, in words."""
    banks = {answer.get("cluster") for answer in answers}
    return f"{len(answers)} examples" if None in banks or not banks else f"{len(answers)} reports of {len(banks)} banks"


def _baseline_terms(task: dict, rules: Sequence[str]) -> dict[str, Terms]:
    return terms_of(task) | label_terms(task, rules)


def _row(name: str, kind: str, terms: dict[str, Terms], seed: int) -> dict:
    known = {metric: _json(interval(terms[metric], seed)) for metric in MEASURES if metric in terms}
    return {"name": name, "kind": kind, "metrics": known}


def _arm_row(arm: Arm, terms: dict[str, Terms], rules: Sequence[str], seed: int) -> dict:
    row = _row(arm.name, "arm", terms, seed)
    for metric in row["metrics"]:
        row["metrics"][metric]["seeds"] = list(terms[metric].seeds)
    return row | {
        "not_finite": sorted({name for one in arm.seeds for name in not_finite(one, rules)}),
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
        **_rules_of([one.task for one in arm.seeds], rules, seed),
    }


def _rules_of(tasks: Sequence[dict], rules: Sequence[str], seed: int) -> dict:
    """`per_rule` and `confusion` of the answers of all seeds; nothing for another task."""
    if not rules:
        return {}
    pairs = [labels(answer) for task in tasks for answer in task["answers"]]
    said = [name for _, names in pairs for name in names]
    invented = sorted(set(said) - set(rules))
    per_rule = {}
    for rule in [*rules, *invented]:
        of_seeds = [rule_terms(task, rule) for task in tasks]
        measured = {name: interval(averaged([one[name] for one in of_seeds]), seed) for name in of_seeds[0]}
        counts = {"n_true": sum(rule in true for true, _ in pairs), "n_predicted": said.count(rule)}
        per_rule[rule] = {name: _json(one) for name, one in measured.items()} | {
            name: count / len(tasks) for name, count in counts.items()
        }
    names = [*rules, *invented]
    matrix = np.mean([confusion(task["answers"], names) for task in tasks], axis=0)
    return {"per_rule": per_rule, "confusion": {"names": [*names, NONE], "counts": matrix.tolist()}}


def _differences(
    family: str, pairs: Iterable[Pair], terms: dict[str, dict[str, Terms]], same: set[Pair], seed: int
) -> list[dict]:
    """Each metric's change from the second to the first of each pair, with its p-value where it is tested."""
    compared = [
        (
            {"family": family, "of": after, "against": before, "metric": metric},
            terms[before][metric],
            terms[after][metric],
        )
        for after, before in pairs
        for metric in MEASURES
        if metric in terms[after] and metric in terms[before]
    ]
    return _tested(compared, same, seed)


def _rule_differences(
    pairs: Iterable[Pair], arms: Sequence[Arm], rules: Sequence[str], same: set[Pair], seed: int
) -> list[dict]:
    terms = {
        (arm.name, rule): averaged([rule_terms(one.task, rule)["f1"] for one in arm.seeds])
        for arm in arms
        for rule in rules
    }
    compared = [
        (
            {"family": "rules", "of": after, "against": before, "metric": "f1", "rule": rule},
            terms[before, rule],
            terms[after, rule],
        )
        for after, before in pairs
        for rule in rules
    ]
    return _tested(compared, same, seed)


def _tested(compared: Sequence[tuple[dict, Terms, Terms]], same: set[Pair], seed: int) -> list[dict]:
    """Each entry with the change from its first to its second terms, and the p-values of one family.

    same: the pairs with the very same answers, which differ by exactly 0. Other models with the same scores may differ on
    other reports. With several seeds on both sides, interval and p-value are those of the recipes (`over_seeds`).
    """
    exchanges = enough_exchanges(sum(MEASURES[entry["metric"]].tested for entry, _, _ in compared))
    found, p_values = [], {}
    for i, (entry, before, after) in enumerate(compared):
        is_same, tested = (entry["of"], entry["against"]) in same, MEASURES[entry["metric"]].tested
        moved = change(before, after, seed, is_same)
        p = exchange_test(before, after, seed, exchanges) if tested else 1.0
        known = not is_same and knows_seeds(before, after) and np.isfinite([moved.low, moved.high]).all()
        these = _json(moved) | ({"p": p} if tested else {})
        if known:
            moved, p = over_seeds(moved, p, before, after)
            entry |= {"these_models": {key: these[key] for key in these if key != "value"}}
        found.append(entry | _json(moved))
        if tested:
            p_values[i] = p
    corrected = holm(p_values)
    for i, p in p_values.items():
        found[i] |= {"p": p, "p_holm": corrected[i], "tests": len(p_values)}
    return found


def _json(found: Interval) -> dict:
    """An interval with None where there is no number, since JSON has none."""
    return {key: value if np.isfinite(value) else None for key, value in asdict(found).items()}
