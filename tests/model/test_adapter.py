"""An adapter merges to what peft computes, and peft reads what is written."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from configs.config import LoRA
from model.language_model import build_on_meta
from model.lora import PREFIX, Adapter, merge, write_adapter
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
    write_adapter(tmp_path, ours, str(base), lambda _, tensor: tensor)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).merge_and_unload()
    for key, parameter in again.named_parameters():
        assert torch.allclose(merged.read(key), expected[key], atol=1e-6), key
        assert torch.equal(parameter, expected[key]), key
    name = "model.layers.0.mlp.up_proj.weight"
    assert (merged.read(name) - before.read(name)).abs().max() > 0.01
    assert torch.equal(merged.read("model.norm.weight"), before.read("model.norm.weight"))
