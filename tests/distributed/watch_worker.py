"""A rank of several short runs with planted faults, for test_watch.py.

torchrun --nproc_per_node=N tests/distributed/watch_worker.py "FAULT:TIMEOUT_MINUTES ..."

Each fault has a process group of its own. `kill`, `wait`, `signals` and `launcher` must be the last fault.
"""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch
import torch.distributed as dist

from common.errors import exit_code_of, exit_process
from distributed.process_group import Ranks, StopSignal, check_agreement, process_group

FAULTS = [(name, float(minutes)) for name, _, minutes in (fault.partition(":") for fault in sys.argv[1].split())]
FAULTY = 1  # the rank with the fault, at step 3


class SumGradients(torch.autograd.Function):
    """A collective inside backward, like FSDP's."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        gradient = grads[0].clone()
        dist.all_reduce(gradient)
        return gradient


def go_wrong(fault: str, ranks: Ranks, pids: list[int]) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "error":
        raise ValueError("a row has no\ntokens")
    elif fault == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    elif fault == "wait":  # alive, but never joins the collective
        threading.Event().wait()
    elif fault == "launcher":
        os.kill(int(os.environ["LAUNCHER"]), signal.SIGKILL)
        threading.Event().wait()
    elif fault == "signals":  # the other ranks wait in the collective: two signals end rank 0
        os.kill(pids[0], signal.SIGTERM)
        dist.recv(torch.zeros(1), src=0, group=ranks.flags)


def second_signal(stop: StopSignal) -> None:
    """Send another signal after the first signal has arrived. Runs on rank 0."""
    while stop.name is None:
        time.sleep(0.01)
    stop.SAME_SIGNAL = 0.0
    os.kill(os.getpid(), signal.SIGTERM)


def train(fault: str, timeout_minutes: float) -> None:
    with process_group(timeout_minutes) as ranks:
        pids: list = [None] * ranks.world_size
        dist.all_gather_object(pids, os.getpid(), group=ranks.flags)
        print(f"rank {ranks.rank} has pid {os.getpid()}", flush=True)
        if fault == "disagree":
            rate = 1e-4 if ranks.rank < FAULTY else 2e-5
            data = {"train": "12ab" * 8, "rows": 400 if ranks.rank < 2 else 396}
            check_agreement({"config": {"optimizer": {"learning_rate": rate}}, "data": data}, ranks)
        stop = StopSignal(ranks)
        if fault == "signals" and ranks.rank == 0:
            threading.Thread(target=second_signal, args=(stop,), daemon=True).start()
        weight = torch.ones(4, requires_grad=True)
        for step in range(1, 6):
            ranks.watch.at(f"step {step}")
            stop.agreed()
            if step == 3 and ranks.rank == (0 if fault == "full" else FAULTY):  # rank 0 writes the curves
                go_wrong(fault, ranks, pids)
            SumGradients.apply(weight).sum().backward()


def main() -> None:
    rank, faults = int(os.environ["RANK"]), [fault for fault, _ in FAULTS]
    if "never_joins" in faults and rank == FAULTY:
        exit_process(exit_code_of(lambda: exec("raise UserError('a mistake of one rank')")))
    if "launcher" in faults:  # the last process plays the launcher: it holds the store of the two ranks
        first_store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if rank == 2:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            first_store.set("launcher", f"{store.port} {os.getpid()}")
            threading.Event().wait()
        port, launcher = first_store.get("launcher").decode().split()
        os.environ |= {"MASTER_PORT": port, "LAUNCHER": launcher, "WORLD_SIZE": "2"}
    code = 0
    for fault, timeout_minutes in FAULTS:
        try:
            code = exit_code_of(lambda fault=fault, minutes=timeout_minutes: train(fault, minutes))
        except ValueError:
            traceback.print_exc()
            code = 1
        print(f"{fault}: rank {rank} exits with {code}", flush=True)
    exit_process(code)


if __name__ == "__main__":
    main()
