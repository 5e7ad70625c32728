"""The plan of one setting: the memory, time and disk of a run. Nothing is trained, no weights are read.

model/memory.py computes the memory of the largest micro-batch, scripts/plan/step_time.py the time of the steps.
"""

from collections import Counter
from functools import cached_property
from operator import attrgetter

from common.errors import UserError
from configs.config import KEYS, Config
from configs.load import check_config, check_world
from distributed.checkpoint_directory import ALSO_KEPT
from distributed.optimizer import parameter_dtype
from distributed.sharding import local_shape
from model.memory import (
    Layout,
    ModelShape,
    count_activations,
    ewc_bytes,
    gradient_itemsize,
    largest_rows,
    layout_of,
    moment_bytes,
    optimizer_bytes,
    rows_of_auto,
    step_memory,
    trained_elements,
)
from scripts.plan.machines import Cluster, this_machine
from scripts.plan.step_time import Speed, expected_speed
from scripts.plan.subject import Subject, read_subject
from training.micro_batch import largest_useful, with_rows

MOST_ROWS = 1024  # no larger micro-batch is tried
# A CPU process holds up to so many times its tensors: pages of mapped weights and data, libraries, memory that the
# allocator keeps.
CPU_EXCESS = 2.2


class Plan:
    """The memory, time and disk of one setting.

    `config` has a number in `batch.micro_batch`; `largest_rows` is the largest that fits. `memory` is the fullest rank's
    device memory at the peak of the step with the worst micro-batch, `needed` its lower and upper bound in bytes, which
    differ on a CPU only. `host` is one node's host memory beside its processes, in bytes by use.
    """

    def __init__(self, subject: Subject, config: Config, largest_rows: int = 0) -> None:
        self.subject, self.config, self.largest_rows = subject, config, largest_rows
        self.shape, self.cluster, self.layout = subject.shape, subject.cluster, _layout(config, subject.cluster)
        self.workload = subject.workload_of(config.batch.rows, config.sharding.context)
        worst = self.workload.worst
        self.memory = step_memory(self.shape, config, self.layout, worst.lengths, worst.targets)
        self.needed = self.memory.total, round((1 if self.layout.on_cuda else CPU_EXCESS) * self.memory.total)
        self.host = host_bytes(self)
        self.fits = self.needed[1] <= self.cluster.device.memory
        self.bytes_per_parameter = int(config.optimizer.memory.removesuffix("N"))

    @cached_property
    def speed(self) -> Speed:
        """Return the expected speed, also of a setting that does not fit."""
        workload = self.workload
        return expected_speed(self.shape, self.config, self.cluster, workload.steps, workload.total_steps)

    @property
    def rate(self) -> float:
        """Return the expected tokens per second of one device, in the middle of the range; 0 if the setting does not fit."""
        return self.speed.middle if self.fits else 0.0

    @property
    def gpu_hours(self) -> list[float]:
        """Return the hours of all devices together: the shortest and the longest time."""
        return [self.cluster.devices * hours for hours in self.speed.hours]

    @property
    def disk(self) -> dict[str, int]:
        """Return the bytes of a checkpoint, of the export and of the whole run (distributed/disks.py: check_room_for_run).

        A run keeps `run.keep_last` checkpoints and some more, writes one, and has EWC's anchor and the base's predictions.
        """
        shape, run = self.shape, self.config.run
        checkpoint = _saved_bytes(shape, self.config, 1)
        frozen = shape.num_parameters - shape.num_trained  # adapters are merged into the export
        export = (frozen or shape.num_parameters) * shape.stored_dtype.itemsize
        kept = (run.keep_last + ALSO_KEPT) * checkpoint
        whole_run = kept + max(checkpoint, export) + ewc_bytes(shape, self.config, 1) + self.subject.anchor
        return {"checkpoint": checkpoint, "run": whole_run, "export": export}

    @property
    def overrides(self) -> list[str]:
        """Return the `section.key=value` that turn the user's config into this one."""
        own, base = ({key: attrgetter(key)(config) for key in KEYS} for config in (self.config, self.subject.config))
        return [f"{key}={value}" for key, value in own.items() if value != base[key]]


def _layout(config: Config, cluster: Cluster) -> Layout:
    return layout_of(config, cluster.devices, cluster.per_node, cluster.device.kind)


