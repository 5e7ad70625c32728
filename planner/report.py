"""The plan of a run as data: what planner/table.py prints and `--json` writes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from planner.cluster import Cluster
from planner.memory import Disk, disk, save_seconds
from planner.search import Found, Nearest, Search, Setting, nearest, overrides
from planner.simulate import Simulated, simulate
from planner.subject import Subject
from planner.workload import Workload

GIB = 2**30


@dataclass(frozen=True)
class Report:
    """A run on a cluster. assumed: what was not said on the command line, in words. save_bandwidth: bytes/s of the disk."""

    subject: Subject
    cluster: Cluster
    workload: Workload  # with the user's micro-batch
    found: Found
    nearest: Nearest | None  # if nothing fits
    disk: Disk
    save_bandwidth: float
    save_seconds: float
    assumed: tuple[str, ...] = ()
    simulated: Simulated | None = None


def make_report(
    subject: Subject, cluster: Cluster, save_bandwidth: float, assumed: tuple[str, ...] = (), simulates: bool = False
) -> Report:
    """Search all settings of `subject` on `cluster`."""
    search = Search(subject.shape, cluster, subject.workloads(cluster.devices, cluster.device.kind))
    found = search.find(subject.config)
    own = found.own.config
    workload = search.workloads(own.batch.rows)
    size = disk(subject.shape, own)
    return Report(
        subject,
        cluster,
        workload,
        found,
        None if found.cheapest else nearest(search, found),
        size,
        save_bandwidth,
        save_seconds(size, save_bandwidth),
        assumed,
        simulate(subject.shape, own, cluster, workload.worst) if simulates else None,
    )


def as_json(report: Report) -> dict[str, Any]:
    """Everything in bytes, seconds and hours."""
    found, base = report.found, report.subject.config
    steps = report.workload.steps
    proposals = {name: getattr(found, name) for name in ("cheapest", "faster", "lighter")}
    return {
        "config": dataclasses.asdict(base),
        "model": {
            "name": report.subject.shape.name,
            "parameters": report.subject.shape.num_parameters,
            "trained": report.subject.shape.num_trained,
        },
        "data": report.subject.data,
        "cluster": dataclasses.asdict(report.cluster),
        "assumed": list(report.assumed),
        "workload": {
            "total_steps": report.workload.total_steps,
            "is_exact": report.workload.is_exact,
            "worst": dataclasses.asdict(report.workload.worst),
            "steps": [dataclasses.asdict(step) for step in steps],
        },
        "own": _setting(found.own, report),
        "settings": [_setting(setting, report) for setting in found.settings],
        "proposals": {name: setting and _setting(setting, report) for name, setting in proposals.items()},
        "nearest": report.nearest and _nearest(report.nearest, report),
        "disk": dataclasses.asdict(report.disk),
        "save_seconds": report.save_seconds,
        "simulated": report.simulated and dataclasses.asdict(report.simulated),
    }


def _nearest(found: Nearest, report: Report) -> dict[str, Any]:
    more = found.with_more_host
    return {
        "setting": _setting(found.setting, report),
        "devices": found.devices,
        "with_more_host": more and _setting(more, report),
    }


def _setting(setting: Setting, report: Report) -> dict[str, Any]:
    speed = setting.speed
    return {
        "overrides": overrides(setting.config, report.subject.config),
        "strategy": setting.config.sharding.strategy,
        "cpu_offload": setting.config.sharding.cpu_offload,
        "optimizer_memory": setting.config.optimizer.memory,
        "checkpointing": setting.config.model.activation_checkpointing,
        "checkpoint_every": setting.config.model.checkpoint_every,
        "micro_batch": setting.config.batch.micro_batch,
        "memory": dataclasses.asdict(setting.memory) | {"total": setting.memory.total},
        "host": dataclasses.asdict(setting.host) | {"total": setting.host.total},
        "fits": setting.fits,
        "fits_device": setting.fits_device,
        "fits_host": setting.fits_host,
        "largest_micro_batch": setting.largest_rows,
        "speed": speed and dataclasses.asdict(speed) | {"gpu_hours": [report.cluster.devices * h for h in speed.hours]},
    }
