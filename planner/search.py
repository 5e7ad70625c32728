"""Every way to spread a run over a cluster, which of them fit, and the cheapest that does.

"Cheapest" is defined as follows, because bf16 weights and moments change what is trained, and no other setting here does:

1. The user's own setting, if it fits.
2. Else, of the settings that fit and store at least as many bytes per parameter as the user's, the one with the highest
   expected tokens per second; of those within 1% of it the one that needs the least memory.
3. Else the same of 14N, then of 12N, 8N and 6N: as little precision as possible is given up.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.errors import UserError
from configs.config import Config
from configs.loading.checks import check_world
from planner.cluster import Cluster
from planner.memory import DeviceMemory, HostMemory, device_memory, host_memory, largest_rows
from planner.shape import ModelShape
from planner.step_time import Speed, expected_speed
from planner.workload import Load, Workload
from training.micro_batch import largest_useful, with_rows

STRATEGIES = ("full", "grad_op", "hybrid", "none")
MEMORIES = ("16N", "14N", "12N", "8N", "6N")
# (model.activation_checkpointing, model.checkpoint_every), the least recomputation first
CHECKPOINTING = (("none", 1), ("selective", 1), ("full", 4), ("full", 2), ("full", 1), ("offload", 1))
MOST_ROWS = 1024  # no larger micro-batch is tried
WORTH_IT = 1.05  # a faster setting is proposed if it is at least so many times as fast
AS_FAST = 0.99  # settings at least so many times as fast as another are as fast
WORTH_THE_PRECISION = 1.25  # and one with fewer bytes per parameter only then

Workloads = Callable[[int], Workload]  # batch.micro_batch -> what the ranks compute


@dataclass(frozen=True)
class Setting:
    """One setting and what it needs. speed: None if it does not fit. largest_rows: `batch.micro_batch` that would fit, or 0."""

    config: Config
    memory: DeviceMemory
    host: HostMemory
    fits_device: bool
    fits_host: bool  # True if the host's memory is unknown
    largest_rows: int
    speed: Speed | None

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.fits_device and self.fits_host

    @property
    def tokens_per_second(self) -> float:
        """Expected of one device, in the middle of the range; 0 if it does not fit."""
        return self.speed.middle if self.speed else 0.0

    @property
    def bytes_per_parameter(self) -> int:
        """Of `optimizer.memory`."""
        return int(self.config.optimizer.memory.removesuffix("N"))


@dataclass(frozen=True)
class Found:
    """The result of a search. faster, lighter: further proposals, with the same and with fewer bytes per parameter."""

    own: Setting
    settings: tuple[Setting, ...]  # of all candidates, the user's among them
    cheapest: Setting | None
    faster: Setting | None
    lighter: Setting | None


@dataclass(frozen=True)
class Search:
    """A model on a cluster. `evaluate` and `find` are pure."""

    shape: ModelShape
    cluster: Cluster
    workloads: Workloads

    def evaluate(self, config: Config) -> Setting:
        """What one setting needs, with the micro-batch of the config, or the largest that fits if that is smaller."""
        at_most = min(MOST_ROWS, largest_useful(config, self.cluster.devices))
        rows = config.batch.micro_batch
        largest = largest_rows(self.shape, config, self.cluster, max(at_most, rows if isinstance(rows, int) else 0))
        if not isinstance(rows, int):  # auto
            return self._with_rows(config, max(1, min(largest, at_most)), largest)
        setting = self._with_rows(config, rows, largest)
        if not setting.fits_device and largest < rows:
            return self._with_rows(config, self._smaller_rows(config, max(1, largest)), largest)
        return setting

    def find(self, config: Config) -> Found:
        """Evaluate the user's config and all candidates, and choose."""
        settings = tuple(map(self.evaluate, candidates(config, self.cluster)))
        own = settings[0]
        if isinstance(config.batch.micro_batch, int):  # as the user wrote it, even where only a smaller one fits
            own = self._with_rows(config, config.batch.micro_batch, own.largest_rows)
        best = cheapest(own, settings)
        if best is None:
            return Found(own, settings, None, None, None)
        fitting = [setting for setting in settings if setting.fits]
        if best is not own:
            least = min(own.bytes_per_parameter, best.bytes_per_parameter)
            best = self._fastest(setting for setting in fitting if setting.bytes_per_parameter >= least) or best
        faster = self._fastest([s for s in fitting if s.bytes_per_parameter >= best.bytes_per_parameter])
        if faster and _speed(faster) < WORTH_IT * _speed(best):
            faster = None
        lighter = self._lighter(fitting, best.bytes_per_parameter, WORTH_THE_PRECISION * _speed(faster or best))
        return Found(own, settings, best, faster, lighter)

    def _with_rows(self, config: Config, rows: int, largest: int) -> Setting:
        config, workload = with_rows(config, rows), self.workloads(rows)
        memory = device_memory(self.shape, config, self.cluster, workload.worst)
        host = host_memory(self.shape, config, self.cluster, workload.worst)
        fits_device = memory.total <= self.cluster.device.memory
        fits_host = not self.cluster.host_memory or host.total <= self.cluster.host_memory
        speed = expected_speed(self.shape, config, self.cluster, workload) if fits_device and fits_host else None
        return Setting(config, memory, host, fits_device, fits_host, largest, speed)

    def _lighter(self, settings: list[Setting], below: int, speed: float) -> Setting | None:
        """The fastest with fewer bytes per parameter, of the most bytes with which that reaches `speed`."""
        for size in sorted({s.bytes_per_parameter for s in settings if s.bytes_per_parameter < below}, reverse=True):
            found = self._fastest(s for s in settings if s.bytes_per_parameter == size)
            if found and _speed(found) >= speed:
                return found
        return None

    def _fastest(self, settings: Iterable[Setting]) -> Setting | None:
        """The fastest setting, with the micro-batch at which it is fastest; None of none.

        A larger micro-batch gains the more, the more each one copies and gathers. So one setting of every kind of
        checkpointing and offload is tried with larger ones, and not only those that are fast with the user's.
        """
        of_kind: dict[tuple, Setting] = {}
        for setting in sorted(settings, key=_speed):
            model, sharding = setting.config.model, setting.config.sharding
            of_kind[model.activation_checkpointing, model.checkpoint_every, sharding.cpu_offload] = setting
        return _fastest([self._with_larger_rows(setting) for setting in of_kind.values()])

    def _with_larger_rows(self, setting: Setting) -> Setting:
        """With a larger micro-batch if that is faster: fewer micro-batches gather the parameters less often."""
        at_most = min(setting.largest_rows, largest_useful(setting.config, self.cluster.devices))
        best, rows = setting, setting.config.batch.rows
        while max(step.micro_batches for step in self.workloads(rows).steps) > 1:
            before, rows = rows, self._larger_rows(setting.config, rows, at_most)
            if rows == before:
                break
            larger = self._with_rows(setting.config, rows, setting.largest_rows)
            if larger.fits and larger.tokens_per_second >= WORTH_IT * best.tokens_per_second:
                best = larger
        return best

    def _smaller_rows(self, config: Config, rows: int) -> int:
        """The largest micro-batch up to `rows` that a run accepts; 1 if it accepts none."""
        return next((fewer for fewer in range(rows, 0, -1) if self._is_accepted(config, fewer)), 1)

    def _larger_rows(self, config: Config, rows: int, at_most: int) -> int:
        """Twice as many rows, or the next number that a run accepts, or the last one; `rows` if there is none."""
        more = [larger for larger in range(rows + 1, at_most + 1) if self._is_accepted(config, larger)]
        return next((larger for larger in more if larger >= 2 * rows), more[-1] if more else rows)

    def _is_accepted(self, config: Config, rows: int) -> bool:
        """Whether a run starts with this micro-batch: without packing a step must fill all of them."""
        try:
            check_world(with_rows(config, rows), self.cluster.devices, self.cluster.per_node)
        except UserError:
            return False
        return True


