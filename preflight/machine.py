"""The machine under a run: ranks that agree, clocks, free memory, disk, and how fast the ranks add up a gradient."""

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError
from configs.config import Config, as_dict
from distributed.agreement import check_agreement, library_versions
from distributed.disks import check_room_for_run, torchrun_grace
from distributed.host_memory import free_bytes
from distributed.process_group import Ranks, barrier, gather_objects
from distributed.rank_names import host_name
from preflight.context import Context
from preflight.judge import Measured
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from training.start import source_digest

GROUP = "machine"
CLOCKS_APART = 5.0  # seconds; TensorBoard orders the files of a run by their time
BUSY = 2**30  # bytes of a GPU that others hold, above which a line says so
GRADIENT = 64 * 2**20  # bytes that are added up over the ranks
REDUCTIONS = 5
SMI = ("nvidia-smi", "--format=csv,noheader,nounits")


def agreement(config: Config, script: Path, ranks: Ranks) -> Result:
    """Whether all ranks have the same config, train.py, code and libraries. A collective."""
    name = "ranks agree"
    if ranks.world_size == 1:
        return Result(GROUP, name, SKIPPED, "there is one rank")
    try:
        own_script = hashlib.sha256(script.read_bytes()).hexdigest()
        values = {
            "the config": as_dict(config),
            script.name: own_script,
            "the code": source_digest(),
            "versions": library_versions(),
            "the device type": "cuda" if torch.cuda.is_available() else "cpu",
        }
        check_agreement(values, ranks)
    except UserError as error:
        return Result(GROUP, name, FAILS, str(error))
    what = "config, code, versions and device type; the runs compare data, plan and weights"
    return Result(GROUP, name, OK, f"all {ranks.world_size} ranks: {what}")


def clocks(ranks: Ranks) -> Result:
    """How far the clocks of the nodes are apart. A collective."""
    barrier(ranks)
    times = gather_objects((host_name(), time.time()), ranks)
    hosts = {host for host, _ in times}
    apart = max(now for _, now in times) - min(now for _, now in times)
    if len(hosts) == 1:
        return Result(GROUP, "clocks", SKIPPED, "there is one node")
    status = OK if apart < CLOCKS_APART else WARNING
    text = f"the clocks of {len(hosts)} nodes are {apart:.2f} s apart at most"
    text += "" if status == OK else "; synchronise them (chrony, ntpd): logs of the nodes will not match"
    return Result(GROUP, "clocks", status, text, {"seconds": apart})


def free_memory(ranks: Ranks) -> list[Result]:
    """Free memory of the hosts, and of the GPUs before this check takes any. A collective."""
    mine = None
    if ranks.local_rank == 0:
        mine = (host_name(), free_bytes(torch.device("cpu"), 1), gpus())
    nodes = [node for node in gather_objects(mine, ranks) if node]
    host, smallest, _ = min(nodes, key=lambda node: node[1])
    where = f" on host {host}" if len(nodes) > 1 else ""
    figures = {host: free for host, free, _ in nodes}
    results = [Result(GROUP, "host memory", OK, f"{smallest / 2**30:.1f} GiB free{where}", figures)]
    devices = [(host, *gpu) for host, _, found in nodes for gpu in found]
    if not devices:
        return results
    busy = [gpu for gpu in devices if gpu[3] > BUSY]
    figures = {f"{host} GPU {index}": [total, used] for host, index, total, used, _ in devices}
    if busy:
        host, index, _, used, pids = max(busy, key=lambda gpu: gpu[3])
        by = f" (processes {', '.join(pids)})" if pids else ""
        text = f"{len(busy)} of {len(devices)} GPUs are in use: GPU {index} on host {host} has {used / 2**30:.1f} GiB taken{by}; end what runs there"
        return [*results, Result(GROUP, "GPU memory", WARNING, text, figures)]
    least = min(gpu[2] - gpu[3] for gpu in devices)
    text = f"{len(devices)} GPU{'s' if len(devices) > 1 else ''}, {least / 2**30:.1f} GiB free on the fullest, no other process"
    return [*results, Result(GROUP, "GPU memory", OK, text, figures)]


def gpus() -> list[tuple[str, int, int, list[str]]]:
    """(index, bytes in total, bytes in use, processes) of this node's visible GPUs, from nvidia-smi; [] without it."""
    if not shutil.which(SMI[0]):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = None if visible is None else [name.strip() for name in visible.split(",")]
    found = []
    try:
        processes: dict[str, list[str]] = {}
        for uuid, pid in _query("--query-compute-apps=gpu_uuid,pid"):
            processes.setdefault(uuid, []).append(pid)
        for index, uuid, total, used in _query("--query-gpu=index,uuid,memory.total,memory.used"):
            if chosen is None or index in chosen or any(name and uuid.startswith(name) for name in chosen):
                found.append((index, int(total) * 2**20, int(used) * 2**20, processes.get(uuid, [])))
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return found


