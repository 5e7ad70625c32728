"""The comparison in sentences: what is shown, what is not, and what the figures do not say."""

from collections.abc import Sequence

from eval.comparison.comparison import BASE
from eval.comparison.measures import ENGINE, MEASURES

ALPHA = 0.05
FEW = 2  # differences of the arms on general text that are spelled out
FEW_CLUSTERS = 20  # below, bootstrap intervals are clearly too narrow: with 8 clusters 89% instead of 95%
MANY_TOKENS = 1.01  # arms whose tokens differ by more than 1% did not have equal training
# metric -> (what the better arm does, what an arm without a shown difference is not different in)
_WORDS = {
    "f1": ("{better} finds violations better than {worse}", "finding violations"),
    "rouge_l": ("{better} writes answers closer to the reference than {worse}", "ROUGE-L"),
    "loss": ("{better} predicts the right answers better than {worse}", "the loss"),
    "perplexity": ("{worse} predicts general text worse than {better}", "predicting general text"),
    "kl": ("{worse} has moved further from the base model than {better}", "the distance from the base model"),
    "questions": ("{better} answers general questions better than {worse}", "answering general questions"),
}


def verdict(result: dict) -> dict[str, list[str]]:
    """Sentences on what was learned, what was forgotten, and the baselines. Pairs without the reference are in the tables."""
    of_arms = [one for one in result["differences"] if one["family"] == "arms"]
    with_reference = [one for one in of_arms if result["reference"] in (one["of"], one["against"])]
    learned = [difference_sentence(result, one) for one in with_reference if one["metric"] == result["main"]]
    forgotten = [difference_sentence(result, one) for one in with_reference if one["metric"] == "perplexity"]
    if len(forgotten) > FEW:
        forgotten = []  # the base model says it in one sentence
    groups = {
        "Learning": learned,
        "Forgetting": [*forgotten, *_base_sentences(result)],
        "Without a language model": _baseline_sentences(result),
    }
    return {name: sentences for name, sentences in groups.items() if sentences}


def _base_sentences(result: dict) -> list[str]:
    """How far every arm is from the base model's perplexity on general text: one sentence for each kind of outcome."""
    found = [one for one in result["differences"] if one["family"] == "forgetting" and one["metric"] == "perplexity"]
    if not found:
        return []
    base = value_of(result, BASE, "perplexity")
    groups: dict[str, list[str]] = {}
    for one in found:
        shown = one["p_holm"] < ALPHA
        group = ("worse" if one["value"] > 0 else "better") if shown else "no difference shown"
        value = value_of(result, one["of"], "perplexity")
        groups.setdefault(group, []).append(f"{one['of']} {value:.3f} ({one['value'] / base:+.1%})")
    outcomes = "; ".join(f"{group}: {', '.join(values)}" for group, values in groups.items())
    tests = f", after correction for {found[0]['tests']} tests" if found[0]["tests"] > 1 else ""
    return [
        f"The base model predicts general text with a perplexity of {base:.3f} per byte. At p < {ALPHA}{tests}, {outcomes}."
    ]


def difference_sentence(result: dict, one: dict) -> str:
    """One difference in words, with both values, its interval and its p-value."""
    metric, measure = one["metric"], MEASURES[one["metric"]]
    first, second = one["of"], one["against"]
    claim, subject = _WORDS.get(metric, (f"{{better}} is better than {{worse}} in {measure.heading}", measure.heading))
    shown = one["p_holm"] < ALPHA
    if shown:
        better, worse = (first, second) if one["value"] * measure.better > 0 else (second, first)
        says = claim.format(better=better, worse=worse)
        first, second = (
            (worse, better) if claim.startswith("{worse}") else (better, worse)
        )  # as the sentence names them
    else:
        says = f"No difference between {first} and {second} is shown in {subject}"
    sign = 1 if first == one["of"] else -1
    low, high = sorted((sign * one["low"], sign * one["high"]))
    values = [f"{value_of(result, name, metric):.{measure.digits}f}" for name in (first, second)]
    difference, low, high = (f"{value:+z.{measure.digits}f}" for value in (sign * one["value"], low, high))
    return (
        f"{says}: {heading(result, metric)} {values[0]} against {values[1]}, difference {difference} (95% interval {low} to "
        f"{high}{', seeds included' if 'these_models' in one else ''}, {p_text(one)})."
    )


def heading(result: dict, metric: str) -> str:
    """The name of a metric in tables and sentences."""
    return MEASURES[metric].heading.replace("/token", f"/{result['loss_per']}" if metric == "loss" else "/token")


def p_text(one: dict) -> str:
    """The corrected p-value of a difference."""
    p = one["p_holm"]
    value = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{value} after correction for {one['tests']} tests" if one["tests"] > 1 else value


