"""Damage in a model directory is found without reading weights, and reported in a sentence that names the file."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from model.architectures import read_model_config
from model.language_model import build_on_meta, check_weights, load_weights
from model.weight_files import hash_weights, stored_tensors
from tests.tiny import write_tiny_model


def sharded(folder):
    """Write a tiny model in several files with an index. Return its directory."""
    write_tiny_model(folder / "whole", tied=False)
    AutoModelForCausalLM.from_pretrained(folder / "whole").save_pretrained(folder / "model", max_shard_size="60KB")
    assert len(list((folder / "model").glob("*.safetensors"))) > 2
    return folder / "model"


NO_INDEX = (b"{", b"[]", b'{"weight_map": {"a": 3}}', b"\xff\xfe")


def refused(path, sentence: str) -> None:
    """Check that `check_weights` and `load_weights` raise the same error, which matches `sentence`."""
    sentences = set()
    for check in (check_weights, lambda model, path: load_weights(model, path, torch.device("cpu"))):
        with pytest.raises(UserError, match=sentence) as error:
            check(build_on_meta(read_model_config(str(path))), str(path))
        sentences.add(str(error.value))
    assert len(sentences) == 1 and "\n" not in sentences.pop()


def test_tensors_are_where_the_headers_say(tmp_path) -> None:
    path = sharded(tmp_path)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    stored = stored_tensors(path)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == "F32" and tensor.shape == tuple(expected[name].shape)
        assert torch.equal(load_file(tensor.file)[name], expected[name])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[:-5], r"is cut off or not a safetensors file \(it has [\d,]+ bytes, and .*not fully covered\); copy"),
        (lambda data: data + b"x", "is cut off or not a safetensors file .* file not fully covered"),
        (lambda data: b"", r"is cut off or not a safetensors file \(it has 0 bytes"),
        (lambda data: b"\x07" + b"\0" * 7 + b'{"a":1}', "is cut off or not a safetensors file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ],
)  # fmt: skip
def test_a_damaged_file(tmp_path, damage, sentence) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(tmp_path, f"{re.escape(str(file))} {sentence}")


def test_files_and_index_that_do_not_agree(tmp_path) -> None:
    path = sharded(tmp_path)
    index, (first, second, *_, last) = path / "model.safetensors.index.json", sorted(path.glob("*.safetensors"))
    contents = json.loads(index.read_text())
    moved = next(name for name, file in contents["weight_map"].items() if file == first.name)
    moved_map = {"weight_map": contents["weight_map"] | {moved: second.name}}
    for text, sentence in (
        (json.dumps(moved_map), f"{second} has no tensor {moved}, which {index} says it has"),
        ('{"weight_map": {}}', "has no tensor model.embed_tokens.weight; the files do not match its config.json"),
        *((text, f"{index} is not a JSON object with a weight_map of tensor names to files") for text in NO_INDEX),
    ):
        index.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(path, re.escape(sentence))
    for outside in ("../model.safetensors", f"x/../../{first.name}", str(first)):
        index.write_text(json.dumps({"weight_map": contents["weight_map"] | {moved: outside}}))
        refused(path, re.escape(f"{index} names {outside}, which is outside of its directory; copy or download"))
    index.write_text(json.dumps(contents))
    last.unlink()
    refused(path, re.escape(f"{last} cannot be read (No such file or directory); copy or download the model again"))
    index.unlink()
    refused(
        path,
        re.escape(
            f"{path} has neither model.safetensors nor model.safetensors.index.json; copy or download the model again, or write one by save_pretrained"
        ),
    )


def test_files_are_checked_before_weights_are_read(tmp_path) -> None:
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
    sentence = "model.norm.weight is stored as .* quantised weights cannot be trained; use the model's"
    refused(tmp_path, f"{re.escape(str(file))}: {sentence}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floats_are_converted(tmp_path, dtype) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    model = build_on_meta(read_model_config(str(tmp_path)))
    load_weights(model, str(tmp_path), torch.device("cpu"))
    assert torch.equal(model.causal_lm.model.norm.weight, tensors["model.norm.weight"].float())


def test_files_of_one_name_are_hashed_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # digests are remembered in artifacts
    weight_map = {}
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        save_file({folder: torch.ones(3)}, tmp_path / folder / "part.safetensors")
        weight_map[folder] = f"{folder}/part.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = hash_weights(tmp_path)
    assert list(before) == ["x/part.safetensors", "y/part.safetensors"]
    save_file({"x": torch.zeros(3)}, tmp_path / "x" / "part.safetensors")
    assert [before[name] == digest for name, digest in hash_weights(tmp_path).items()] == [False, True]
