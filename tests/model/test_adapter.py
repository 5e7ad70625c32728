"""Our own loader refuses an adapter on other weights. test_lora.py: it merges to what peft computes from what is written."""

import json
import shutil

import pytest
import torch

from common.errors import UserError
from configs.config import LoRA
from eval.generate import load_for_generation
from model import lora
from model.fingerprint import fingerprint_of_base
from model.lora import Adapter, base_of_adapter, write_adapter
from model.weights import Weights
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("adapter") / "base")


def test_an_adapter_is_refused_on_other_weights_and_without_its_own(base, tmp_path, monkeypatch) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj" + side: torch.zeros(size)
        for side, size in zip(lora.SIDES, ((2, 64), (64, 2)), strict=True)
    }
    adapter = Adapter(Weights({name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__), LoRA(rank=2))
    folder, models = tmp_path / "adapter", tmp_path / "models"
    folder.mkdir()
    write_adapter(folder, adapter, base, "org/base", lambda _, tensor: tensor)  # the name says nothing of the weights
    assert json.loads((folder / "base.json").read_text())["fingerprint"] == fingerprint_of_base(base)
    monkeypatch.setattr(lora, "MODELS", models)
    with pytest.raises(
        UserError, match=f"is an adapter on org/base, which is not there; put the base into {models / 'base'}"
    ):
        base_of_adapter(folder)
    shutil.copytree(base, models / "base")
    assert base_of_adapter(folder) == models / "base"
    shutil.rmtree(models / "base")
    write_tiny_model(models / "base", tied=False)
    with pytest.raises(UserError, match=f"is an adapter on other weights than those in {models / 'base'} .SHA-256 "):
        load_for_generation(str(folder), torch.float32, torch.device("cpu"))
    (folder / "base.json").unlink()
    with pytest.raises(UserError, match="does not say which weights it was trained on"):
        base_of_adapter(folder)
