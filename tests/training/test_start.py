"""run.resume=never."""

from pathlib import Path

import pytest

from common.errors import UserError
from training.start import check_resume


def test_resume_never_allows_torchrun_restarts(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    check_resume("never", Path(tmp_path, "new"), ranks)
    check_resume("auto", tmp_path, ranks)
    with pytest.raises(UserError, match="exists and run.resume=never"):
        check_resume("never", tmp_path, ranks)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    check_resume("never", tmp_path, ranks)
