"""Fingerprints of base models differ exactly if the weights differ."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.fingerprint import fingerprint_of_base
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", tied=False, hidden=128)


def test_path_and_names_of_files_do_not_matter(tmp_path, base) -> None:
    shutil.copytree(base, tmp_path / "copy")
    assert fingerprint_of_base(tmp_path / "copy") == fingerprint_of_base(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    for name in ("files", "renamed"):
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
    index = tmp_path / "renamed" / "model.safetensors.index.json"
    for file in (tmp_path / "renamed").glob("*.safetensors"):
        file.rename(file.with_name(f"other-{file.name}"))
    index.write_text(index.read_text().replace('"model-', '"other-model-'))
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 2
    assert fingerprint_of_base(tmp_path / "renamed") == fingerprint_of_base(tmp_path / "files")


def test_another_model_of_the_same_shapes_differs(tmp_path, base) -> None:
    digests = {fingerprint_of_base(base)}
    tensors = load_file(base / "model.safetensors")

    def changed(name: str, tensor: torch.Tensor) -> str:
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        save_file(tensors | {name: tensor}, folder / "model.safetensors")
        return fingerprint_of_base(folder)

    embedding = tensors["model.embed_tokens.weight"].clone()
    embedding[len(embedding) // 2, 7] += 0.01  # a single element
    digests.add(changed("model.embed_tokens.weight", embedding))
    norm = tensors["model.norm.weight"]
    digests.add(changed("model.norm.weight", norm.half()))
    digests.add(changed("model.norm.weight", norm.half().view(torch.bfloat16)))  # the same bytes
    digests.add(changed("model.norm.weight", norm.reshape(2, -1)))
    digests.add(changed("model.other.weight", norm.clone()))
    assert len(digests) == 6