def _query(what: str) -> list[list[str]]:
    done = subprocess.run([*SMI, what], capture_output=True, text=True, timeout=20, check=True)
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def all_reduce(context: Context) -> Result:
    """The time in which the ranks add up `GRADIENT` bytes. A collective: by NCCL in children, or by gloo here."""
    ranks, name = context.ranks, "all-reduce"
    if ranks.world_size == 1:
        return Result(GROUP, name, SKIPPED, "there is one rank")
    if torch.cuda.is_available():
        out = context.scratch / "all_reduce.json"
        ended = context.run("all_reduce", ("-m", "preflight.all_reduce", str(out)), ranks.world_size)
        if ended.problem:
            return Result(GROUP, name, FAILS, ended.problem)
        seconds = context.on_first(lambda: json.loads(out.read_text(encoding="utf-8"))["seconds"])
        backend = "NCCL"
    else:
        seconds, backend = max(gather_objects(time_all_reduce(torch.device("cpu"), ranks.flags), ranks)), "gloo"
    nodes = len(set(gather_objects(host_name(), ranks)))
    # A ring sends 2 (n - 1) / n of the bytes from each rank: NCCL's "bus bandwidth"
    # (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
    bandwidth = 2 * (ranks.world_size - 1) / ranks.world_size * GRADIENT / seconds
    where = f"{nodes} nodes" if nodes > 1 else "one node"
    text = f"{GRADIENT / 2**20:.0f} MiB over {ranks.world_size} ranks on {where} in {1000 * seconds:.1f} ms, {bandwidth / 1e9:.2f} GB/s ({backend})"
    return Result(GROUP, name, OK, text, {"seconds": seconds, "bus_bandwidth": bandwidth, "nodes": nodes})


def time_all_reduce(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Seconds of one all-reduce of `GRADIENT` bytes, the fastest of a few. A collective."""
    tensor = torch.ones(GRADIENT // 4, device=device)
    fastest = float("inf")
    for _ in range(REDUCTIONS):
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest


@dataclass(frozen=True)
class Room:
    """Bytes that a run needs on its disk. source: where the figures come from."""

    checkpoint: int
    export: int
    source: str


def disk(config: Config, room: Room | None, ranks: Ranks) -> Result:
    """Whether all checkpoints that the real run keeps, the one being written and the export fit. A collective."""
    if room is None:
        return Result(
            GROUP, "disk", SKIPPED, "the size of a checkpoint is not known, because the three steps have not run"
        )
    directory = Path(config.run.directory, config.run.name)
    figures = {"checkpoint": room.checkpoint, "export": room.export, "keep_last": config.run.keep_last}
    try:
        warnings = check_room_for_run(directory, room.checkpoint, room.export, config.run.keep_last, ranks)
    except UserError as error:
        return Result(GROUP, "disk", FAILS, str(error), figures)
    if warnings:
        text = warnings[0].removeprefix("warning: ")
        return Result(GROUP, "disk", FAILS, f"{text}; free some space or lower run.keep_last", figures)
    needed = (config.run.keep_last + 2) * room.checkpoint + room.export
    text = f"room for {config.run.keep_last + 2} checkpoints and the export, {needed / 2**30:.1f} GiB ({room.source})"
    return Result(GROUP, "disk", OK, text, figures)


def save_in_time(measured: Measured | None) -> Result:
    """Whether a save fits into the time that torchrun leaves a run after a signal."""
    grace = torchrun_grace()
    if measured is None or grace is None:
        why = (
            "the three steps have not run" if grace else "torchrun has not started this, so nothing limits a last save"
        )
        return Result(GROUP, "time to save", SKIPPED, why)
    figures = {"seconds": measured.save_seconds, "grace": grace}
    text = f"a save takes {measured.save_seconds:.1f} s, torchrun leaves {grace:g} s after a signal"
    if 3 * measured.save_seconds <= grace:
        return Result(GROUP, "time to save", OK, text, figures)
    wanted = 10 * round(0.3 * measured.save_seconds + 1.5)
    return Result(GROUP, "time to save", WARNING, f"{text}: start torchrun with --shutdown-timeout={wanted}", figures)
