"""What the planner expects of a run, beside what the run measures: memory of the fullest rank, and speed.

Both are kept in runs/NAME/plan.json. `train.py CONFIG --dry-run` prints the expectation and ends.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from common.durable_files import write_json
from configs.config import Config
from distributed.host_memory import free_bytes, resident_bytes
from distributed.process_group import Ranks, gather_objects, world_size_from_environment
from model.flops import data_sheet_peak, measured_flops
from planner.cluster import Cluster, cluster_of, cpu_cluster, found_device
from planner.memory import DeviceMemory, device_memory
from planner.shape import shape_of_run
from planner.step_time import Speed, expected_speed
from planner.workload import Workload, planned_workload
from training.inputs import Inputs
from training.meter import Meter
from training.run_log import RunLog

ENOUGH_STEPS = 20  # that are measured before they are compared with the plan
FILE = "plan.json"


@dataclass(frozen=True)
class Expectation:
    """What is expected of a run on its own cluster."""

    cluster: Cluster
    workload: Workload
    memory: DeviceMemory
    speed: Speed
    process_bytes: int = 0  # what a CPU process holds before the model is loaded: code, libraries, data

    @property
    def peak_bytes(self) -> int:
        """Expected peak of the fullest rank: of the device's allocator, or of a CPU process."""
        return self.memory.tensors + self.process_bytes

    def line(self) -> str:
        """The expectation in words, for the start of a run."""
        worst, (low, high), (short, long) = self.workload.worst, self.speed.tokens_per_second, self.speed.hours
        ranks = self.cluster.devices
        return (
            f"plan: peak memory {self.peak_bytes / 2**30:.1f} GiB on the fullest rank, in step {worst.step + 1} "
            f"({worst.tokens:,} tokens in a micro-batch); {low * ranks:,.0f} to {high * ranks:,.0f} tokens/s, "
            f"{_range(short, long)} for all steps (docs/planning.md)"
        )

    def as_json(self) -> dict:
        """What is expected, as plain JSON."""
        return {
            "cluster": dataclasses.asdict(self.cluster),
            "memory_bytes": vars(self.memory) | {"process": self.process_bytes, "peak": self.peak_bytes},
            "worst_micro_batch": {"step": self.workload.worst.step + 1, "tokens": self.workload.worst.tokens},
            "tokens_per_second": [value * self.cluster.devices for value in self.speed.tokens_per_second],
            "hours": list(self.speed.hours),
            "seconds_of_a_step": self.speed.parts,
        }


@dataclass
class Forecast:
    """The expectation of a run, and whether it has been compared. A run goes on without one if it cannot be computed.

    words: the line of the start, with the reason if expectation is None.
    """

    expectation: Expectation | None
    words: str
    is_compared: bool = field(default=False, init=False)

    def compare(self, meter: Meter, memory_gib: float, is_last: bool, log: RunLog, ranks: Ranks) -> None:
        """Planned beside measured, once, after enough steps or the last one. A collective; the same steps on all ranks.

        memory_gib: this rank's peak. The first window of a start is not measured: it holds what happens only once.
        """
        if self.is_compared or meter.measured_steps < (1 if is_last else ENOUGH_STEPS):
            return
        self.is_compared = True
        peak = max(gather_objects(memory_gib, ranks))  # also by ranks without an expectation
        if ranks.rank != 0 or self.expectation is None:
            return
        speed = meter.measured_tokens / meter.measured_seconds
        low, high = (value * ranks.world_size for value in self.expectation.speed.tokens_per_second)
        measured = {"steps": meter.measured_steps, "tokens_per_second": speed, "memory_gib": peak}
        planned = self.expectation.peak_bytes / 2**30
        where = "in" if low <= speed <= high else "outside of"
        log.say(
            f"planned against measured ({meter.measured_steps} steps): peak memory {planned:.1f} and {peak:.1f} GiB "
            f"({planned / peak - 1:+.0%}); {low:,.0f} to {high:,.0f} and {speed:,.0f} tokens/s, {where} the range"
        )
        try:
            write_json(log.path.with_name(FILE), {"planned": self.expectation.as_json(), "measured": measured})
        except OSError as error:
            log.say(f"warning: {FILE} could not be written: {error.strerror or error}")


def make_forecast(
    config: Config, inputs: Inputs, model_config: PretrainedConfig, peak_flops: float, world_size: int
) -> Forecast:
    """The forecast for the devices of this process, which holds no weights yet. peak_flops: FLOP/s of all ranks.

    Each rank computes its own: what a CPU process holds already differs, and nothing is decided by it. A forecast never ends
    a run: whatever goes wrong becomes a warning.
    """
    try:
        expectation = _expectation(config, inputs, model_config, peak_flops, world_size)
        return Forecast(expectation, expectation.line())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Forecast(None, f"warning: no plan of memory and time for this run, which goes on without one ({reason})")


def _expectation(
    config: Config, inputs: Inputs, model_config: PretrainedConfig, peak_flops: float, world_size: int
) -> Expectation:
    shape = shape_of_run(config, model_config)
    cluster = own_cluster(peak_flops, world_size, world_size_from_environment()[1])
    rows, length, kind = config.batch.rows, config.data.sequence_length, cluster.device.kind
    workload = planned_workload(inputs, shape, rows, length, world_size, kind)
    process = 0 if cluster.device.kind == "cuda" else resident_bytes()
    memory = device_memory(shape, config, cluster, workload.worst)
    return Expectation(cluster, workload, memory, expected_speed(shape, config, cluster, workload), process)


def own_cluster(peak_flops: float, world_size: int, local_world: int) -> Cluster:
    """The machines that this process is one rank of. peak_flops: FLOP/s of all ranks."""
    if not torch.cuda.is_available():
        cpu = torch.device("cpu")
        return cpu_cluster(world_size, peak_flops, free_bytes(cpu, 1))
    properties = torch.cuda.get_device_properties(0)
    gpu = found_device(properties.name, properties.total_memory, peak_flops / world_size)
    return cluster_of(world_size, max(1, world_size // local_world), gpu)


def expected_peak(dtype: torch.dtype, world_size: int) -> float:
    """FLOP/s of all ranks before there is a process group: of data sheets, or of one measured product."""
    if not torch.cuda.is_available():  # all processes share the cores
        return measured_flops(torch.device("cpu"), dtype, 1024)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    sheet = data_sheet_peak(torch.cuda.get_device_name(device)) if dtype == torch.bfloat16 else None
    return world_size * (sheet or measured_flops(device, dtype, 8192))


def _range(short: float, long: float) -> str:
    """ "30 min to 2.0 h", or "about 1 min" where both ends round to the same words. Hours."""
    low, high = _hours(short), _hours(long)
    return f"about {low}" if low == high else f"{low} to {high}"


def _hours(hours: float) -> str:
    minutes = hours * 60
    return f"{hours:,.1f} h" if minutes >= 90 else f"{math.ceil(minutes)} min"
