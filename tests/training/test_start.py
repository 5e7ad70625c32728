"""run.resume=never, and what all ranks compare."""

from pathlib import Path

import pytest

from common.errors import UserError
from training.start import check_resume, generation_config_digest


def test_resume_never_refuses_what_exists_but_not_a_restart_of_torchrun(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    check_resume("never", Path(tmp_path, "new"), ranks)
    check_resume("auto", tmp_path, ranks)
    with pytest.raises(UserError, match="exists and run.resume=never"):
        check_resume("never", tmp_path, ranks)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    check_resume("never", tmp_path, ranks)


def test_ranks_compare_the_file_that_says_what_ends_an_answer(tmp_path) -> None:
    assert generation_config_digest(str(tmp_path)) is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    one = generation_config_digest(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert None is not one != generation_config_digest(str(tmp_path))
