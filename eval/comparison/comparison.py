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
    ENGINE,
    OF_MODELS,
    OWN,
    arm_terms,
    averaged,
    general_terms,
    label_terms,
    named_rules,
    ordered,
    rule_f1,
)
from eval.comparison.words import limits, verdict, warnings
from eval.intervals import Terms, change, clusters_of, interval, labels, terms_of

Rows = dict[str, dict[str, Terms]]  # row of the tables -> metric
# (a row, the row that it is compared with, a metric) -> whether both have the very same answers
Same = Callable[[str, str, str], bool]


def compare(
    arms: Sequence[Arm],
    baselines: dict[str, dict],
    examples: Sequence[dict],
    primary: Sequence[Contrast] = (),
    all_pairs: bool = False,
    number: int = 10,
) -> dict:
    """Everything that is known of the arms on the same `examples` (the asked ones), and the sentences that say it.

    The first arm is the reference. baselines: name -> result (`baseline_tasks`). primary: the contrasts that are tested, with
    Holm's correction among them. All other differences are described, each with its interval: of every pair of `arms`,
    `forgetting` (every arm less the base) and `baselines` (each less the reference). Raises UserError if an arm has the name of
    another row, or if a primary contrast cannot be tested.
    """
    names, task = [arm.name for arm in arms], arms[0].seeds[0].task
    for name in {BASE, *baselines} & {*names}:
        raise UserError(f"an arm cannot be called {name!r}, which is another row of the tables; write NAME=PATH")
    _check_seeds(arms, examples)
    named = named_rules([*(seed.task for arm in arms for seed in arm.seeds), *baselines.values()])
    known, per_answer = arm_terms(arms, named)
    # What is NaN or infinite is that of a model whose weights are damaged.
    of_arms = {arm: {key: one for key, one in terms.items() if np.isfinite(one.value)} for arm, terms in known.items()}
    general = next((s.general for arm in arms for s in arm.seeds if s.general), None)
    base = {BASE: general_terms(general, "base")} if general else {}
    of_baselines = {name: terms_of(one) | label_terms(one, named) for name, one in baselines.items()}
    terms = of_arms | base | of_baselines
    said = {arm.name: [one.task.get("answers") for one in arm.seeds] for arm in arms}

    def same(of: str, against: str, metric: str) -> bool:
        # The very same answers differ by exactly 0. Other models with the same scores may differ on other examples.
        return metric not in OF_MODELS and of in said and said[of] == said.get(against)

    pairs = list(combinations(names, 2)) if all_pairs else [(names[0], name) for name in names[1:]]
    families = {
        "arms": [(after, before) for before, after in pairs],
        "forgetting": [(name, BASE) for name in names if base],
        "baselines": [(name, names[0]) for name in baselines],
    }
    rules = sorted({rule for answer in task.get("answers", ()) for rule in answer.get("true", ())})
    rows = [_arm_row(arm, of_arms[arm.name], known[arm.name], rules) for arm in arms]
    rows += [_row(name, "base", base[name]) for name in base]
    for name, one in baselines.items():
        kind = "engine" if name == ENGINE else "baseline"
        rows.append(_row(name, kind, of_baselines[name]) | _rules_of([one], rules))
    answers, unit = task.get("answers") or (), "reports" if rules else "examples"
    banks = {answer.get("cluster") for answer in answers}
    of_banks = f" of {len(banks)} banks" if banks and None not in banks else ""
    main = (key for key in ordered(of_arms[names[0]]) if key.startswith(OWN) or key in ("f1", "rouge_l", "loss"))
    result = {
        "data": task["data"],
        "data_sha256": task["data_sha256"],
        "examples": len(answers),
        "examples_in_file": task.get("n_in_file"),
        "clusters": len(set(clusters_of(answers))),
        "unit": unit,
        "sample": f"{len(answers) or task['n_examples']} {unit}{of_banks}",
        "general": None if general is None else {key: general[key] for key in ("text", "texts", "bytes", "base")},
        "reference": names[0],
        "main": next(main, None),
        "loss_per": "answer" if per_answer else "token",
        "without_interval": _without_interval(arms),
        "rules": rules,
        "rows": rows,
        "primary": _tested(primary, terms, same),
        "differences": [
            {"family": family, "of": of, "against": against, "metric": metric}
            | _described(terms[against][metric], terms[of][metric], same(of, against, metric))
            for family, compared in families.items()
            for of, against in compared
            for metric in _shared(terms, of, against)
        ],
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


def _check_seeds(arms: Sequence[Arm], examples: Sequence[dict]) -> None:
    """Raise UserError for results of other references, and if an arm has one training run twice: its seeds would seem to agree."""
    references = [example["messages"][-1]["content"] for example in examples]
    for arm in arms:
        seen: dict[str, object] = {}
        for path, task in ((one.source.path, one.task) for one in arm.seeds):
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
    known = {metric: _json(interval(terms[metric])) for metric in ordered(terms)}
    return {"name": name, "kind": kind, "metrics": known}


def _arm_row(arm: Arm, terms: dict[str, Terms], known: Collection[str], rules: Sequence[str]) -> dict:
    row = _row(arm.name, "arm", terms)
    for metric, found in row["metrics"].items():
        found["seeds"] = list(terms[metric].seeds)
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
        "not_finite": sorted({*known} - {*terms}),
    }


