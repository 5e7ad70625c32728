"""The quickstart's last screen refuses results that are not those of a quickstart."""

import json

import pytest

from common.errors import UserError
from eval.regulator.quickstart import screen


def test_a_result_that_is_missing_or_of_another_form_is_one_sentence(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    with pytest.raises(UserError, match=r"before\.json: No such file or directory; run scripts/quickstart\.sh"):
        screen(tmp_path, tmp_path)
    (folder / "before.json").write_text("{")
    with pytest.raises(UserError, match=r"before\.json is not JSON"):
        screen(tmp_path, tmp_path)
    (folder / "before.json").write_text(json.dumps({"answers": []}))
    (folder / "after.json").write_text(json.dumps({"answers": [], "rouge_l": {}}))
    with pytest.raises(UserError, match=r"after\.json has no facts; remove it"):
        screen(tmp_path, tmp_path)
