"""The comparison in sentences: the verdict, the warnings, and the limits of the figures."""

import math
from collections.abc import Sequence
from statistics import fmean

from eval.comparison.measures import BASE, measure_of

ALPHA = 0.05
FEW_CLUSTERS = 20  # with fewer, bootstrap intervals are too narrow: those of 8 clusters cover 89% instead of 95%
MANY_TOKENS = 1.01  # arms whose tokens differ by more than 1% did not have equal training


def verdict(result: dict) -> dict[str, list[str]]:
    """Return sentences on the primary contrasts, the clearest difference, learning, forgetting and the baselines, by heading.

    Differences between two arms of which neither is the reference are in the tables alone.
    """
    differences: dict[tuple[str, str], list[dict]] = {}
    for entry in result["differences"]:
        if result["reference"] in (entry["of"], entry["against"]) or entry["family"] == "forgetting":
            differences.setdefault((entry["family"], entry["metric"]), []).append(entry)
    learned, forgotten = (
        [description(result, entry) for entry in differences.get(("arms", metric), ())]
        for metric in (result["main"], "perplexity")
    )
    if less_base := differences.get(("forgetting", "perplexity")):
        base = value_of(result, BASE, "perplexity")
        arms = "; ".join(
            f"{entry['of']} {value_of(result, entry['of'], 'perplexity'):.3f} ({entry['value'] / base:+.1%}, 95% interval "
            f"{entry['low'] / base:+.1%} to {entry['high'] / base:+.1%})"
            for entry in less_base
        )
        forgotten.append(f"The base model predicts general text with a perplexity of {base:.3f} per byte; {arms}.")
    baselines = differences.get(("baselines", result["main"])) or differences.get(("baselines", "f1"), [])
    best = max(baselines, key=lambda entry: value_of(result, entry["of"], entry["metric"]), default=None)
    groups = {
        "Declared before": [primary_sentence(result, contrast) for contrast in result["primary"]],
        "Clearest difference": _clearest(result),
        "Learning": learned,
        "Forgetting": forgotten,
        "Without a language model": [
            f"{'Best baseline' if entry is best else 'Baseline'}: {description(result, entry)}"
            for entry in baselines
            if entry is best or entry["of"] == result["main_baseline"]
        ],
    }
    return {name: sentences for name, sentences in groups.items() if sentences}


def _clearest(result: dict) -> list[str]:
    """Return a sentence on the difference between two arms that is the largest beside half its interval, or that none is clear."""
    entries = [entry for entry in result["differences"] if entry["family"] == "arms" and entry["low"] is not None]
    if not entries:
        return []
    clear = [entry for entry in entries if not entry["low"] <= 0 <= entry["high"]]
    best = max(clear or entries, key=_clearness)
    if clear:
        return [f"Of {len(entries)} differences, the largest beside its interval: {description(result, best)}"]
    return [
        f"None is clear: every interval of the {len(entries)} differences contains 0. The largest beside its interval: "
        f"{description(result, best)}"
    ]


def _clearness(entry: dict) -> float:
    half_width = (entry["high"] - entry["low"]) / 2
    if half_width == 0:  # equal answers, or a difference that is the same in every example
        return math.inf if entry["value"] else 0.0
    return abs(entry["value"]) / half_width


