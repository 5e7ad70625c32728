"""Steps that are both taken and simulated, and what torch allocates in a real one.

The model is small, and its rows do not divide over the ranks. A real step runs on real tensors as rank 0 of ranks that do not
exist: FSDP allocates what it always does, and only values are wrong.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from data.batches import MicroBatch
from distributed.moments import new_moments
from distributed.optimizer import keep_fp32_gradient, parameter_dtype
from distributed.sharding import before_micro_batch, decoder_layers, local, make_mesh, parallelize
from model.language_model import PackedLanguageModel, build_on_meta
from planner.shape import ModelShape, shape_of

LENGTHS = (600, 300, 124)  # tokens of the documents; in the first one attention is computed again in backward
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Case:
    """A step of a small model in bf16."""

    strategy: str = "full"
    checkpointing: str = "none"
    memory: str = "16N"
    tied: bool = False
    layers: int = 4
    cpu_offload: bool = False

    @property
    def shape(self) -> ModelShape:
        return shape_of(
            "small",
            LlamaConfig(
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=self.layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=1001,
                tie_word_embeddings=self.tied,
            ),
        )

    @property
    def config(self) -> Config:
        return Config(
            Model("", activation_checkpointing=self.checkpointing),
            Data(("",)),
            Batch(global_examples=1),
            Optimizer(1e-5, memory=self.memory),
            Run(""),
            Sharding(strategy=self.strategy, cpu_offload=self.cpu_offload),
        )


@contextmanager
def absent_ranks(count: int) -> Iterator[None]:
    """A process group whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def real_step(case: Case, ranks: int) -> dict[str, int]:
    """Bytes of rank 0: shards, moments, gradients, what autograd saves, and the peak by torch's record of allocations."""
    with absent_ranks(ranks):
        model, strategy = _sharded(case, ranks)
        memory = case.config.optimizer.memory
        moments = [moment for p in model.parameters() for moment in new_moments(p, memory).values()]
        if memory == "14N":
            for parameter in model.parameters():
                keep_fp32_gradient(parameter)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        held = _storage_bytes([*model.parameters(), *moments, *gradients])
        batch, saved = _micro_batch(), 0
        gc.collect()  # else what an earlier test has left may be freed within the record
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            for number in range(1, MICRO_BATCHES + 1):
                before_micro_batch(model, strategy, number == MICRO_BATCHES)
                loss, saved = _forward(model, batch)
                (loss / sum(LENGTHS)).backward()
                del loss
        return {
            "parameters": _storage_bytes(list(model.parameters())),
            "optimizer": _storage_bytes(moments),
            "gradients": _storage_bytes([p.grad for p in model.parameters()]),
            "saved": saved,
            "peak": held + _highest(recorded),
        }


def _sharded(case: Case, ranks: int) -> tuple[PackedLanguageModel, str]:
    """The model, with arbitrary weights, and its strategy."""
    model = build_on_meta(case.shape.config).to(parameter_dtype(case.config.optimizer.memory))
    mesh = make_mesh("cpu", ranks, ranks, case.config.sharding)
    layers, extra = decoder_layers(model), model.extra_fsdp_units()
    strategy = parallelize(model, layers, extra, mesh, torch.bfloat16, case.config.model, case.config.sharding)
    model.to_empty(device="cpu")
    model.causal_lm.tie_weights()
    for tensor in [*map(local, model.parameters()), *model.buffers()]:
        tensor.fill_(0.1)
    model.unshard()  # FSDP pads uneven shards when a unit is first gathered
    model.reshard()
    return model, strategy


def _micro_batch() -> MicroBatch:
    ids = torch.arange(sum(LENGTHS)) % 7
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return MicroBatch(ids[None], positions[None], LENGTHS, ends, torch.arange(len(ids)), ids.clone())


def _forward(model: PackedLanguageModel, batch: MicroBatch) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes that autograd has saved except for weights. Checkpointing saves in its own way."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    weights = {p._unsharded_param.untyped_storage()._cdata for g in groups if g for p in g.fsdp_params}
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
    kept.clear()  # the graph refers to it, so it would keep the storages alive during backward
    return loss, saved


def _highest(recorded: profile) -> int:
    """The highest sum of allocations less releases since the start of the record."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
