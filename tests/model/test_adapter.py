"""An adapter merges to what peft computes, peft reads what is written, and our own loader refuses it on other weights."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from configs.config import LoRA
from eval.generate import load_for_generation
from model import lora
from model.fingerprint import fingerprint_of_base
from model.language_model import build_on_meta
from model.lora import PREFIX, Adapter, base_of_adapter, merge, write_adapter
from model.weights import Weights, weights_of_directory
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("adapter") / "base")


def test_merged_weights_are_those_of_peft(base, tmp_path) -> None:
    settings = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(1)
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in get_peft_model_state_dict(theirs).items()}
    ours = Adapter(
        Weights({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__),
        LoRA(rank=4, alpha=12.0),
    )
    before = weights_of_directory(base, build_on_meta(AutoConfig.from_pretrained(base)))
    merged = merge(before, ours)
    assert len(ours.modules) == 14
    expected = dict(theirs.merge_and_unload().named_parameters())
    write_adapter(tmp_path, ours, base, str(base), lambda _, tensor: tensor)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).merge_and_unload()
    for key, parameter in again.named_parameters():
        assert torch.allclose(merged.read(key), expected[key], atol=1e-6), key
        assert torch.equal(parameter, expected[key]), key
    name = "model.layers.0.mlp.up_proj.weight"
    assert (merged.read(name) - before.read(name)).abs().max() > 0.01
    assert torch.equal(merged.read("model.norm.weight"), before.read("model.norm.weight"))
    loaded = load_for_generation(str(tmp_path), torch.float32, torch.device("cpu"))
    ids = torch.arange(10)[None]
    assert torch.allclose(loaded(input_ids=ids).logits, again(input_ids=ids).logits, atol=1e-4)


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
