"""A model that a checkpoint will fill is allocated without reading the base's weights."""

import json
import struct

import pytest
import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import collate
from model.architectures import read_model_config
from model.build import build, first_weights
from model.language_model import build_on_meta, load_weights, materialize, parameter_names
from tests.losses import loss_of
from tests.model.test_equivalence import documents
from tests.processes import ROOT, run_ranks
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")
NAN = b"\xff"  # in every byte


@pytest.fixture
def nan_in_new_memory():
    """Fill memory that torch allocates with NaN, so that what nobody wrote is seen."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def write_model(folder, tied: bool, multiple: int = 100):
    path = write_tiny_model(folder, tied=tied)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"make_vocab_size_divisible_by": multiple}))
    return str(path)


def spoil_data(folder) -> None:
    """Replace the data of the weights by NaN and keep the header."""
    file = folder / "model.safetensors"
    contents = file.read_bytes()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    file.write_bytes(contents[:start] + NAN * (len(contents) - start))


@pytest.mark.parametrize("tied", [True, False])
def test_only_headers_are_read_and_values_may_come_from_elsewhere(tmp_path, tied, nan_in_new_memory) -> None:
    path = write_model(tmp_path / "model", tied)  # 384 rows, padded to 400
    expected = build_on_meta(read_model_config(path))
    load_weights(expected, path, CPU)
    spoil_data(tmp_path / "model")
    model = build_on_meta(read_model_config(path))
    materialize(model, CPU)
    assert (model.embedding.weight is model.head.weight) == tied
    for weight in model.vocabulary_weights():
        assert len(weight) == 400 and weight.unpadded_rows == 384
        assert not weight[384:].any() and weight[:384].isnan().all()  # nobody has written the other rows
    assert not any(buffer.isnan().any() or buffer.is_meta for buffer in model.buffers())
    with torch.no_grad():
        for name, parameter in parameter_names(model).items():
            parameter.copy_(parameter_names(expected)[name])
    batch = collate((0, 1), documents([37, 20]))
    losses = [loss_of(one, batch) for one in (model, expected)]
    assert torch.equal(*losses) and losses[0] > 0


WORKER = """
import sys
sys.path[0] = {root!r}
import torch
from distributed.process_group import start_process_group
from distributed.sharding import local_shard
from model.architectures import read_model_config
from model.language_model import build_on_meta, check_weights, load_weights, materialize, parameter_names
from tests.sharded import shard_model

ranks = start_process_group()
torch.use_deterministic_algorithms(True)
for path in {paths!r}:
    models = [build_on_meta(read_model_config(path)) for _ in range(2)]
    for model in models:
        check_weights(model, path)
        shard_model(model, ranks)
    load_weights(models[0], path, ranks.device)
    materialize(models[1], ranks.device)
    assert models[1].embedding.weight.unpadded_rows == 384
    loaded, empty = (parameter_names(model) for model in models)
    for name in loaded:
        local, _, start = local_shard(loaded[name])
        assert not local.isnan().any(), name
        rows = 384 if name in ("model.embed_tokens.weight", "lm_head.weight") else loaded[name].shape[0]
        mine = max(0, min(len(local), rows - start))
        assert not local[mine:].any()
        assert local_shard(empty[name])[0][:mine].isnan().all(), name
        assert torch.equal(local_shard(empty[name])[0][mine:], local[mine:]), name
"""


@pytest.mark.slow
def test_on_two_ranks(tmp_path) -> None:
    # 400 rows; 1000 rows, all rows of rank 1 being padding
    paths = [write_model(tmp_path / f"model{multiple}", tied=False, multiple=multiple) for multiple in (100, 1000)]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.format(root=str(ROOT), paths=paths))
    done = run_ranks(2, worker)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("is_resumed", [True, False])
def test_what_is_not_read_yet_is_no_number(tmp_path, is_resumed) -> None:
    """The weights of a resume before its checkpoint is read, and those of a head that an edited train.py has added, which it begins."""
    path = write_model(tmp_path / "model", tied=True)
    config = Config(Model(path), Data(("d",), sequence_length=256), Batch(1), Optimizer(1e-3), Run("r"))
    model, _, _ = build(config)
    with torch.device("meta"):
        model.value_head = torch.nn.Linear(64, 1)
    first_weights(model, config, CPU, is_resumed)
    for name, parameter in model.named_parameters():
        is_new = is_resumed or name.startswith("value_head")
        assert bool(parameter.isnan().all()) == bool(parameter.isnan().any()) == is_new, name
