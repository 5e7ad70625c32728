"""Averaged weights equal their definition, and tensors that cannot be converted are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from model.language_model import build_on_meta
from model.weights import Weights, average, weights_of_directory, write_weights
from tests.tiny import write_tiny_model


def weights_of(vocabulary=("embed",), **tensors) -> Weights:
    tensors = {name: torch.tensor(values) for name, values in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, lambda name: tensors[name], frozenset(vocabulary))


def test_an_average_is_its_definition_in_fp32() -> None:
    base, tuned = weights_of(norm=[1.0, -2.0]), weights_of(norm=[3.0, 2.0])
    assert average(base, tuned, 0.25).read("norm").tolist() == [1.5, -1.0]
    assert average(base, tuned, 0.0).read("norm").tolist() == [1.0, -2.0]
    assert average(base, tuned, 1.0).read("norm").tolist() == [3.0, 2.0]
    assert tuned.read("norm").tolist() == [3.0, 2.0]  # the average does not change its inputs
    coarse = Weights(base.shapes, lambda name: torch.tensor([1.0, 2.0]).bfloat16())
    mixed = average(coarse, Weights(base.shapes, lambda name: torch.tensor([1.0078125, 2.0]).bfloat16()), 0.5)
    assert mixed.read("norm").tolist() == [1.00390625, 2.0]  # bf16 cannot represent the first number


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path) -> None:
    write_weights(tmp_path, weights_of(norm=[70000.0]), torch.bfloat16)
    with pytest.raises(UserError, match="norm has a value of 7e.04, which float16 cannot hold; use --dtype bf16"):
        write_weights(tmp_path, weights_of(norm=[70000.0]), torch.float16)
    with pytest.raises(UserError, match="norm has values that are not finite; export another step"):
        write_weights(tmp_path, weights_of(norm=[float("inf")]), torch.float32)


def test_rewritten_directory_of_several_files_loads(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model", tied=False)
    config = AutoConfig.from_pretrained(path)
    out = tmp_path / "out"
    out.mkdir()
    size = write_weights(out, weights_of_directory(path, build_on_meta(config)), torch.bfloat16, 50_000)
    config.save_pretrained(out)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and index["metadata"]["total_size"] == size
    assert sum(2 * t.numel() for f in files for t in load_file(f).values()) == size
    written, before = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (out, path))
    for name, parameter in before.named_parameters():
        assert torch.equal(written.get_parameter(name), parameter.bfloat16().float()), name
