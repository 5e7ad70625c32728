"""The peak of a step on GPUs against the planner. Rank 0 writes a JSON line for each case.

    torchrun --nproc_per_node=N tests/model/memory_cuda_worker.py rows.jsonl

The model has 0.3B parameters and random weights, so that the terms are large beside the workspaces of cuBLAS.
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from transformers import LlamaConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from distributed.gradients import gradient_norm
from distributed.optimizer import adamw, parameter_dtype
from distributed.process_group import Ranks, gather_objects, process_group
from distributed.sharding import before_micro_batch, decoder_layers, local, make_mesh, parallelize
from model.language_model import build_on_meta, parameter_names
from model.memory import layout_of, shape_of, step_memory
from tests.losses import loss_of
from tests.model.real_step import micro_batch

SHAPE = LlamaConfig(
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=32000,
    tie_word_embeddings=False,
)
LENGTHS = (2048, 1024, 700, 324)
CASES = (("none", "16N"), ("selective", "12N"), ("full", "8N"), ("offload", "16N"))
STRATEGIES = ("full", "grad_op", "none")  # of several ranks; one rank runs the first


def measured(config: Config, ranks: Ranks) -> int:
    """max_memory_allocated of the second step, which has two micro-batches."""
    model = build_on_meta(SHAPE).to(parameter_dtype(config.optimizer.memory))
    mesh = make_mesh("cuda", ranks.world_size, ranks.world_size, config.sharding)
    units = model.extra_fsdp_units()
    layers = decoder_layers(model)
    strategy = parallelize(model, layers, units, mesh, torch.bfloat16, config.model, config.sharding)
    model.to_empty(device=ranks.device)
    model.causal_lm.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            local(tensor).fill_(0.02)
    parameters = parameter_names(model)
    optimizer = adamw(parameters, config.optimizer, seed=0)
    batch = micro_batch(LENGTHS).to(ranks.device)
    for step in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for is_last in (False, True):
            before_micro_batch(model, strategy, is_last)
            loss_of(model, batch).backward()
        gradient_norm(parameters.values())
        for group in optimizer.param_groups:
            group["noise_step"] = step
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return max(gather_objects(torch.cuda.max_memory_allocated(), ranks))


with process_group(5.0) as ranks:
    shape, card = shape_of(build_on_meta(SHAPE), SHAPE), torch.cuda.get_device_name()
    base = Config(Model("0.3B"), Data(("a",)), Batch(global_examples=8), Optimizer(1e-5), Run("r"))
    rows = []
    for strategy in STRATEGIES if ranks.world_size > 1 else STRATEGIES[:1]:
        for checkpointing, memory in CASES:
            config = dataclasses.replace(
                base,
                model=Model("0.3B", activation_checkpointing=checkpointing),
                optimizer=Optimizer(1e-5, memory=memory),
                sharding=Sharding(strategy=strategy),
            )
            layout = layout_of(config, ranks.world_size, ranks.world_size, "cuda")
            expected = step_memory(shape, config, layout, LENGTHS, sum(LENGTHS))
            row = {"card": card, "ranks": ranks.world_size, "strategy": strategy, "memory": memory}
            row |= {"checkpointing": checkpointing, "planned": expected.tensors, "measured": measured(config, ranks)}
            rows.append(row | {"terms": vars(expected), "torch": torch.__version__})
            gc.collect()  # FSDP's states refer to each other
            torch.cuda.empty_cache()
    if ranks.rank == 0:
        Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
