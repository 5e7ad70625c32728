"""A directory that is in the way of a corpus is refused, whatever its dataset.json has."""

import dataclasses
import json

import pytest

from common.errors import UserError
from xbrl.corpus.generate import Request, is_generated

REQUEST = Request(20, 0, "full", [0.8, 0.1, 0.1])


@pytest.mark.parametrize("card", ["[", "[]", "{}"])
def test_a_directory_of_something_else_is_refused(tmp_path, card):
    (tmp_path / "dataset.json").write_text(card)
    with pytest.raises(UserError, match="was not made with these arguments"):
        is_generated(tmp_path, REQUEST)
    (tmp_path / "dataset.json").write_text(json.dumps({"arguments": dataclasses.asdict(REQUEST)}))
    assert is_generated(tmp_path, REQUEST) and not is_generated(tmp_path / "new", REQUEST)
    with pytest.raises(UserError, match=r"corpus cannot be made: .*dataset\.json is a file, not a directory"):
        is_generated(tmp_path / "dataset.json" / "more" / "corpus", REQUEST)
