"""Bytes of real sharded models: parameters, gradients, optimizer, EWC's anchor and checkpoint.

    torchrun --nproc_per_node=N tests/model/memory_worker.py cases.json result.json

cases.json is a list of cases: a model and the settings that decide its memory. Rank 0 writes the bytes of the fullest rank for
each case.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run, Sharding
from distributed.checkpoint import Saver
from distributed.gradients import gradient_of
from distributed.optimizer import adamw
from distributed.process_group import Ranks, gather_objects, process_group
from distributed.sharding import before_micro_batch, decoder_layers, local, local_shard, make_mesh, parallelize
from model.architectures import read_model_config
from model.build import build_to_train
from model.dtypes import DTYPES
from model.ewc import Anchor, Penalty, in_dtype
from model.language_model import load_weights, trained_parameters
from model.lora import init_adapters
from tests.losses import loss_of
from tests.model.real_step import micro_batch


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): local(tensor) for tensor in tensors}.values())


def config_of(case: dict) -> Config:
    return Config(
        Model(case["model"]),
        Data(("-",)),
        Batch(global_examples=1),
        Optimizer(1e-5, memory=case["memory"]),
        Run("r"),
        lora=LoRA(rank=case["rank"]),
    )


def measure(case: dict, ranks: Ranks) -> dict[str, int]:
    memory, sharding = case["memory"], Sharding(strategy=case["strategy"], shard_size=case["shard_size"])
    model = build_to_train(config_of(case), read_model_config(case["model"]))
    mesh = make_mesh("cpu", ranks.world_size, sharding)
    settings = Model(case["model"])
    units = model.extra_fsdp_units()
    strategy = parallelize(model, decoder_layers(model), units, mesh, torch.bfloat16, settings, sharding)
    load_weights(model, case["model"], torch.device("cpu"))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    parameters = trained_parameters(model)
    init_adapters(parameters, 0)
    optimizer = adamw(parameters, Optimizer(1e-5, memory=memory), seed=0)

    for is_last in (False, True):
        before_micro_batch(model, strategy, is_last)
        loss_of(model, micro_batch((5, 3))).backward()
    states = [value for parameter in parameters.values() for value in optimizer.state[parameter].values()]
    sizes = {
        "parameters": size([*parameters.values(), *frozen]),
        "gradients": size([gradient_of(parameter) for parameter in parameters.values()]),
        "optimizer": size(states),
        "checkpoint": Saver(Path(), parameters, optimizer, ranks).stored_bytes(),
    }
    shards = {name: local_shard(parameter)[0].clone() for name, parameter in parameters.items()}
    fisher = {name: torch.zeros_like(shard, dtype=torch.float32) for name, shard in shards.items()}
    for dtype in () if case["rank"] else ("fp32", "bf16"):
        raw = Anchor({n: t.clone() for n, t in fisher.items()}, shards, {})
        anchor = in_dtype(raw, DTYPES[dtype], ranks)
        sizes[f"ewc {dtype}"] = Penalty(1.0, parameters, anchor).num_bytes()
    return sizes


with process_group(5.0) as ranks:
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        of_ranks = gather_objects(measure(case, ranks), ranks)
        results.append({key: max(sizes[key] for sizes in of_ranks) for key in of_ranks[0]})
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