def cheapest(own: Setting, settings: Iterable[Setting]) -> Setting | None:
    """The cheapest setting that fits, as defined above; None if there is none."""
    if own.fits:
        return own
    fitting = [setting for setting in settings if setting.fits]
    kept = [setting for setting in fitting if setting.bytes_per_parameter >= own.bytes_per_parameter]
    if not kept and fitting:
        most = max(setting.bytes_per_parameter for setting in fitting)
        kept = [setting for setting in fitting if setting.bytes_per_parameter == most]
    return _fastest(kept)


def _fastest(settings: list[Setting]) -> Setting | None:
    """Of the settings that are as fast as the fastest, the one that needs the least memory; None of none."""
    enough = AS_FAST * max(map(_speed, settings), default=0.0)
    return min((s for s in settings if _speed(s) >= enough), key=lambda s: s.memory.total, default=None)


def candidates(config: Config, cluster: Cluster) -> list[Config]:
    """The user's config first, then every other combination that differs on this cluster."""
    own = config.sharding
    strategies = [s for s in STRATEGIES if s == own.strategy or _differs(s, cluster)]
    offloads = (False, True) if cluster.device.kind == "cuda" else (own.cpu_offload,)
    checkpointing = [c for c in CHECKPOINTING if c[0] != "offload" or cluster.device.kind == "cuda"]
    found = []
    for strategy in strategies:
        for offload in offloads:
            sharding = dataclasses.replace(
                own,
                strategy=strategy,
                cpu_offload=offload,
                shard_size=own.shard_size if strategy == "hybrid" else None,
                reduce_dtype="fp32" if strategy in ("hybrid", "none") else own.reduce_dtype,
            )
            for memory in MEMORIES:
                optimizer = dataclasses.replace(config.optimizer, memory=memory)
                for mode, every in checkpointing:
                    model = dataclasses.replace(config.model, activation_checkpointing=mode, checkpoint_every=every)
                    found.append(dataclasses.replace(config, model=model, optimizer=optimizer, sharding=sharding))
    return [config, *(other for other in found if other != config)]


