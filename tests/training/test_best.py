"""What a start does with the best checkpoint of an earlier one, without the checkpoint itself (tests/distributed has that)."""

from pathlib import Path

from distributed.process_group import Ranks
from training.best import judge_best_again
from training.progress import Progress


def judge(progress: Progress, fresh: Progress, ranks: Ranks) -> list[str]:
    return judge_best_again(progress, fresh, Path("none"), {}, {}, ranks)


def test_a_checkpoint_from_before_best_by_keeps_its_best_loss(ranks: Ranks) -> None:
    progress = Progress({}, {}, [0], base_loss=0.9, best_loss=0.4, best_step=6, validation=["a"])
    assert judge(progress, Progress({}, {}, [0], validation=["a"]), ranks) == []
    assert (progress.base_value, progress.best_value, progress.best_step) == (0.9, 0.4, 6)


def test_another_criterion_or_other_data_begin_to_count_anew(ranks: Ranks) -> None:
    for change in ({"best_by": "validation/f1:max"}, {"validation": ["b"]}):
        fresh = Progress({}, {}, [0], **({"validation": ["a"]} | change))
        progress = Progress({}, {}, [0], base_value=0.9, best_value=0.4, best_step=6, without_gain=2, validation=["a"])
        [line] = judge(progress, fresh, ranks)
        assert line.endswith(": the next evaluation is the first that counts")
        assert (progress.best_by, progress.validation) == (fresh.best_by, fresh.validation)
        assert (progress.without_gain, progress.base_value, progress.best_value, progress.best_step) == (
            0,
            None,
            None,
            None,
        )
