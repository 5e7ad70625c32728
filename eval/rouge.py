"""ROUGE-L (Lin, 2004) of directives: the longest common subsequence of words with a reference, as F-measure."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """The F-measure of each pair, by Google's rouge-score without stemming; an empty prediction counts 0."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [
        scorer.score(reference, prediction)["rougeL"].fmeasure
        for reference, prediction in zip(references, predictions, strict=True)
    ]


def fixed_letter(rule_ids: Sequence[str], training: Sequence[tuple[Sequence[str], str]]) -> str | None:
    """The letter of a trivial baseline: of the first training example, (violations, letter), with exactly `rule_ids`."""
    return next((letter for violated, letter in training if set(violated) == set(rule_ids)), None)
