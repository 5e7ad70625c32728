"""A cut model computes what the first layers of the whole one compute."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.tokens import load_tokenizer
from model.architectures import read_model_config
from model.language_model import build_on_meta, check_weights
from model.weight_files import stored_tensors
from preflight.layers import cut_model, note
from tests.tiny import FAMILIES, OTHER_FAMILIES, write_tiny_model

IDS = torch.arange(3, 43)[None]


def logits(path, layers: int | None = None) -> torch.Tensor:
    """Of transformers' model; of its first `layers` only, if given."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    if layers is not None:
        model.base_model.layers = model.base_model.layers[:layers]
        model.config.num_hidden_layers = layers
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES | OTHER_FAMILIES)
def test_every_family_is_cut(tmp_path, family) -> None:
    whole = write_tiny_model(tmp_path / "whole", family=family)
    sentence = cut_model(whole, 1, tmp_path / "cut")
    assert sentence == "the first 1 of 2 decoder layers at full width, real weights" == note(tmp_path / "cut")
    config = read_model_config(str(tmp_path / "cut"))
    assert config.num_hidden_layers == 1 and len(getattr(config, "layer_types", None) or [0]) == 1
    check_weights(build_on_meta(config), str(tmp_path / "cut"))
    assert torch.equal(logits(tmp_path / "cut"), logits(whole, 1))
    assert load_tokenizer(str(tmp_path / "cut")).eos_token == "<|im_end|>"


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_files_that_are_needed_are_read(tmp_path, tied) -> None:
    """Sharded weights: the file that has only later layers is read by its header alone, and not copied."""
    whole = write_tiny_model(tmp_path / "whole", tied=tied, layers=4)
    expected = logits(whole, 2)
    tensors = load_file(whole / "model.safetensors")
    late = {name: tensor for name, tensor in tensors.items() if ".layers.3." in name or ".layers.2." in name}
    head = {name: tensor for name, tensor in tensors.items() if name not in late and ".layers." not in name}
    parts = [head, {n: t for n, t in tensors.items() if n not in late | head}, late]
    weight_map = {}
    for number, part in enumerate(parts):
        save_file(part, whole / f"part-{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    cut_model(whole, 2, tmp_path / "cut")
    found = stored_tensors(tmp_path / "cut")
    assert found.keys() == tensors.keys() - late.keys()
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    size = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert size == sum(tensor.size for tensor in found.values())
    assert torch.equal(logits(tmp_path / "cut"), expected)


def test_without_weights_they_are_random_and_this_is_said(tmp_path) -> None:
    whole = write_tiny_model(tmp_path / "whole", layers=3)
    (whole / "model.safetensors").unlink()
    for name in ("cut", "again"):
        assert "random initial weights" in cut_model(whole, 2, tmp_path / name)
    config = read_model_config(str(tmp_path / "cut"))
    check_weights(build_on_meta(config), str(tmp_path / "cut"))
    assert config.num_hidden_layers == 2 and torch.equal(logits(tmp_path / "cut"), logits(tmp_path / "again"))


def test_more_layers_than_there_are_is_the_whole_model(tmp_path) -> None:
    whole = write_tiny_model(tmp_path / "whole")
    assert cut_model(whole, 9, tmp_path / "cut").startswith("the first 2 of 2")
    assert torch.equal(logits(tmp_path / "cut"), logits(whole)) and note(whole) is None
