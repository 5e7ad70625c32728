"""The settings with the value "auto": the suggested learning rate, and the sequence length from the lengths of the examples."""

import math
from pathlib import Path

import numpy as np
import pytest

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from configs.load import load_config, override
from data.examples import Documents
from model.build import build
from tests.tiny import write_chat_file, write_tiny_model
from training.auto import FAR, RECIPES, length_for, rate_warnings, suggested_rate
from training.inputs import read_inputs, settle_settings

SIZES = [135e6, 360e6, 1e9, 1.7e9, 3e9, 8e9, 13e9, 32e9, 70e9]


def test_suggested_rates_by_size() -> None:
    rates = [suggested_rate(int(size), False) for size in SIZES]
    assert rates == [3e-4, 1.6e-4, 8e-5, 5.6e-5, 3.8e-5, 2e-5, 1.4e-5, 7.9e-6, 4.7e-6]
    assert [suggested_rate(int(size), True) for size in (135e6, 8e9, 70e9)] == [1e-3, 2e-4, 4.7e-5]
    assert suggested_rate(8_000_000_000, False, "pre-training") == 1e-5


def test_suggested_rates_follow_published_recipes() -> None:
    errors = [math.log(rate / suggested_rate(int(size), False)) for size, rate in RECIPES]
    assert abs(np.mean(errors)) < 0.25 and np.std(errors) < math.log(3.2)


@pytest.mark.parametrize("size", SIZES)
def test_far_rates_give_a_warning_at_any_size(size) -> None:
    def warnings(rate: float, *more: str) -> list[str]:
        config = Config(Model("m"), Data(("d",)), Batch(8), Optimizer(rate), Run("r"))
        return rate_warnings(override(config, more), int(size))

    rate = suggested_rate(int(size), False)
    assert warnings(rate) == warnings(0.9 * FAR * rate) == warnings(1.1 * rate / FAR) == []
    assert f"{1.2 * FAR * rate:g} is higher than usual" in warnings(1.2 * FAR * rate)[0]
    assert "lower than usual" in warnings(0.8 * rate / FAR)[0]
    assert "for LoRA of" in warnings(rate / 10, "lora.rank=8")[0]


def test_sequence_length_holds_all_but_outliers() -> None:
    def length(chats: list[int], texts: tuple[int, ...] = (), positions: int = 8192, may_drop: bool = True) -> int:
        lengths = np.array([*chats, *texts], np.int64)
        return length_for(lengths, np.arange(len(lengths)) >= len(chats), positions, may_drop)

    assert length([10, 256]) == 256 and length([10, 257]) == 512
    assert length([500] * 199 + [900]) == 1024  # less than twice as long
    assert length([500] * 199 + [4000]) == 512
    assert length([500] * 199 + [4000], may_drop=False) == 4096
    assert length([500] * 50 + [4000]) == 4096  # more than 1%
    assert length([9000], positions=8000) == 8000
    assert length([], texts=(300,)) == 512 and length([], texts=(300, 50_000)) == 2048
    assert length([]) == 2048 and length([], positions=1024) == 1024  # a token store


@pytest.mark.parametrize("name", ["sft", "lora", "cpt"])
def test_neutral_configs_follow_model_and_data(name, tmp_path, capsys) -> None:
    write_tiny_model(tmp_path / "model")
    write_chat_file(tmp_path / "a.jsonl", 60)
    values = {"model.path": tmp_path / "model", "data.train": tmp_path / "a.jsonl", "run.directory": tmp_path}
    overrides = [f"{key}={value}" for key, value in (values | {"data.cache": tmp_path / "cache"}).items()]
    config = load_config(Path("configs") / f"{name}.py", overrides)
    model, model_config, tokenizer = build(config)
    settled = settle_settings(config, model, model_config, tokenizer, show_progress=True)
    assert settled.data.length == 256
    assert settled.optimizer.peak == {"sft": 3.7e-4, "lora": 1e-3, "cpt": 1.9e-4}[name]
    printed = capsys.readouterr().out
    assert "optimizer.learning_rate=auto: " in printed and "data.sequence_length=auto: 256 tokens hold" in printed
    assert settled == settle_settings(config, model, model_config, tokenizer, show_progress=False)  # as a resume does
    chosen = override(config, ["data.sequence_length=128", "optimizer.learning_rate=1e-5"])
    assert settle_settings(chosen, model, model_config, tokenizer, show_progress=False) == chosen
    readable = override(settled, ["batch.micro_batch=1"])
    train = read_inputs(readable, tokenizer, model_config.vocab_size, lambda *lengths: 1.0, 1, False).train.sources[0]
    assert isinstance(train, Documents) and "DROPPED" not in train.report