def host_bytes(plan: Plan) -> dict[str, int]:
    """Return `Plan.host`. On a CPU, memory that counts as the device's does not count again."""
    shape, config, layout, ranks = plan.shape, plan.config, plan.layout, plan.cluster.per_node
    has_ewc = layout.on_cuda and (config.ewc.device == "cpu" or layout.offloads)
    worst = plan.workload.worst.lengths
    activations = count_activations(shape, config.model, config.lora, layout.kind, worst, layout.context)
    return {
        "offload": ranks * _pinned_bytes(shape, config, layout.shards) if layout.offloads else 0,
        "activations": ranks * activations.on_host,
        "ewc": ranks * ewc_bytes(shape, config, layout.shards) if has_ewc else 0,
        "async_save": ranks * _saved_bytes(shape, config, layout.shards) if config.run.async_save else 0,
    }


def _saved_bytes(shape: ModelShape, config: Config, shards: int) -> int:
    """Return the bytes of a rank's trained weights and moments, which a checkpoint holds."""
    memory = config.optimizer.memory
    weights = trained_elements(shape, shards) * parameter_dtype(memory).itemsize
    return weights + moment_bytes(shape, memory, shards)


def _pinned_bytes(shape: ModelShape, config: Config, shards: int) -> int:
    """Return the host memory of one rank under `sharding.cpu_offload`. Weights and gradients are pinned, moments are not.

    torch rounds every pinned tensor up to a power of two (pytorch#150517).
    """
    memory, trained = config.optimizer.memory, Counter(shape.trained)
    frozen = Counter(tensor for unit in shape.units for tensor in unit.shapes) - trained
    total = optimizer_bytes(shape, memory, shards)
    itemsizes = (parameter_dtype(memory).itemsize, gradient_itemsize(memory))
    for tensors, itemsize in ((frozen, shape.frozen_itemsize), *((trained, itemsize) for itemsize in itemsizes)):
        sizes = {tensor: local_shape(tensor, shards).numel() * itemsize for tensor in tensors}
        total += sum(tensors[tensor] << (size - 1).bit_length() for tensor, size in sizes.items() if size)
    return total


def plan_of(config: Config, cluster: Cluster | None = None, rows: int | None = None) -> Plan:
    """Read the data of a config and return its plan, without a search. Raise UserError for mistakes.

    `cluster` is this machine by default. `rows` replaces `batch.micro_batch`, whose `auto` is otherwise what a run takes.
    """
    if cluster is None:
        config, cluster = this_machine(config)
    subject = read_subject(config if rows is None else with_rows(config, rows), cluster)
    return plan_setting(subject, subject.config, as_written=True)


def plan_setting(subject: Subject, config: Config, as_written: bool = False) -> Plan:
    """Return the plan of a setting. A micro-batch that does not fit is replaced by the largest that fits.

    With `as_written` the config's micro-batch stays, and `auto` becomes what a run takes.
    """
    cluster, rows, layout = subject.cluster, config.batch.micro_batch, _layout(config, subject.cluster)
    available = cluster.device.memory / (1 if layout.on_cuda else CPU_EXCESS)
    useful = min(MOST_ROWS, largest_useful(config, cluster.devices))
    at_most = max(useful, rows) if isinstance(rows, int) else useful
    largest = largest_rows(subject.shape, config, layout, lambda memory: memory.total <= available, at_most)
    if not isinstance(rows, int):  # auto
        rows = rows_of_auto(subject.shape, config, layout, cluster.device.memory, useful)
        rows = max(1, rows if as_written else min(rows, largest))
    elif not (as_written or largest >= rows or Plan(subject, config).fits):
        rows = next(iter(accepted_rows(config, range(max(1, largest), 0, -1), cluster)), 1)
    return Plan(subject, with_rows(config, rows), largest)


def accepted_rows(config: Config, rows: range, cluster: Cluster) -> list[int]:
    """Return the micro-batches with which a run starts: without packing, a step must fill all of its micro-batches."""
    return [count for count in rows if config.data.packing or is_accepted(with_rows(config, count), cluster)]


def is_accepted(config: Config, cluster: Cluster) -> bool:
    """Return whether a run with these settings starts on the ranks of the cluster."""
    try:
        check_config(config)
        check_world(config, cluster.devices, cluster.per_node)
    except UserError:
        return False
    return True
