"""Bytes of real sharded models: parameters, gradients, optimizer, EWC's anchor, checkpoint, and the peak of a step.

    torchrun --nproc_per_node=N tests/planner/memory_worker.py cases.json result.json

cases.json is a list of cases: a model and the settings that its memory depends on. Rank 0 writes the bytes of each case on
the fullest rank.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from common.dtypes import DTYPES
from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run, Sharding
from distributed.checkpoint import checkpoint_tensors, stored_bytes
from distributed.gradients import gradient_norm, gradient_of
from distributed.optimizer import adamw
from distributed.process_group import Ranks, gather_objects, process_group
from distributed.sharding import before_micro_batch, decoder_layers, local, local_shard, make_mesh, parallelize
from model.architectures import read_model_config
from model.ewc.anchor import Anchor, scaled_to_dtype
from model.ewc.penalty import make_penalty
from model.language_model import load_weights, trained_parameters
from model.lora import build_to_train, init_adapters

MICRO_BATCHES = 2


def batch_of(lengths: list[int]) -> SimpleNamespace:
    tokens = torch.arange(sum(lengths))
    return SimpleNamespace(
        input_ids=tokens[None] % 300,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        document_lengths=tuple(lengths),
        cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        target_positions=tokens,
        target_ids=tokens % 300,
        target_sources=None,
        target_weights=None,
    )


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): local(tensor) for tensor in tensors}.values())


def peak_of(run: torch.profiler.profile) -> int:
    """The highest sum of what the CPU's allocator has given out since the profile started."""
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def config_of(case: dict) -> Config:
    return Config(
        Model(case["model"], compute_dtype=case["compute_dtype"]),
        Data(("-",)),
        Batch(global_examples=1),
        Optimizer(1e-5, memory=case["memory"]),
        Run("r"),
        lora=LoRA(rank=case["rank"]),
    )


def measure(case: dict, ranks: Ranks) -> dict[str, int]:
    memory, sharding = case["memory"], Sharding(strategy=case["strategy"], shard_size=case["shard_size"])
    model = build_to_train(config_of(case), read_model_config(case["model"]))
    mesh = make_mesh("cpu", ranks.world_size, ranks.world_size, sharding)
    settings = Model(case["model"], activation_checkpointing=case["checkpointing"])
    units = model.extra_fsdp_units()
    compute = DTYPES[case["compute_dtype"]]
    strategy = parallelize(model, decoder_layers(model), units, mesh, compute, settings, sharding)
    load_weights(model, case["model"], torch.device("cpu"))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    parameters = trained_parameters(model)
    init_adapters(parameters, 0)
    optimizer = adamw(parameters, Optimizer(1e-5, memory=memory), seed=0)

    def step() -> None:
        for number in range(MICRO_BATCHES):
            before_micro_batch(model, strategy, number == MICRO_BATCHES - 1)
            model(batch_of(case["lengths"])).backward()
        gradient_norm(parameters.values())

    step()
    states = [value for parameter in parameters.values() for value in optimizer.state[parameter].values()]
    found = {
        "parameters": size([*parameters.values(), *frozen]),
        "gradients": size([gradient_of(parameter) for parameter in parameters.values()]),
        "optimizer": size(states),
        "checkpoint": stored_bytes(checkpoint_tensors(parameters, optimizer, ranks)),
    }
    shards = {name: local_shard(parameter)[0].clone() for name, parameter in parameters.items()}
    fisher = {name: torch.zeros_like(shard, dtype=torch.float32) for name, shard in shards.items()}
    for dtype in () if case["rank"] else ("fp32", "bf16"):
        raw = Anchor({n: t.clone() for n, t in fisher.items()}, dict.fromkeys(fisher, 0), shards, {})
        anchor = scaled_to_dtype(raw, DTYPES[dtype], ranks)
        found[f"ewc {dtype}"] = make_penalty(1.0, parameters, anchor).num_bytes()
    if case["peak"]:
        raw = anchor = fisher = shards = None
        optimizer.zero_grad()
        held = found["parameters"] + found["optimizer"]
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            step()
        found["peak"] = held + peak_of(run)
    return found


with process_group(5.0) as ranks:
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        of_ranks = gather_objects(measure(case, ranks), ranks)
        results.append({key: max(one[key] for one in of_ranks) for key in of_ranks[0]})
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
