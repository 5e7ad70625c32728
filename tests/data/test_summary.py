import numpy as np

from data.batches import plan_training
from data.show import BAR, describe_source, describe_steps, histogram
from tests.data.test_batches import documents


def counts(lines):
    return [int(line[22 + BAR :].split()[0].replace(",", "")) for line in lines]


def labels(lines):
    return [line.split("|")[0].strip() for line in lines]


def test_lengths_are_shown_in_equal_ranges():
    lines = histogram(np.array([*range(100, 199), 199]))
    assert labels(lines) == [f"{low} to {low + 9}" for low in range(100, 200, 10)]
    assert counts(lines) == [10] * 10 and all(len(line) <= 100 for line in lines)
    assert labels(histogram(np.array([7, 7]))) == ["7"] and counts(histogram(np.array([7, 7]))) == [2]
    uneven = histogram(np.array([*[64] * 150, 222]))
    assert sum(counts(uneven)) == 151 and labels(uneven)[0] == "64 to 79" and labels(uneven)[-1].endswith(" to 222")
    assert [line.count("#") for line in uneven] == [50, *[0] * 8, 1]  # a single one is seen


def test_a_source_is_described():
    lines = describe_source(
        "data.train", "2 examples\nDROPPED 1\x1b; and why", np.array([10, 30]), np.array([2.5, 7.5])
    )
    assert lines[:3] == ["data.train:", "  2 examples", "  DROPPED 1⟨U+001B⟩; and why"]
    assert lines[-1].startswith("  targets per sequence: 2.5 to 7.5, median 5") and lines[-1].endswith(
        "25.0% of all tokens"
    )


def test_tokens_of_steps_are_compared_with_the_sequence_length():
    plan = plan_training(documents([60, 60, 30, 30, 20]), epochs=1, seed=0, global_examples=4)
    steps = [plan.batch(0), plan.batch(1)]
    least, most = sorted(sum(step.document_lengths) for step in steps)
    assert describe_steps(steps, 50, 2).startswith(
        f"steps: {least} to {most} tokens in all 2 steps of the first epoch, 100 on average, which is 2.0 times data.sequ"
    )
    assert "2 of 9 steps" in describe_steps(steps, 64, 9)