def final_curves(curves: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return a sentence for each curve of `eval.comparison.arms.final_validation`, with the mean over the seeds of each arm."""
    return [
        f"{name}: {', '.join(f'{arm} {fmean(values):.4g}' for arm, values in by_arm.items())} (no interval)."
        for name, by_arm in curves.items()
    ]


def description(result: dict, entry: dict) -> str:
    """Describe a difference that was not declared: values and interval, and no claim."""
    metric, of, against = entry["metric"], entry["of"], entry["against"]
    values = ", ".join(f"{name} {number(metric, value_of(result, name, metric))}" for name in (of, against))
    interval = "no interval"
    if entry["low"] is not None:
        interval = f"95% interval over {interval_over(result, entry)} {bounds(entry)}"
    rows = [row for row in result["rows"] if row["name"] in (of, against) and row["kind"] == "arm"]
    single = [row["name"] for row in rows if len(row["seeds"]) == 1]
    if single and not entry["over_seeds"]:
        have = "has one seed" if len(single) == 1 else "have one seed each"
        interval += f"; {listed(single)} {have}, and another may differ by more"
    return f"{heading(result, metric)}: {values}; {of} less {against} {signed(metric, entry['value'])} ({interval})."


def number(metric: str, value: float) -> str:
    """Format a value of a metric."""
    return f"{value:.{measure_of(metric).digits}f}"


def signed(metric: str, value: float) -> str:
    """Format a difference in a metric, with its sign."""
    return f"{value:+z.{measure_of(metric).digits}f}"


def bounds(entry: dict, level: str = "") -> str:
    """Format the 95% interval of a difference, `-0.010 to +0.020`; with the level `_90` its 90% interval."""
    return " to ".join(signed(entry["metric"], entry[f"{bound}{level}"]) for bound in ("low", "high"))


def interval_over(result: dict, entry: dict) -> str:
    """Return the units over which an interval is computed, in words: `seeds and examples`."""
    return ("seeds and " if entry["over_seeds"] else "") + (measure_of(entry["metric"]).units or result["unit"])


def primary_sentence(result: dict, contrast: dict) -> str:
    """Return the conclusion from a primary contrast, with values, intervals and p-values.

    "No difference is shown" is said only if the interval contains 0. If the interval excludes 0, but the correction for
    several contrasts leaves the question open, the sentence says so.
    """
    metric, of, against, margin = (contrast[key] for key in ("metric", "of", "against", "margin"))
    subject, better, pair = heading(result, metric), measure_of(metric).better, f"{of} and {against}"
    is_close = margin is not None and contrast["p_margin_holm"] < ALPHA
    if contrast["p_holm"] < ALPHA:
        more, less = (of, against) if contrast["value"] > 0 else (against, of)
        conclusion = f"{more} has more {subject} than {less}"
        if better:
            best, worst = (more, less) if better > 0 else (less, more)
            conclusion = f"{best} is better than {worst} in {subject}"
        conclusion += f", by less than {margin:g}" if is_close else ""
    elif is_close:
        conclusion = f"{pair} are equivalent in {subject}, to within {margin:g}"
    elif contrast["low"] <= 0 <= contrast["high"]:
        conclusion = f"No difference between {pair} is shown in {subject}"
        conclusion += f", nor that they are equivalent to within {margin:g}" if margin is not None else ""
    else:
        number_of_contrasts = len(result["primary"])
        conclusion = (
            f"Whether {pair} differ in {subject} is open after the correction for {number_of_contrasts} contrasts"
        )
    values = " less ".join(number(metric, value_of(result, name, metric)) for name in (of, against))
    intervals, p = f"95% interval {bounds(contrast)}", f"p of no difference {p_value(contrast['p_holm'])}"
    if margin is not None:
        intervals += f", 90% {bounds(contrast, '_90')}"
        p += f", p of more than {margin:g} {p_value(contrast['p_margin_holm'])}"
    seeds = " and ".join(str(count) for count in contrast["seeds"] if count)
    seeds += f" seeds{', paired' if contrast['paired'] else ''}"
    return f"{conclusion}: {subject} {values} is {signed(metric, contrast['value'])} ({intervals}, {p}; {seeds})."


def heading(result: dict, metric: str) -> str:
    """Return the name of a metric in tables and sentences."""
    return measure_of(metric).heading.replace("/token", f"/{result['loss_per']}" if metric == "loss" else "/token")


def p_value(p: float) -> str:
    """Format a p-value with three digits; smaller ones as `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def value_of(result: dict, name: str, metric: str) -> float:
    """Return the value of a metric in the row `name`. Names of arms are unique, and the arms come first."""
    return next(row for row in result["rows"] if row["name"] == name)["metrics"][metric]["value"]


def warnings(result: dict) -> list[str]:
    """Return sentences on everything that makes the arms unequal, or the intervals unsure.

    These are unequal numbers of tokens, other prompts or limits, answers cut short, damaged weights, scores without an
    interval, different tokenizers, missing results on general text, and too few clusters.
    """
    arms, sentences = [row for row in result["rows"] if row["kind"] == "arm"], []
    tokens = {row["name"]: [seed["tokens"] for seed in row["seeds"] if seed["tokens"]] for row in arms}
    means = {name: fmean(counts) for name, counts in tokens.items() if counts}
    if means and max(means.values()) > MANY_TOKENS * min(means.values()):
        counts = ", ".join(f"{name} {count:,.0f}" for name, count in means.items())
        sentences.append(
            f"The arms were not trained on equal numbers of tokens: {counts}. A difference may be one of training time."
        )
    prompts = {row["name"]: {*map(_prompt, row["seeds"])} for row in arms}
    if len(set().union(*prompts.values())) > 1:
        listing = "; ".join(f"{name}: {', or '.join(sorted(of_seeds))}" for name, of_seeds in prompts.items())
        sentences.append(f"Not all were asked in the same way: {listing}.")
    for row in arms:
        cut = sum(seed["cut_short"] or 0 for seed in row["seeds"])
        if cut > 0.01 * result["examples"] * len(row["seeds"]):
            sentences.append(
                f"{cut} answers of {row['name']} were cut at the longest length allowed and count as they are."
            )
    for row in arms:
        if row["not_finite"]:
            metrics = listed([heading(result, name) for name in row["not_finite"]])
            sentences.append(
                f"Not a finite number for {row['name']}, so neither shown nor compared: {metrics}. Its weights may be damaged."
            )
    for name, values_by_arm in result["without_interval"].items():
        values = "; ".join(
            f"{arm} {', '.join(f'{value:.4g}' for value in seeds)}" for arm, seeds in values_by_arm.items()
        )
        sentences.append(
            f"{name} is no mean over single examples, so it has no interval and is not compared: {values}."
        )
    if result["loss_per"] == "answer":
        sentences.append(
            "The arms have different tokenizers: the loss is given per answer, because nats per token cannot be compared."
        )
    missing = [row["name"] for row in arms if "perplexity" not in {*row["metrics"], *row["not_finite"]}]
    if 0 < len(missing) < len(arms):
        sentences.append(
            f"General text is not measured for {', '.join(missing)}: use --general and --base, or give a run."
        )
    clusters, unit = result["clusters"], result["unit"]
    if clusters == 1:
        sentences.append(f"All {unit} are of one {result['cluster']}: the intervals say nothing about others.")
    elif 0 < clusters < FEW_CLUSTERS:
        independent = f"{result['cluster']}s" if clusters < result["examples"] else unit
        sentences.append(
            f"The test has {clusters} independent {independent}. With fewer than "
            f"{FEW_CLUSTERS} the intervals of the task are too narrow."
        )
    return sentences


def _prompt(seed: dict) -> str:
    """Return the settings that produced the answers, in words; `unknown` for a file of answers, which has none."""
    limit = seed["max_new_tokens"]
    words = [] if seed["shots"] is None else [f"{seed['shots']} examples in the prompt"]
    words += [f"at most {limit} tokens"] if limit else []
    return ", ".join([*words, *filter(None, [seed["dtype"]])]) or "unknown"


def limits(result: dict) -> list[str]:
    """Return sentences on the questions that the comparison cannot answer."""
    arms = {row["name"]: len(row["seeds"]) for row in result["rows"] if row["kind"] == "arm"}
    single = [name for name, count in arms.items() if count == 1]
    sentences = [
        f"The intervals are for {result['sample']}: they say how the figures would vary with others of this kind, not with "
        "another kind."
    ]
    if single:
        sentences.append(
            f"There is one training run of {listed(single)}: how much another seed would change is not known. A difference "
            "from such a run is described, and shows nothing of the recipe; give two seeds or more, NAME=RUN,RUN."
        )
    if len(single) < len(arms):
        sentences.append(
            "Differences between arms with several seeds are of recipes: their intervals contain the spread over seeds. The "
            "interval of a single value does not."
        )
    chance = "of many intervals of 95% some are without 0 by chance."
    if not result["primary"]:
        sentences.append(f"No contrast was declared as primary (--primary), so nothing is tested: {chance}")
    else:
        sentences.append(
            f"Every contrast that was not declared as primary is described: {chance} Where no difference is shown, the arms "
            "need not be equal: the interval says how large it may be, and --margin asks."
        )
    if general := result["general"]:
        sentences.append(
            f"Forgetting is measured on {general['bytes']:,} bytes of general text ({general['text']}) against the {BASE} "
            f"{general['base']}; other abilities are not tested."
        )
    return sentences


def listed(names: Sequence[str]) -> str:
    """Join names as in a sentence: `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
