"""A damaged model directory is one sentence that names the file, and is found without reading weights."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from model.architectures import read_model_config
from model.language_model import build_on_meta, check_weights, load_weights
from model.weight_files import stored_tensors
from tests.tiny import write_tiny_model


def sharded(folder):
    """A tiny model in several files with an index."""
    write_tiny_model(folder / "whole", tied=False)
    AutoModelForCausalLM.from_pretrained(folder / "whole").save_pretrained(folder / "model", max_shard_size="60KB")
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    return folder / "model"


def refused(path, *parts: str) -> None:
    """Checking and loading end in the same sentence, which contains `parts`."""
    sentences = set()
    for check in (check_weights, lambda model, path: load_weights(model, path, torch.device("cpu"))):
        with pytest.raises(UserError) as error:
            check(build_on_meta(read_model_config(str(path))), str(path))
        sentences.add(str(error.value))
    (sentence,) = sentences
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def test_tensors_are_where_the_headers_say(tmp_path) -> None:
    path = sharded(tmp_path)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = stored_tensors(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == "F32" and tensor.shape == tuple(expected[name].shape)
        assert torch.equal(load_file(tensor.file)[name], expected[name])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda data: data[:-5],
            r"cut off or not a safetensors file \(it has [\d,]+ bytes, and .*not fully covered\); copy",
        ),
        (lambda data: data + b"x", "is cut off or not a safetensors file .* file not fully covered"),
        (lambda data: b"", r"not a safetensors file \(it has 0 bytes"),
        (lambda data: b"\x07" + b"\0" * 7 + b'{"a":1}', "not a safetensors file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "model.safetensors is a pointer of Git LFS"),
    ],
)
def test_a_damaged_file(tmp_path, damage, sentence) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=sentence) as error:
        stored_tensors(tmp_path)
    assert "\n" not in str(error.value)
    refused(tmp_path, str(file))


def test_no_weights_or_a_file_that_only_the_index_has(tmp_path) -> None:
    path = sharded(tmp_path)
    last = sorted(path.glob("*.safetensors"))[-1]
    last.unlink()
    refused(path, f"{last} cannot be read (No such file or directory); copy or download the model again")
    (path / "model.safetensors.index.json").unlink()
    refused(path, f"{path} has neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"weight_map": {"a": 3}}', b"\xff\xfe"])
def test_an_index_that_is_none(tmp_path, text) -> None:
    index = write_tiny_model(tmp_path) / "model.safetensors.index.json"
    index.write_bytes(text)
    refused(tmp_path, f"{index} is not a JSON object with a weight_map of tensor names to files")


def test_an_index_that_is_wrong(tmp_path) -> None:
    path = sharded(tmp_path)
    index = path / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    files = sorted(set(contents["weight_map"].values()))
    moved = next(name for name, file in contents["weight_map"].items() if file == files[0])
    contents["weight_map"][moved] = files[1]
    index.write_text(json.dumps(contents))
    refused(path, f"{path / files[1]} has no tensor {moved}, which {index} says it has")
    index.write_text('{"weight_map": {}}')
    refused(path, "has no tensor model.embed_tokens.weight; the files do not match its config.json")


def test_every_file_is_checked_before_any_weight_is_read(tmp_path) -> None:
    path = sharded(tmp_path)
    last = sorted(path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    model = build_on_meta(read_model_config(str(path)))
    with pytest.raises(UserError, match=re.escape(f"{last} is cut off")):
        load_weights(model, str(path), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(tmp_path, dtype) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, file)
    refused(
        tmp_path, f"{file}: model.norm.weight is stored as ", "quantised weights cannot be trained; use the model's"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floats_are_converted(tmp_path, dtype) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    model = build_on_meta(read_model_config(str(tmp_path)))
    load_weights(model, str(tmp_path), torch.device("cpu"))
    assert torch.equal(model.causal_lm.model.norm.weight, tensors["model.norm.weight"].float())
