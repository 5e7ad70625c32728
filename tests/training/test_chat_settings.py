"""The date that a chat template writes is fixed at the first start of a run; options of a template."""

import dataclasses
import json
from datetime import date

import pytest

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from tests.chat_families import family_tokenizer
from tests.tiny import tiny_tokenizer
from training.chat_settings import chat_settings, settle_chat_settings


def settled(tmp_path, family: str | None = "llama3", **data) -> Config:
    config = Config(Model("m"), Data(("a.jsonl",), **data), Batch(1), Optimizer(1e-5), Run("r"))
    tokenizer = family_tokenizer(family) if family else tiny_tokenizer()
    return settle_chat_settings(config, tokenizer, tmp_path)


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


def test_unknown_template_option_is_refused(tmp_path) -> None:
    assert settled(tmp_path, "qwen3", chat_template_options={"enable_thinking": False})
    with pytest.raises(UserError, match="the chat template has no variable enable_thinkin; correct its name"):
        settled(tmp_path, "qwen3", chat_template_options={"enable_thinkin": False})
    with pytest.raises(UserError, match="add_generation_prompt is set by this code"):
        settled(tmp_path, "qwen3", chat_template_options={"add_generation_prompt": True})
