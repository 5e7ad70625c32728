import numpy as np

from data.batches import plan_training
from data.show import BAR, describe_source, describe_steps, histogram
from tests.data.test_batches import documents


def counts(lines):
    return [int(line[22 + BAR :].split()[0].replace(",", "")) for line in lines]


def labels(lines):
    return [line.split("|")[0].strip() for line in lines]


def test_a_wide_range_is_shown_in_powers_of_two():
    lines = histogram(np.array([3] * 5 + [100] * 400 + [127, 128] + [5000]))
    assert labels(lines)[:2] == ["2 to 3", "4 to 7"] and labels(lines)[-1] == "4,096 to 5,000"
    assert counts(lines) == [5, 0, 0, 0, 0, 401, 1, 0, 0, 0, 0, 1]
    bars = [line.count("#") for line in lines]
    assert bars == [1, 0, 0, 0, 0, 50, 1, 0, 0, 0, 0, 1]  # a single one is seen
    assert all(len(line) <= 100 for line in lines) and lines[5].endswith(" 98.3%")


def test_a_narrow_range_is_shown_in_equal_parts():
    lines = histogram(np.arange(100, 200))
    assert labels(lines) == [f"{low} to {low + 9}" for low in range(100, 200, 10)]
    assert counts(lines) == [10] * 10
    assert labels(histogram(np.array([7, 7]))) == ["7"] and counts(histogram(np.array([7, 7]))) == [2]
    uneven = histogram(np.arange(64, 223))
    assert sum(counts(uneven)) == 159 and labels(uneven)[0] == "64 to 79" and labels(uneven)[-1].endswith(" to 222")
    huge = histogram(np.full(3, 10**9))
    assert all(len(line) <= 100 for line in huge)


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
