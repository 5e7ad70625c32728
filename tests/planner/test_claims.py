"""The judgements of published figures follow from the numbers beside them, whatever these are."""

import dataclasses
import re

import pytest

from planner import claims
from planner.claims import ABOUT, Duration, Figure, Fit, durations, figures, fits, instead_of_eight, published_table

GIB = 2**30


@pytest.mark.parametrize(
    "claims_offload,without,offloaded,verdict",
    [
        (False, 40, 5, "holds"),
        (False, 41, 40, "holds only with offload"),
        (False, 41, 41, "does not hold"),
        (True, 40, 5, "holds, even without offload"),
        (True, 41, 40, "holds"),
        (True, 41, 41, "does not hold"),
    ],
)
def test_whether_it_fits(claims_offload, without, offloaded, verdict) -> None:
    assert Fit("claim", "16N", claims_offload, without, offloaded, 40, 0).verdict == verdict


@pytest.mark.parametrize(
    "expected,verdict",
    [
        (None, "does not fit"),
        ((1, 3.9), "shorter than claimed"),
        ((1, 4), "holds"),
        ((5, 6), "holds"),
        ((8, 9), "holds"),
        ((8.1, 9), "longer than claimed"),
    ],
)
def test_whether_hours_meet(expected, verdict) -> None:
    assert Duration("claim", "16N", False, (4, 8), expected, None).verdict == verdict


@pytest.mark.parametrize(
    "found,at_most,verdict",
    [
        ((109, 109), False, "holds"),
        ((91, 91), False, "holds"),
        ((111, 120), False, "more than claimed"),
        ((80, 89), False, "less than claimed"),
        ((5, 100), True, "holds"),
        ((5, 101), True, "may hold"),
        ((101, 200), True, "does not hold"),
    ],
)
def test_single_figures(found, at_most, verdict) -> None:
    assert ABOUT == 0.1
    assert Figure("claim", 100, found, "GB", at_most).verdict == verdict


@pytest.fixture
def only_small_models(monkeypatch) -> None:
    """One row, so that the table takes a second."""
    monkeypatch.setattr(claims, "CLAIMS", (dataclasses.replace(claims.CLAIMS[0]),))


@pytest.mark.slow
def test_the_table_prints_the_numbers_that_it_judges(only_small_models) -> None:
    text = published_table()
    assert max(map(len, text.splitlines())) <= 100
    rows = [*fits(), *instead_of_eight()]
    assert {row.memory for row in rows} == {"16N", "12N", "8N"} and len(rows) == 3 * 3
    for row in rows:
        assert row.offloaded < row.without and row.host > 0
        sizes = (f"{size / GIB:.1f}" for size in (row.without, row.offloaded, row.usable))
        pattern = rf"{re.escape(row.claim)} +{row.memory} +{' +'.join(sizes)} +\d+  {row.verdict}$"
        assert re.search(pattern, text, re.MULTILINE), pattern
    for row in durations():
        assert row.expected and row.length and row.expected[0] < row.expected[1]
        # Examples so long that the claimed hours pass, by the expected speed.
        low, high = (
            claims.SEQUENCE * hours / seen for hours, seen in zip(row.claimed, row.expected[::-1], strict=True)
        )
        assert row.length == pytest.approx((low, high), rel=0.01)
        assert re.search(rf"{row.claim} +{row.memory} .* {row.verdict}$", text, re.MULTILINE)
    found = {figure.claim: figure for figure in figures()}
    twelve = next(figure for claim, figure in found.items() if claim.startswith("7B: ") and "12N" in claim)
    assert twelve.found[0] == pytest.approx(12 * 6.738415616, rel=1e-3) and twelve.verdict == "holds"
    for figure in found.values():
        assert re.search(rf"{re.escape(figure.claim)} .* {figure.verdict}$", text, re.MULTILINE)
