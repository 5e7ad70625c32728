"""Two hundred steps with saves and validations: threads and open files stay as they are, memory almost."""

import pytest

from reliability.soak import Sample, Slope, changes, memory_slope, watch
from reliability.workload import write_workload
from tests.reliability.forked import ForkedLaunch


def samples(resident: list[float], threads: list[int] | None = None) -> list[Sample]:
    counts = threads or [5] * len(resident)
    return [Sample(100 * (i + 1), r, t, 9, 0, 0.0) for i, (r, t) in enumerate(zip(resident, counts, strict=True))]


def test_the_slope_is_that_of_the_line_and_its_error_that_of_the_residuals() -> None:
    assert memory_slope(samples([7.0, 100.0, 101.0, 102.0, 103.0]), skip=100).value == pytest.approx(10.0)
    assert memory_slope(samples([7.0, 100.0, 101.0, 102.0, 103.0]), skip=100).error == pytest.approx(0.0, abs=1e-9)
    # Residuals of +1, -1, -1, +1 around a flat line: sqrt(4 / 2 / sum of squared steps), steps in thousands.
    noisy = memory_slope(samples([101.0, 99.0, 99.0, 101.0]), skip=0)
    assert noisy.value == pytest.approx(0.0, abs=1e-9)
    assert noisy.error == pytest.approx((4 / 2 / (2 * (0.15**2 + 0.05**2))) ** 0.5)
    assert not Slope(11, 1).is_flat(10) and Slope(9, 1).is_flat(10) and Slope(11, 4).is_flat(10)
    assert str(memory_slope(samples([1.0, 2.0]), skip=0).value) == "nan"


def test_threads_that_change_are_told_and_those_of_a_save_are_not() -> None:
    assert changes(samples([1.0] * 5, [4, 5, 6, 5, 7]), skip=100) == []
    assert changes(samples([1.0] * 5, [4, 5, 6, 6, 6]), skip=100) == ["threads: 5 -> 6"]
    assert changes(samples([1.0] * 5, [4, 5, 6, 4, 6]), skip=100) == ["threads: 5 -> 4"]


@pytest.mark.slow
def test_two_hundred_steps(tmp_path) -> None:
    config = write_workload(tmp_path, 200)
    settings = ["run.save_every=20", "run.eval_every=20", "run.log_every=10"]
    launch = ForkedLaunch([str(config), "run.name=soak", *settings], 2, tmp_path / "out")
    try:
        found = watch(launch, tmp_path / "runs" / "soak" / "metrics.jsonl", 10, lambda rank, sample: None)
    finally:
        code = launch.exit_code()
        launch.kill_all()
    assert code == 0, launch.text()[-3000:]
    assert sorted(found) == [0, 1]
    for rank in (0, 1):
        assert len([s for s in found[rank] if s.step > 60]) >= 8
        assert changes(found[rank], skip=60) == []
        assert found[rank][-1].resident - found[rank][5].resident < 16  # MiB; a step leaks nothing of its size
