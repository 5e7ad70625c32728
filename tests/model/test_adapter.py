"""Our loader refuses an adapter on other weights. test_lora.py compares the merged weights with peft's results from the same files."""

import json
import shutil

import pytest
import torch

from common.durable_files import publish
from common.errors import UserError
from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run
from eval.generate import load_for_generation
from model import lora
from model.architectures import read_model_config
from model.build import build_to_train
from model.fingerprint import fingerprint_of_base
from model.language_model import load_weights, trained_parameters
from model.lora import Adapter, base_of_adapter, init_adapters, save_adapter, write_adapter
from model.weights import Weights
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("adapter") / "base")


def test_adapter_is_refused_on_other_weights(base, tmp_path, monkeypatch) -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj" + side: torch.zeros(size)
        for side, size in zip(lora.SIDES, ((2, 64), (64, 2)), strict=True)
    }
    adapter = Adapter(Weights({name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__), LoRA(rank=2))
    folder, models = tmp_path / "adapter", tmp_path / "models"
    folder.mkdir()
    write_adapter(folder, adapter, base, "org/base", lambda _, tensor: tensor)  # the name does not identify the weights
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


@pytest.mark.parametrize("beside", [True, False])
def test_adapter_directory_is_refused_as_model_path(base, tmp_path, beside) -> None:
    """A run would begin at the base and ignore an adapter of peft (here DoRA), while transformers applies it."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder) if beside else folder.mkdir()
    (folder / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(UserError, match="model.path=.* is an adapter; name the merged weights: export/ of its run"):
        read_model_config(str(folder), key="model.path")


@pytest.mark.parametrize("rope_type", [None, "yarn"])
def test_adapter_trained_with_other_rope_is_refused(base, tmp_path, ranks, rope_type) -> None:
    """peft would silently apply the adapter to the base with the RoPE of the base's config.json."""
    path, folder = str(base), tmp_path / "adapter"
    scaled = Model(path, rope_type=rope_type, rope_factor=rope_type and 2.0)
    config = Config(scaled, Data(("-",)), Batch(8), Optimizer(1e-3), Run("name"), lora=LoRA(rank=2))
    model = build_to_train(config, read_model_config(path, rope_type, scaled.rope_factor))
    load_weights(model, path, torch.device("cpu"))
    init_adapters(trained_parameters(model), seed=0)
    save_adapter(folder, model, config, ranks)
    publish(folder)
    if rope_type is None:
        assert base_of_adapter(folder) == base
        return
    with pytest.raises(UserError, match="export it again with scripts/export.py"):  # export.py demands --merge-lora
        load_for_generation(str(folder), torch.float32, torch.device("cpu"))
