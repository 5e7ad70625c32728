"""A retrieval baseline for the letter: copy the letter of the most similar training report."""

import random

from eval.asked_examples import report_of
from eval.rouge import rouge_l
from xbrl.answers.baselines import nearest_letters
from xbrl.corpus.examples import letter_of

SAMPLE = 100  # examples of each test split that are scored


def score_nearest_letters(splits: dict[str, list[dict]], seed: int) -> dict[str, dict]:
    """Test split -> mean ROUGE-L of the nearest training letters and the number `n` of examples.

    Scores a random sample of up to `SAMPLE` examples of each split. `splits` maps a split to its examples.
    """
    if not splits["train"]:
        return {}
    training = [(report_of(example), letter_of(example)) for example in splits["train"]]
    scores = {}
    for split, examples in splits.items():
        if split.startswith("test") and examples:
            sample = random.Random(f"rouge {seed} {split}").sample(examples, min(SAMPLE, len(examples)))
            letters = nearest_letters(training, [report_of(example) for example in sample])
            values = rouge_l([letter_of(example) for example in sample], letters)
            scores[split] = {"rouge_l": round(sum(values) / len(values), 4), "n": len(values)}
    return scores
