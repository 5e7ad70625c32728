"""The date that a chat template writes is fixed at the first start of a run, the same on every rank."""

import dataclasses
import json
from datetime import date
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from tests.chat_families import family_tokenizer
from tests.processes import run_ranks
from tests.tiny import tiny_tokenizer
from training.chat_settings import chat_settings, settle_chat_settings

HERE = Path(__file__).parent


def settled(tmp_path, family: str | None = "llama3", **data) -> Config:
    config = Config(Model("m"), Data(("a.jsonl",), **data), Batch(1), Optimizer(1e-5), Run("r"))
    tokenizer = family_tokenizer(family) if family else tiny_tokenizer()
    return settle_chat_settings(config, tokenizer, tmp_path, 1)


def test_the_date_is_that_of_the_first_start(tmp_path) -> None:
    assert settled(tmp_path).data.chat_date == date.today().isoformat()
    for text in ("{", '{"config": {"data": {"chat_date": null}}}'):
        (tmp_path / "config.json").write_text(text)
        assert settled(tmp_path).data.chat_date == date.today().isoformat()
    record = {"config": dataclasses.asdict(settled(tmp_path, chat_date="2025-12-31"))}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert settled(tmp_path).data.chat_date == "2025-12-31"
    assert settled(tmp_path, chat_date="2026-02-01").data.chat_date == "2026-02-01"
    assert chat_settings(settled(tmp_path).data).date == "2025-12-31"


def test_a_template_without_a_date_has_none(tmp_path) -> None:
    assert settled(tmp_path, None, chat_date="2025-12-31").data.chat_date is None


def test_ranks_that_start_on_both_sides_of_midnight_agree(tmp_path) -> None:
    done = run_ranks(2, HERE / "chat_date_worker.py", tmp_path / "run", tmp_path / "date", "llama3", "llama3")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"date.rank{rank}.txt").read_text() for rank in (0, 1)] == ["2026-01-31"] * 2


def test_a_rank_with_another_template_does_not_leave_the_other_waiting(tmp_path) -> None:
    done = run_ranks(2, HERE / "chat_date_worker.py", tmp_path / "run", tmp_path / "date", "llama3", "qwen3")
    assert done.returncode == 1 and "PeerLost" not in done.stderr
    assert "rank 0 has come to the date of the chat template, but rank 1 to the start: give all nodes" in done.stderr
    assert "rank 1 has come to the start, but rank 0 to the date of the chat template: give all nodes" in done.stderr


def test_an_option_that_the_template_does_not_have_is_refused(tmp_path) -> None:
    assert settled(tmp_path, "qwen3", chat_template_options={"enable_thinking": False})
    with pytest.raises(UserError, match="the chat template has no variable enable_thinkin; correct its name"):
        settled(tmp_path, "qwen3", chat_template_options={"enable_thinkin": False})
    with pytest.raises(UserError, match="add_generation_prompt is set by this code"):
        settled(tmp_path, "qwen3", chat_template_options={"add_generation_prompt": True})