def value_of(result: dict, name: str, metric: str) -> float:
    """The value of a metric in the row `name`."""
    return row_of(result, name)["metrics"][metric]["value"]


def row_of(result: dict, name: str) -> dict:
    """The row `name`. Names of arms are unique, and the arms come first."""
    return next(row for row in result["rows"] if row["name"] == name)


def _baseline_sentences(result: dict) -> list[str]:
    """The best baseline, and the rule engine if it is another one, against the reference."""
    found = [one for one in result["differences"] if one["family"] == "baselines" and one["metric"] == "f1"]
    best = max(found, key=lambda one: value_of(result, one["of"], "f1"), default=None)
    chosen = [one for one in found if one is best or one["of"] == ENGINE]
    return [
        f"{'Best baseline' if one is best else 'Rules without a model'}: {difference_sentence(result, one)}"
        for one in chosen
    ]


def warnings(result: dict) -> list[str]:
    """What makes the arms unequal or unsure: other tokens, other questions, cut answers, single seeds, other tokenizers."""
    arms = [row for row in result["rows"] if row["kind"] == "arm"]
    found = _token_warnings(arms)
    ways = {row["name"]: _asked(row["seeds"][0]) for row in arms}
    if len(set(ways.values())) > 1:
        found.append(f"The arms were not asked in the same way: {'; '.join(f'{n}: {way}' for n, way in ways.items())}.")
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
    if result["loss_per"] == "answer":
        found.append(
            "The arms have different tokenizers: the loss is given per answer, because nats per token cannot be compared."
        )
    if general_missing(result):
        found.append(
            f"General text is not measured for {', '.join(general_missing(result))}: use --general and --base, or give a run."
        )
    if 0 < result["clusters"] < FEW_CLUSTERS:
        found.append(_few_clusters(result))
    return found


def _few_clusters(result: dict) -> str:
    """What few banks (or examples) do to the intervals and tests."""
    if result["clusters"] == 1:
        return (
            "All examples are of one bank: the intervals say nothing about others, and no test can show a difference."
        )
    least = 2 / 2 ** result["clusters"]
    return (
        f"The test has {result['clusters']} independent banks or examples. With fewer than {FEW_CLUSTERS} the intervals of the "
        "task are too narrow"
        + (f", and no p-value of it can be below {least:.2g}." if least > 0.001 else "; the p-values are right.")
    )


def general_missing(result: dict) -> list[str]:
    """The arms without measures of forgetting, if others have some."""
    arms = [row for row in result["rows"] if row["kind"] == "arm"]
    missing = [row["name"] for row in arms if "perplexity" not in {*row["metrics"], *row["not_finite"]}]
    return missing if len(missing) < len(arms) else []


def _token_warnings(arms: Sequence[dict]) -> list[str]:
    tokens = {row["name"]: [seed["tokens"] for seed in row["seeds"] if seed["tokens"]] for row in arms}
    known = {name: sum(counts) / len(counts) for name, counts in tokens.items() if counts}
    if known and max(known.values()) > MANY_TOKENS * min(known.values()):
        counts = ", ".join(f"{name} {count:,.0f}" for name, count in known.items())
        return [
            f"The arms were not trained on equal numbers of tokens: {counts}. A difference may be one of training time."
        ]
    return []


def _asked(seed: dict) -> str:
    shots = seed["shots"] or 0
    return f"{shots} examples in the prompt, {'' if seed['constrained'] else 'not '}decoded inside the grammar"


def limits(result: dict) -> list[str]:
    """What the comparison cannot say."""
    arms = [row for row in result["rows"] if row["kind"] == "arm"]
    seeds = {row["name"]: len(row["seeds"]) for row in arms}
    found = [
        f"The intervals and p-values are for {result['sample']}: they say how the figures would vary with others of this "
        "kind, not with another kind."
    ]
    if min(seeds.values()) == 1:
        single = [name for name, count in seeds.items() if count == 1]
        them, their = ("it", "Its") if len(single) == 1 else ("them", "Their")
        found.append(
            f"There is one training run of {listed(single)}: how much another seed would change is not known for {them}. "
            f"{their} differences hold for these models, not for other runs of the recipe."
        )
    if max(seeds.values()) > 1:
        found.append(
            "Differences between arms with several seeds are of recipes: interval and p-value contain the spread over seeds. "
            "The interval of a single value does not."
        )
    found.append("Where no difference is shown, the arms need not be equal: the interval says how large it may be.")
    if any(one["family"] == "forgetting" for one in result["differences"]):
        general = result["general"]
        found.append(
            f"Forgetting is measured on {general['bytes']:,} bytes of general text ({general['text']}) against the {BASE} "
            f"{general['base']}; other abilities are not tested."
        )
    return found


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence: `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
