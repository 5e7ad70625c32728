"""The comparison in sentences: what is shown, what is described, and what the figures do not say."""

from collections.abc import Sequence
from statistics import fmean

from eval.comparison.measures import BASE, ENGINE, measure_of

ALPHA = 0.05
FEW_CLUSTERS = 20  # below, bootstrap intervals are clearly too narrow: with 8 clusters 89% instead of 95%
MANY_TOKENS = 1.01  # arms whose tokens differ by more than 1% did not have equal training


def verdict(result: dict) -> dict[str, list[str]]:
    """Sentences on the primary contrasts, on what was learned and forgotten, and on the baselines.

    Pairs without the reference are in the tables.
    """
    found: dict[tuple[str, str], list[dict]] = {}
    for one in result["differences"]:
        if result["reference"] in (one["of"], one["against"]) or one["family"] == "forgetting":
            found.setdefault((one["family"], one["metric"]), []).append(one)
    learned, forgotten = (
        [description(result, one) for one in found.get(("arms", metric), ())]
        for metric in (result["main"], "perplexity")
    )
    if of_base := found.get(("forgetting", "perplexity")):
        base = value_of(result, BASE, "perplexity")
        arms = "; ".join(
            f"{one['of']} {value_of(result, one['of'], 'perplexity'):.3f} ({one['value'] / base:+.1%}, 95% interval "
            f"{one['low'] / base:+.1%} to {one['high'] / base:+.1%})"
            for one in of_base
        )
        forgotten.append(f"The base model predicts general text with a perplexity of {base:.3f} per byte; {arms}.")
    baselines = found.get(("baselines", "f1"), [])
    best = max(baselines, key=lambda one: value_of(result, one["of"], "f1"), default=None)
    groups = {
        "Declared before": [primary_sentence(result, one) for one in result["primary"]],
        "Learning": learned,
        "Forgetting": forgotten,
        "Without a language model": [
            f"{'Best baseline' if one is best else 'Rules without a model'}: {description(result, one)}"
            for one in baselines
            if one is best or one["of"] == ENGINE
        ],
    }
    return {name: sentences for name, sentences in groups.items() if sentences}


def description(result: dict, one: dict) -> str:
    """One difference that was not declared, in words: values and interval, and no claim."""
    metric, of, against = one["metric"], one["of"], one["against"]
    values = ", ".join(f"{name} {number(metric, value_of(result, name, metric))}" for name in (of, against))
    interval = "no interval"
    if one["low"] is not None:
        interval = f"95% interval over {interval_over(result, one)} {bounds(one)}"
    rows = [row for row in result["rows"] if row["name"] in (of, against) and row["kind"] == "arm"]
    single = [row["name"] for row in rows if len(row["seeds"]) == 1]
    if single and not one["over_seeds"]:
        have = "has one seed" if len(single) == 1 else "have one seed each"
        interval += f"; {listed(single)} {have}, and another may differ by more"
    return f"{heading(result, metric)}: {values}; {of} less {against} {signed(metric, one['value'])} ({interval})."


def number(metric: str, value: float) -> str:
    """A value of a metric."""
    return f"{value:.{measure_of(metric).digits}f}"


def signed(metric: str, value: float) -> str:
    """A difference in a metric."""
    return f"{value:+z.{measure_of(metric).digits}f}"


def bounds(one: dict, level: str = "") -> str:
    """The interval of a difference, `-0.010 to +0.020`. level: `_90` for that of 90%."""
    return " to ".join(signed(one["metric"], one[f"{bound}{level}"]) for bound in ("low", "high"))


def interval_over(result: dict, one: dict) -> str:
    """What an interval is over, in words."""
    return ("seeds and " if one["over_seeds"] else "") + (measure_of(one["metric"]).of or result["unit"])


def primary_sentence(result: dict, one: dict) -> str:
    """A contrast that was declared before: what it shows, with values, intervals and p-values.

    "No difference is shown" stands beside an interval with 0 alone: where only the correction for several contrasts leaves it
    open, the sentence says so.
    """
    metric, of, against, margin = one["metric"], one["of"], one["against"], one["margin"]
    subject, better, pair = heading(result, metric), measure_of(metric).better, f"{of} and {against}"
    is_close = margin is not None and one["p_margin_holm"] < ALPHA
    if one["p_holm"] < ALPHA:
        more, less = (of, against) if one["value"] > 0 else (against, of)
        says = f"{more} has more {subject} than {less}"
        if better:
            best, worst = (more, less) if better > 0 else (less, more)
            says = f"{best} is better than {worst} in {subject}"
        says += f", by less than {margin:g}" if is_close else ""
    elif is_close:
        says = f"{pair} are equivalent in {subject}, to within {margin:g}"
    elif one["low"] <= 0 <= one["high"]:
        says = f"No difference between {pair} is shown in {subject}"
        says += f", nor that they are equivalent to within {margin:g}" if margin is not None else ""
    else:
        says = f"Whether {pair} differ in {subject} is open after the correction for {len(result['primary'])} contrasts"
    values = " less ".join(number(metric, value_of(result, name, metric)) for name in (of, against))
    intervals, p = f"95% interval {bounds(one)}", f"p of no difference {p_value(one['p_holm'])}"
    if margin is not None:
        intervals += f", 90% {bounds(one, '_90')}"
        p += f", p of more than {margin:g} {p_value(one['p_margin_holm'])}"
    seeds = " and ".join(str(count) for count in one["seeds"] if count) + f" seeds{', paired' if one['paired'] else ''}"
    return f"{says}: {subject} {values} is {signed(metric, one['value'])} ({intervals}, {p}; {seeds})."


