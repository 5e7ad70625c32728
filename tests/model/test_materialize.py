"""A model that is filled from a checkpoint is allocated without reading the base's weights."""

import json
import struct

import pytest
import torch

from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run
from data.batches import collate
from model.architectures import read_model_config
from model.build import build, first_weights
from model.language_model import build_on_meta, load_weights, materialize, parameter_names
from tests.losses import loss_of
from tests.model.test_equivalence import documents
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")
NAN = b"\xff"  # a float with these bytes is NaN


@pytest.fixture
def nan_in_new_memory():
    """Fill memory that torch allocates with NaN, so that unwritten values are seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def write_model(folder, tied: bool):
    path = write_tiny_model(folder, tied=tied)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"make_vocab_size_divisible_by": 100}))
    return str(path)


def spoil_data(folder) -> None:
    """Replace the data of the weights by NaN and keep the header."""
    file = folder / "model.safetensors"
    contents = file.read_bytes()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    file.write_bytes(contents[:start] + NAN * (len(contents) - start))


@pytest.mark.parametrize("tied", [True, False])
def test_materialize_reads_only_headers(tmp_path, tied, nan_in_new_memory) -> None:
    path = write_model(tmp_path / "model", tied)  # 384 rows, padded to 400
    expected = build_on_meta(read_model_config(path))
    load_weights(expected, path, CPU)
    spoil_data(tmp_path / "model")
    model = build_on_meta(read_model_config(path))
    materialize(model, CPU)
    assert (model.embedding.weight is model.head.weight) == tied
    for weight in model.vocabulary_weights():
        assert len(weight) == 400 and weight.unpadded_rows == 384
        assert not weight[384:].any() and weight[:384].isnan().all()  # only rows of padding have been written
    assert not any(buffer.isnan().any() or buffer.is_meta for buffer in model.buffers())
    with torch.no_grad():
        for name, parameter in parameter_names(model).items():
            parameter.copy_(parameter_names(expected)[name])
    batch = collate((0, 1), documents([37, 20]))
    losses = [loss_of(loaded, batch) for loaded in (model, expected)]
    assert torch.equal(*losses) and losses[0] > 0


@pytest.mark.parametrize("is_resumed", [True, False])
def test_unread_parameters_are_nan(tmp_path, is_resumed) -> None:
    """All weights of a resume before its checkpoint is read, and the weights of a module that an edited train.py has added."""
    path = write_model(tmp_path / "model", tied=True)
    config = Config(Model(path), Data(("d",), sequence_length=256), Batch(1), Optimizer(1e-3), Run("r"))
    model, _, _ = build(config)
    with torch.device("meta"):
        model.value_head = torch.nn.Linear(64, 1)
    first_weights(model, config, CPU, is_resumed)
    for name, parameter in model.named_parameters():
        is_new = is_resumed or name.startswith("value_head")
        assert bool(parameter.isnan().all()) == bool(parameter.isnan().any()) == is_new, name


@pytest.mark.parametrize("is_resumed", [True, False])
def test_adapters_in_frozen_layers_add_nothing(tmp_path, is_resumed, nan_in_new_memory) -> None:
    """The recipe frozen_layers with LoRA: no checkpoint contains the adapters of its frozen layers."""
    path = write_model(tmp_path / "model", tied=True)
    batch, base = collate((0, 1), documents([37, 20])), build_on_meta(read_model_config(path))
    load_weights(base, path, CPU)
    parts = Data(("d",), sequence_length=256), Batch(1), Optimizer(1e-3), Run("r")
    config = Config(Model(path, compute_dtype="fp32"), *parts, lora=LoRA(rank=4))
    model, _, _ = build(config)
    model.causal_lm.base_model.layers[0].requires_grad_(False)
    first_weights(model, config, CPU, is_resumed)
    assert loss_of(model, batch).item() == loss_of(base, batch).item()