def _rules_of(tasks: Sequence[dict], rules: Sequence[str]) -> dict:
    """`per_rule` of the answers of all seeds: F1, and how many reports have the rule; nothing for another task."""
    if not rules:
        return {}
    pairs = [labels(answer) for task in tasks for answer in task["answers"]]
    invented = {name for _, said in pairs for name in said} - {*rules}
    per_rule = {}
    for rule in [*rules, *sorted(invented)]:
        count = sum(rule in true for true, _ in pairs) / len(tasks)
        f1 = interval(averaged([rule_f1(task, rule) for task in tasks]))
        per_rule[rule] = {"f1": _json(f1), "n_true": count}
    return {"per_rule": per_rule}


def _shared(terms: Rows, of: str, against: str) -> list[str]:
    return ordered(metric for metric in terms[of] if metric in terms[against])


def _described(before: Terms, after: Terms, same: bool) -> dict:
    """value, low and high of a change, and `over_seeds`: whether the interval is that of the recipes or of these runs alone."""
    moved = change(before, after, same)
    over = not same and knows_seeds(before, after) and bool(np.isfinite([moved.low, moved.high]).all())
    return _json(over_seeds(moved, before, after).interval() if over else moved) | {"over_seeds": over}


def _tested(primary: Sequence[Contrast], terms: Rows, same: Same) -> list[dict]:
    """The primary contrasts: intervals of 95% and 90%, p-values of no difference and of one as large as the margin, corrected."""
    found = []
    for one in primary:
        of, against = (_known(one, name, terms) for name in (one.of, one.against))
        metric = _known(one, one.metric, _shared(terms, of, against))
        before, after = terms[against][metric], terms[of][metric]
        runs = change(before, after, same(of, against, metric))
        if before.n < 2 or not np.isfinite([runs.value, runs.low, runs.high]).all():
            raise UserError(
                f"--primary {of} {against} {one.metric}: one bank, or no finite number, shows nothing of others"
            )
        estimate = over_seeds(runs, before, after, one.paired)
        narrow = estimate.interval(0.90)
        entry = asdict(one) | {"metric": metric} | asdict(estimate.interval()) | {"p": estimate.p}
        entry |= {"low_90": narrow.low, "high_90": narrow.high, "seeds": [len(after.seeds), len(before.seeds)]}
        found.append(entry | ({} if one.margin is None else {"p_margin": estimate.p_equivalence(one.margin)}))
    for key in ("p", "p_margin"):
        for i, p in holm({i: entry[key] for i, entry in enumerate(found) if key in entry}).items():
            found[i][f"{key}_holm"] = p
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
