"""The memory that torch allocates in a real step of a small model, whose rows do not divide over the ranks.

<<<<<<< HEAD
The step runs on real tensors as rank 0 of a fake process group. FSDP's allocations are real, and only values are wrong.
=======
The step runs on real tensors as rank 0 of ranks that do not exist: FSDP allocates as always, and only the values are wrong.
>>>>>>> refs/heads/plan
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from configs.config import Config
from data.batches import MicroBatch
from distributed.low_memory import keep_fp32_gradient, new_moments
from distributed.sharding import before_micro_batch, decoder_layers, local, make_mesh, parallelize
from model.build import build_to_train
from tests.losses import loss_of

MICRO_BATCHES = 2


def peak_of_a_step(config: Config, shape: PretrainedConfig, ranks: int, lengths: tuple[int, ...]) -> int:
<<<<<<< HEAD
    """Return the bytes of rank 0 at the peak of two micro-batches, from torch's own record of allocations."""
=======
    """Return rank 0's bytes at the peak of two micro-batches, by torch's own record of allocations."""
>>>>>>> refs/heads/plan
    with absent_ranks(ranks):
        model = build_to_train(config, shape)
        mesh = make_mesh("cpu", ranks, config.sharding)
        layers, extra = decoder_layers(model), model.extra_fsdp_units()
        strategy = parallelize(model, layers, extra, mesh, torch.bfloat16, config.model, config.sharding)
        model.to_empty(device="cpu")
        model.causal_lm.tie_weights()
        for tensor in [*map(local, model.parameters()), *model.buffers()]:
            tensor.fill_(0.1)
        model.unshard()  # FSDP pads uneven shards when a unit is first gathered
        model.reshard()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
<<<<<<< HEAD
        held = [moment for storage in trained for moment in new_moments(storage, config.optimizer.memory).values()]
=======
        held = [moment for parameter in trained for moment in new_moments(parameter, config.optimizer.memory).values()]
>>>>>>> refs/heads/plan
        if config.optimizer.memory == "14N":
            for parameter in trained:
                keep_fp32_gradient(parameter)
                held.append(parameter.grad)
        storages = [local(tensor).untyped_storage() for tensor in [*model.parameters(), *held]]
        batch = micro_batch(lengths)
<<<<<<< HEAD
        gc.collect()  # otherwise garbage of an earlier test may be freed within the record
=======
        gc.collect()  # else garbage of an earlier test may be freed within the record
>>>>>>> refs/heads/plan
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            for number in range(1, MICRO_BATCHES + 1):
                before_micro_batch(model, strategy, number == MICRO_BATCHES)
                (loss_of(model, batch) / sum(lengths)).backward()
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values()) + highest(recorded)


@contextmanager
def absent_ranks(count: int) -> Iterator[None]:
<<<<<<< HEAD
    """Start a process group of `count` ranks, of which only rank 0 exists."""
=======
    """Make this process rank 0 of a process group whose remaining ranks do not exist."""
>>>>>>> refs/heads/plan
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def micro_batch(lengths: tuple[int, ...]) -> MicroBatch:
    ids = torch.arange(sum(lengths)) % 7
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return MicroBatch(ids[None], positions[None], lengths, ends, torch.arange(len(ids)), ids.clone())


def highest(recorded: profile) -> int:
<<<<<<< HEAD
    """Return the highest sum of allocations minus releases since the start of the record."""
=======
    """Return the highest sum of allocations less releases since the start of the record."""
>>>>>>> refs/heads/plan
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
