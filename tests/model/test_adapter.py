"""Adapters of peft merge to what peft computes, survive being written, and are refused where they are more than LoRA."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from model.adapter import CONFIG, adapter_of_directory, merge, write_adapter
from model.language_model import build_on_meta
from model.weights import Weights, weights_of_directory
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base and two adapters of peft with random B: alpha / r, and rsLoRA."""
    folder = tmp_path_factory.mktemp("adapter")
    write_tiny_model(folder / "base")
    for name, rslora in (("plain", False), ("rslora", True)):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        settings = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM")
        tuned = get_peft_model(model, settings)
        torch.manual_seed(1)
        for key, parameter in tuned.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        tuned.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["plain", "rslora"])
def test_merged_weights_are_those_of_peft(made, name, tmp_path) -> None:
    base = weights_of_directory(made / "base", build_on_meta(AutoConfig.from_pretrained(made / "base")))
    adapter = adapter_of_directory(made / name)
    assert adapter.scale == (6.0 if name == "rslora" else 3.0) and len(adapter.modules) == 14
    merged = merge(base, adapter)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made / "base"), made / name
    ).merge_and_unload()
    for key, parameter in theirs.named_parameters():
        assert torch.allclose(merged.read(key), parameter, atol=1e-6), key
    moved = (
        (merged.read("model.layers.0.mlp.up_proj.weight") - base.read("model.layers.0.mlp.up_proj.weight")).abs().max()
    )
    assert moved > 0.01 and torch.equal(merged.read("model.norm.weight"), base.read("model.norm.weight"))
    write_adapter(tmp_path, adapter, "org/base", lambda _, tensor: tensor)
    again = adapter_of_directory(tmp_path)
    assert again.settings["base_model_name_or_path"] == "org/base" and again.scale == adapter.scale
    assert again.weights.shapes == adapter.weights.shapes
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "base"), tmp_path)


def test_what_is_not_plain_lora_is_refused(made, tmp_path) -> None:
    adapter = adapter_of_directory(made / "plain")
    write_adapter(tmp_path, adapter, "base", lambda _, tensor: tensor)
    settings = json.loads((tmp_path / CONFIG).read_text())
    for change, sentence in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern=.* is not supported"),
        ({"peft_type": "IA3"}, "is not the configuration of a LoRA adapter"),
        ({"r": 8}, r"the shapes \(4, .*, which do not fit r=8"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=sentence):
            adapter_of_directory(tmp_path)
    other = Weights({"model.layers.0.mlp.up_proj.weight": (3, 3)}, lambda name: torch.zeros(3, 3))
    with pytest.raises(UserError, match="but the base (does not have it|has it with); name|does not have it"):
        merge(other, adapter)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is missing or damaged"):
        adapter_of_directory(tmp_path)
