"""One step of our own model, sharding and checkpointing code on fake tensors, at any number of ranks, without a device.

The model is built, checkpointed and sharded by the functions that train.py calls, as rank 0 of a process group that
communicates nothing, and a micro-batch runs forward and backward. Nothing is predicted: whatever FSDP gathers early, or
autograd keeps, is there to be counted (planner/live_bytes.py). Fake tensors of a CPU stand for those of a GPU, because a CPU
build of torch cannot run autograd on fake `cuda` tensors; the kernels of attention are those of the GPU nevertheless.

What it does not see: memory that a kernel takes for itself while it runs (the fp32 sums of flash attention's backward,
workspaces of cuBLAS), fragments, buffers of NCCL, the CUDA context, the optimizer's step, EWC, torch.compile. Under
`sharding.cpu_offload` the copy of a unit's shards to the device is missing, since both are on a CPU here.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore  # its import registers the backend `fake`

from common.dtypes import DTYPES
from configs.config import Config
from data.batches import MicroBatch
from distributed import activation_checkpointing
from distributed.moments import new_moments
from distributed.optimizer import keep_fp32_gradient
from distributed.sharding import before_micro_batch, decoder_layers, make_mesh, parallelize
from model.language_model import PackedLanguageModel
from model.lora import build_to_train
from planner.cluster import Cluster
from planner.live_bytes import LiveBytes
from planner.shape import ModelShape
from planner.workload import Load

SAY_AFTER = 5.0  # seconds without a sign of life


@dataclass(frozen=True)
class Simulated:
    """Bytes on the device of rank 0. peak: highest sum during forward and backward; the others are its parts then.

    gradients: sharded. gathered: whole parameters and the buffers in which they arrive. reduction: whole gradients and the
    buffers in which they are reduced. logits: what the head makes, with its own gradient. activations: all else.
    """

    peak: int
    parameters: int
    gradients: int
    gathered: int
    activations: int
    saved_activations: int  # alive at the end of forward, without what the head has made
    seconds: float  # of the simulation itself
    optimizer: int = 0  # moments and their scales
    reduction: int = 0
    logits: int = 0
    host: int = 0  # of this rank, at that moment: what is offloaded


def simulate(shape: ModelShape, config: Config, cluster: Cluster, load: Load, micro_batches: int = 2) -> Simulated:
    """Run forward and backward of `load` as rank 0 of `cluster.devices` ranks, once for each micro-batch of a step.

    With two micro-batches, the default, the second one finds the gradients of the first, as with gradient accumulation; a
    step of a single one has a lower peak. Raises RuntimeError in a process that already has a process group.
    """
    start = time.monotonic()
    with _fake_ranks(cluster.devices):
        model, strategy = _sharded_model(shape, config, cluster)
        with FakeTensorMode(allow_non_fake_inputs=True):
            live = LiveBytes()
            kept = _materialize(model, config, live)
            if config.sharding.cpu_offload:
                live.ignore("host", *kept)
            else:
                live.ignore("host")
            batch = _batch(load, cluster.device.kind)
            saved = 0
            with live, _attributed(live, model, cluster.device.kind):
                for number in range(1, micro_batches + 1):
                    before_micro_batch(model, strategy, number == micro_batches)
                    loss = model(batch)
                    saved = live.now["activations"]
                    _say(f"forward of micro-batch {number} of {micro_batches}", shape, cluster, start)
                    (loss / max(1, load.targets)).backward()
                    _say(f"backward of micro-batch {number} of {micro_batches}", shape, cluster, start)
    return _result(live, saved, time.monotonic() - start)


@contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    """A default process group of this rank and others that do not exist."""
    if dist.is_initialized():
        raise RuntimeError("a simulation starts a process group of its own, and this process already has one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sharded_model(shape: ModelShape, config: Config, cluster: Cluster) -> tuple[PackedLanguageModel, str]:
    """The model on meta, sharded for the device of `cluster`, and the strategy for `before_micro_batch`."""
    model = build_to_train(config, shape.config)
    mesh = make_mesh("cpu", cluster.per_node, cluster.devices, config.sharding)
    strategy = parallelize(
        model,
        decoder_layers(model, config.model.layer_class),
        model.extra_fsdp_units(),
        mesh,
        DTYPES[config.model.compute_dtype],
        dataclasses.replace(config.model, compile=False),
        config.sharding,
        cluster.device.kind,
    )
    return model, strategy


def _materialize(model: PackedLanguageModel, config: Config, live: LiveBytes) -> dict[str, list[torch.Tensor]]:
    """Give the parameters their (fake) storages, and make moments and lasting gradients. Returns kind -> tensors.

    Outside of `live`: DTensor makes tensors of the whole shape to find out the shape of a result (pytorch#140874).
    """
    model.to_empty(device="cpu")
    model.causal_lm.tie_weights()
    model.train()
    model.unshard()  # pyright: ignore[reportCallIssue]  FSDP pads uneven shards when a unit is first gathered
    model.reshard()  # pyright: ignore[reportCallIssue]
    kept: dict[str, list[torch.Tensor]] = {"parameters": [], "optimizer": [], "gradients": []}
    for parameter in model.parameters():
        kept["parameters"].append(parameter)
        if not parameter.requires_grad:
            continue
        kept["optimizer"] += new_moments(parameter, config.optimizer.memory).values()
        if config.optimizer.memory == "14N":
            keep_fp32_gradient(parameter)
            assert parameter.grad is not None
            kept["gradients"].append(parameter.grad)
    for kind, tensors in kept.items():
        for tensor in tensors:
            live.set_kind(tensor, kind)
    return kept


def _batch(load: Load, kernels: str) -> "_Batch":
    """Documents of the lengths of `load`; ids and positions of fake tensors have no values."""
    ids = torch.zeros(1, load.tokens, dtype=torch.int64)
    targets = torch.zeros(load.targets, dtype=torch.int64)
    ends = torch.zeros(len(load.lengths) + 1, dtype=torch.int32)
    return _Batch(ids, torch.zeros_like(ids), load.lengths, ends, targets, torch.zeros_like(targets), kernels=kernels)


@dataclass(frozen=True)
class _Batch(MicroBatch):
    """A micro-batch that names the kernels of its attention (model.packed_attention.DocumentLengths)."""

    kernels: str | None = None


@contextmanager
def _attributed(live: LiveBytes, model: PackedLanguageModel, kernels: str) -> Iterator[None]:
    """Inside the block FSDP and the head say what they allocate, and offloaded activations leave the device."""
    hooked = set()
    wait, reduce = FSDPParamGroup.wait_for_unshard, FSDPParamGroup.post_backward

    def making(kind: str, function: Callable) -> Callable:
        def inner(*arguments: object, **options: object) -> Any:
            with live.making(kind):
                return function(*arguments, **options)

        return inner

    def wait_for_unshard(group: FSDPParamGroup) -> None:
        with live.making("gathered"):
            wait(group)
        for parameter in group.fsdp_params:
            whole = getattr(parameter, "_unsharded_param", None)
            if whole is not None and whole.requires_grad and parameter not in hooked:  # made when first gathered
                hooked.add(parameter)
                whole.register_post_accumulate_grad_hook(lambda p: live.set_kind(p.grad, "reduction"))

    def post_backward(group: FSDPParamGroup, *unused: object) -> None:
        with live.making("reduction"):
            reduce(group, *unused)
        sharded = [parameter.sharded_param.grad for parameter in group.fsdp_params]
        for gradient in [*sharded, group._partial_reduce_output]:  # hybrid, none: not yet added up over the copies
            if gradient is not None:
                live.set_kind(gradient, "gradients")

    with ExitStack() as patches:
        for name, function in (
            ("unshard", making("gathered", FSDPParamGroup.unshard)),
            ("wait_for_unshard", wait_for_unshard),
            ("post_backward", post_backward),
        ):
            patches.enter_context(patch.object(FSDPParamGroup, name, function))
        patches.enter_context(patch.object(model.head, "forward", making("logits", model.head.forward)))
        if kernels == "cuda":
            for name, function in _host_copies(live).items():
                patches.enter_context(patch.object(activation_checkpointing, name, function))
        yield


def _host_copies(live: LiveBytes) -> dict[str, Callable]:
    """In place of the functions by which activations leave the device: of what is on a CPU they would make no copy."""

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        with live.making("host"):
            return tensor.detach().clone()

    return {"_to_host": to_host, "_to_device": lambda on_host: on_host.clone()}


def _say(what: str, shape: ModelShape, cluster: Cluster, start: float) -> None:
    if (seconds := time.monotonic() - start) > SAY_AFTER:
        line = f"simulation of {shape.name} on {cluster.devices} ranks: {what} after {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)


def _result(live: LiveBytes, saved: int, seconds: float) -> Simulated:
    counted = {kind: size for kind, size in live.peak.items() if kind not in live.ignored}
    parts = {
        kind: counted.get(kind, 0)
        for kind in ("parameters", "gradients", "gathered", "activations", "optimizer", "reduction", "logits")
    }
    host = sum(live.peak.values()) - sum(counted.values())
    return Simulated(sum(counted.values()), **parts, saved_activations=saved, seconds=seconds, host=host)
