"""ROUGE-L (Lin, 2004, https://aclanthology.org/W04-1013): the longest common subsequence of words, as F-measure."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """The ROUGE-L F-measure of each pair, computed by Google's rouge-score without stemming.

    An empty prediction scores 0.
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [
        scorer.score(reference, prediction)["rougeL"].fmeasure
        for reference, prediction in zip(references, predictions, strict=True)
    ]


def score_whole_answers(examples: Sequence[dict], texts: Sequence[str]) -> dict:
    """ROUGE-L of `texts` against the assistant's last message of each example: the metric for any task.

    Returns `rouge_l` (`of` "answer", `n`, mean `f`, no `baselines`) and `answers` (`id`, `answer`, `rouge_l` of each).
    """
    scores = rouge_l([example["messages"][-1]["content"] for example in examples], texts)
    rows = zip(examples, texts, scores, strict=True)
    return {
        "rouge_l": {"of": "answer", "n": len(scores), "f": mean(scores), "baselines": {}},
        "answers": [{"id": example.get("id"), "answer": text, "rouge_l": score} for example, text, score in rows],
    }


def mean(scores: Sequence[float]) -> float:
    """The mean; 0 if there are no scores."""
    return sum(scores) / len(scores) if scores else 0.0