def _differs(strategy: str, cluster: Cluster) -> bool:
    """Whether the strategy is not the same as `full` on this cluster."""
    if strategy == "hybrid":
        return cluster.nodes > 1
    return strategy == "full" or cluster.devices > 1


def overrides(config: Config, base: Config) -> list[str]:
    """The `section.key=value` that turn `base` into `config`."""
    return [
        f"{section.name}.{key.name}={value}"
        for section in dataclasses.fields(config)
        for key in dataclasses.fields(getattr(config, section.name))
        if (value := getattr(getattr(config, section.name), key.name)) != getattr(getattr(base, section.name), key.name)
    ]


@dataclass(frozen=True)
class Nearest:
    """If nothing fits. setting: the one that needs least of a device, with the user's bytes per parameter or more.

    devices: how many of them it would fit on; None if 64 times as many are too few. with_more_host: what would fit if the host
    had its memory.
    """

    setting: Setting
    devices: int | None
    with_more_host: Setting | None


def nearest(search: Search, found: Found) -> Nearest:
    """What comes closest to fitting."""
    kept = [s for s in found.settings if s.bytes_per_parameter >= found.own.bytes_per_parameter]
    closest = min(kept, key=lambda setting: (not setting.fits_host, setting.memory.total))
    on_device = [setting for setting in kept if setting.fits_device]
    more_host = min(on_device, key=lambda setting: setting.host.total, default=None)
    cluster, load = search.cluster, search.workloads(closest.config.batch.rows).worst
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        larger = _larger(cluster, factor)
        if _fits_on(search.shape, kept, larger, load):
            return Nearest(closest, larger.devices, more_host)
    return Nearest(closest, None, more_host)


def _fits_on(shape: ModelShape, settings: list[Setting], cluster: Cluster, load: Load) -> bool:
    return any(
        device_memory(shape, setting.config, cluster, load).total <= cluster.device.memory
        and (not cluster.host_memory or host_memory(shape, setting.config, cluster, load).total <= cluster.host_memory)
        for setting in settings
    )


def _larger(cluster: Cluster, factor: int) -> Cluster:
    """So many times as many devices: nodes of up to 8 of them, then more nodes."""
    devices = factor * cluster.devices
    per_node = cluster.per_node if cluster.nodes > 1 or cluster.per_node >= 8 else min(8, devices)
    nodes = -(-devices // per_node)
    return dataclasses.replace(cluster, devices=nodes * per_node, nodes=nodes)


def _speed(setting: Setting) -> float:
    return setting.tokens_per_second
