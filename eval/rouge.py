"""ROUGE-L (Lin, 2004, https://aclanthology.org/W04-1013): the longest common subsequence of words, as F-measure."""

from collections.abc import Sequence

from rouge_score.tokenize import tokenize


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F-measure of each pair. An empty prediction scores 0.

    Words and values are those of Google's rouge-score without stemming.
    """
    words = [[tokenize(text, None) for text in texts] for texts in (references, predictions)]
    return [f_measure(reference, prediction) for reference, prediction in zip(*words, strict=True)]


def f_measure(reference: Sequence[str], prediction: Sequence[str]) -> float:
    """Return the ROUGE-L F-measure of two texts that are split into words."""
    common = _common_subsequence(reference, prediction)
    return 2 * common / (len(reference) + len(prediction)) if common else 0.0


def _common_subsequence(reference: Sequence[str], prediction: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by Hyyrö (2004): one bit per word of the reference."""
    places: dict[str, int] = {}
    for i, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << i
    all_bits = (1 << len(reference)) - 1
    row = all_bits  # a 0 bit is a step of the subsequence
    for word in prediction:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_bits
    return len(reference) - row.bit_count()


def score_whole_answers(texts: Sequence[str], examples: Sequence[dict]) -> dict:
    """Score `texts` against the last message of each example: exact match except for white space, and ROUGE-L.

    Return `exact_match` (`n`, mean `share`), `rouge_l` (`of` "answer", `n`, mean `f`, no `baselines`) and `answers` (`id`,
    `answer`, `reference`, `exact` and `rouge_l` of each).
    """
    references = [example["messages"][-1]["content"] for example in examples]
    scores = rouge_l(references, texts)
    exact = [text.split() == reference.split() for text, reference in zip(texts, references, strict=True)]
    rows = zip(examples, texts, references, exact, scores, strict=True)
    return {
        "exact_match": {"n": len(exact), "share": mean(exact)},
        "rouge_l": {"of": "answer", "n": len(scores), "f": mean(scores), "baselines": {}},
        "answers": [
            {"id": example.get("id"), "answer": text, "reference": reference, "exact": same, "rouge_l": score}
            for example, text, reference, same, score in rows
        ],
    }


def mean(scores: Sequence[float]) -> float:
    """Return the mean; 0 if there are no scores."""
    return sum(scores) / len(scores) if scores else 0.0