def heading(result: dict, metric: str) -> str:
    """The name of a metric in tables and sentences."""
    return measure_of(metric).heading.replace("/token", f"/{result['loss_per']}" if metric == "loss" else "/token")


def p_value(p: float) -> str:
    """A p-value with as many digits as mean something."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def value_of(result: dict, name: str, metric: str) -> float:
    """The value of a metric in the row `name`. Names of arms are unique, and the arms come first."""
    return next(row for row in result["rows"] if row["name"] == name)["metrics"][metric]["value"]


def warnings(result: dict) -> list[str]:
    """What makes the arms unequal or unsure: other tokens, other questions, cut answers, single seeds, other tokenizers."""
    arms, found = [row for row in result["rows"] if row["kind"] == "arm"], []
    tokens = {row["name"]: [seed["tokens"] for seed in row["seeds"] if seed["tokens"]] for row in arms}
    means = {name: fmean(counts) for name, counts in tokens.items() if counts}
    if means and max(means.values()) > MANY_TOKENS * min(means.values()):
        counts = ", ".join(f"{name} {count:,.0f}" for name, count in means.items())
        found.append(
            f"The arms were not trained on equal numbers of tokens: {counts}. A difference may be one of training time."
        )
    ways = {row["name"]: {*map(_way, row["seeds"])} for row in arms}
    if len(set().union(*ways.values())) > 1:
        each = "; ".join(f"{name}: {', or '.join(sorted(of_seeds))}" for name, of_seeds in ways.items())
        found.append(f"Not all were asked in the same way: {each}.")
    for row in arms:
        cut = sum(seed["cut_short"] or 0 for seed in row["seeds"])
        if cut > 0.01 * result["examples"] * len(row["seeds"]):
            found.append(
                f"{cut} answers of {row['name']} were cut at the longest length allowed and count as they are."
            )
    for row in arms:
        if row["not_finite"]:
            metrics = listed([heading(result, name) for name in row["not_finite"]])
            found.append(
                f"Not a finite number for {row['name']}, so neither shown nor compared: {metrics}. Its weights may be damaged."
            )
    for name, of_arms in result["without_interval"].items():
        values = "; ".join(f"{arm} {', '.join(f'{value:.4g}' for value in each)}" for arm, each in of_arms.items())
        found.append(f"{name} is no mean over single examples, so it has no interval and is not compared: {values}.")
    if result["loss_per"] == "answer":
        found.append(
            "The arms have different tokenizers: the loss is given per answer, because nats per token cannot be compared."
        )
    missing = [row["name"] for row in arms if "perplexity" not in {*row["metrics"], *row["not_finite"]}]
    if 0 < len(missing) < len(arms):
        found.append(f"General text is not measured for {', '.join(missing)}: use --general and --base, or give a run.")
    clusters, unit = result["clusters"], result["unit"]
    if clusters == 1:
        found.append(f"All {unit} are of one bank: the intervals say nothing about others.")
    elif 0 < clusters < FEW_CLUSTERS:
        found.append(
            f"The test has {clusters} independent {'banks' if clusters < result['examples'] else unit}. With fewer than "
            f"{FEW_CLUSTERS} the intervals of the task are too narrow."
        )
    return found


def _way(seed: dict) -> str:
    """How a model was asked, as far as its result says it: a file of answers says nothing."""
    limit, dtype = seed["max_new_tokens"], seed["dtype"]
    words = [] if seed["shots"] is None else [f"{seed['shots']} examples in the prompt"]
    words += [] if seed["constrained"] is None else ["not " * (not seed["constrained"]) + "decoded inside the grammar"]
    return ", ".join([*words, *([f"at most {limit} tokens"] if limit else []), *filter(None, [dtype])]) or "unknown"


def limits(result: dict) -> list[str]:
    """What the comparison cannot say."""
    arms = {row["name"]: len(row["seeds"]) for row in result["rows"] if row["kind"] == "arm"}
    single = [name for name, count in arms.items() if count == 1]
    found = [
        f"The intervals are for {result['sample']}: they say how the figures would vary with others of this kind, not with "
        "another kind."
    ]
    if single:
        found.append(
            f"There is one training run of {listed(single)}: how much another seed would change is not known. A difference "
            "from such a run is described, and shows nothing of the recipe; give two seeds or more, NAME=RUN,RUN."
        )
    if len(single) < len(arms):
        found.append(
            "Differences between arms with several seeds are of recipes: their intervals contain the spread over seeds. The "
            "interval of a single value does not."
        )
    chance = "of many intervals of 95% some are without 0 by chance."
    if not result["primary"]:
        found.append(f"No contrast was declared as primary (--primary), so nothing is tested: {chance}")
    else:
        found.append(
            f"What was not declared as primary is described: {chance} Where no difference is shown, the arms need not be "
            "equal: the interval says how large it may be, and --margin asks."
        )
    if general := result["general"]:
        found.append(
            f"Forgetting is measured on {general['bytes']:,} bytes of general text ({general['text']}) against the {BASE} "
            f"{general['base']}; other abilities are not tested."
        )
    return found


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence: `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
