"""The patterns of the notation: each cell, form, article and member is a code as a whole."""

import pytest

from model.new_tokens import split
from xbrl.read.render import NOTATION


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("{tC_01.00, r0010, c0010}", ["tC_01.00", " r0010", " c0010"]),
        ("with {c0040} >= {tF_24.02, r0040-0060, default: 0, interval: true}: x",
         [" {c0040}", "tF_24.02", " r0040-0060", ", default: 0, interval: true}:"]),
        ("under CRR Art. 92(1)(a) or Article 412(1) of it", [" CRR Art. 92(1)(a)", " Article 412(1)"]),
        ("C 76.00.a Liquidity; F 01.01", ["C 76.00.a", " F 01.01"]),
        ("xr0010 r00105", []),
        ("eba_GA:IMF.CL_AREA.7H.", ["eba_GA:IMF.CL_AREA.7H"]),
    ],
)  # fmt: skip
def test_patterns_match_whole_codes(text, codes) -> None:
    assert list(split([text], NOTATION)[0]) == codes
