"""Every rank writes heartbeats, so that the loss of a rank ends the others with an error message, not in a silent wait.

If a rank is killed, stuck or cut off, the other ranks wait inside a collective until it times out. Here every rank writes a
heartbeat into the launcher's store each second. When a collective fails, or when the main thread has made no progress for
`run.timeout_minutes`, the remaining ranks read the heartbeats and name the missing rank.
"""
# torch's stubs do not declare Store.clone.
# pyright: reportAttributeAccessIssue=false

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch.distributed as dist

from common.errors import PeerLost
from distributed.rank_names import minutes, name_ranks, ranks_on_hosts

T = TypeVar("T")
BEAT = 1.0  # seconds between two heartbeats of a rank
# Seconds. Once a collective has failed or timed out, a rank without a heartbeat for this long counts as lost.
SILENCE = 5.0
RESTART = "start the same command again to continue from the last checkpoint"
# Messages of gloo and NCCL for a failure of another rank or of the network. A collective that this rank uses wrongly raises
# another message, and keeps its traceback.
PEER_FAILURES = re.compile(
    r"connection closed by peer|connection reset|broken pipe|connection refused|connection timed out|no route to host"
    r"|network is unreachable|host is down|timed out waiting|application timeout caused pair closure|socket closed"
    r"|connectfullmesh failed|timed out connecting|ncclremoteerror|ncclsystemerror|remote process exited"
    r"|nccl communicator was aborted|watchdog caught collective operation timeout|wait timeout after",
    re.IGNORECASE,
)


class Watch:
    """The position of this rank in the run: the current step and a count of the points that its main thread has passed."""

    def __init__(self) -> None:
        self.place = "the start"
        self.progress = 0  # calls of `tick` and `at`; every rank makes the same calls in the same order
        self.moved = time.monotonic()

    def at(self, place: str) -> None:
        """Set the place that messages name, such as "step 9". No communication; call it on all ranks."""
        self.place = place
        self.tick()

    def tick(self) -> None:
        """Record that the main thread makes progress."""
        self.progress += 1
        self.moved = time.monotonic()


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a rank. `left` is the reason why the rank ended, or None while it runs."""

    host: str
    pid: int
    count: int
    progress: int
    place: str
    left: str | None = None
    follows: bool = False  # the rank ended because it had lost another rank


UNKNOWN = Beat("unknown", 0, 0, 0, "the start")  # for a rank that has not written a heartbeat yet


class Heartbeat:
    """Two threads of a rank: the first writes its heartbeat, the second ends the process if the run stands still.

    They are two, because a store on an unreachable host can block a thread for longer than the timeout. They use neither a
    collective nor the main thread's connection to the store. `leave` ends them.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, watch: Watch, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.watch, self.host = rank, world_size, watch, socket.gethostname()
        self.timeout = timeout_seconds
        self.window = min(SILENCE, timeout_seconds / 4)
        # A connection serves one thread at a time: `_write` has one, and the readers of the heartbeats have another.
        self.store, self.reading_store = store.clone(), store.clone()
        self.count = 0
        self.leaving = False  # set at the end of the run: from here on, the store may close
        self.closed = threading.Event()
        self.speaking = threading.Lock()  # the thread that ends the process holds it forever
        self._write()
        self.threads = [
            threading.Thread(target=target, name=f"heartbeat {target.__name__}", daemon=True)
            for target in (self._beat, self._alarm)
        ]
        for thread in self.threads:
            thread.start()

    def leave(self, reason: str, follows: bool = False) -> None:
        """End the threads and write the last heartbeat, which tells the other ranks why this rank ends."""
        self.closed.set()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(self.window)
        within(self.window, lambda: self._write(reason, follows))

    def lost(self, error: BaseException) -> PeerLost | None:
        """Return an error that names the ranks which caused `error`, or None if this rank caused it itself."""
        if isinstance(error, PeerLost) or not is_peer_failure(error):
            return None
        if not self.speaking.acquire(blocking=False):  # the alarm is ending this process
            threading.Event().wait()
        return PeerLost(self._explain(in_one_line(error)), quiet=not self.claim_line_of_node())

    def _beat(self) -> None:
        """Write heartbeats. End the process if the store is gone."""
        while not self.closed.wait(min(BEAT, self.window / 3)):
            try:
                self._write()
            except (dist.DistError, RuntimeError):
                # A dead host breaks the collectives too, and their errors say more: which rank has left. Wait for them.
                if not self.leaving and not self.closed.wait(self.window):
                    self._end(self._store_gone())
                return

    def _alarm(self) -> None:
        """End the process if the main thread has made no progress for the timeout."""
        while not self.closed.wait(min(BEAT, self.window / 4)):
            progress = self.watch.progress
            if time.monotonic() - self.watch.moved > self.timeout - self.window:
                sentence = self._explain(f"no progress for {minutes(self.timeout)}")
                if progress == self.watch.progress and not self.closed.is_set():
                    self._end(sentence)

    def _end(self, sentence: str) -> NoReturn | None:
        if not self.speaking.acquire(blocking=False):  # the main thread has seen the failure and ends the process
            return None
        if self.claim_line_of_node():
            with contextlib.suppress(OSError):  # stderr may be closed, and the process has to end all the same
                print(f"error: {sentence}", file=sys.stderr, flush=True)
        self.leave(sentence, follows=True)
        os._exit(PeerLost.EXIT_CODE)

    def _write(self, left: str | None = None, follows: bool = False) -> None:
        self.count += 1
        beat = Beat(self.host, os.getpid(), self.count, self.watch.progress, self.watch.place, left, follows)
        self.store.set(f"beat/{self.rank}", json.dumps(beat.__dict__))

    def claim_line_of_node(self) -> bool:
        """Return True for the first rank of this host that asks: it prints the error. True also if the store does not answer."""
        return within(self.window, lambda: self.reading_store.add(f"said/{self.host}", 1)) in (1, None)

    def _beats(self) -> list[Beat] | None:
        """Return the last heartbeat of every rank, or None if the store does not answer."""
        keys, store = [f"beat/{rank}" for rank in range(self.world_size)], self.reading_store

        def read() -> list[Beat]:
            # Usually a single request: hundreds of ranks read at the same time, and one thread of the store answers them all.
            known = keys if store.check(keys) else [key for key in keys if store.check([key])]
            values = dict(zip(known, store.multi_get(known), strict=True))
            return [Beat(**json.loads(values[key])) if key in values else UNKNOWN for key in keys]

        return within(self.window, read)

    def _explain(self, reason: str) -> str:
        """Watch the heartbeats for at most `window` seconds. Return a sentence that names lost and waiting ranks."""
        before = now = self._beats()
        end = time.monotonic() + self.window
        while before and now:
            quiet = {r for r, beat in enumerate(now) if not beat.left and beat.count == before[r].count} - {self.rank}
            if time.monotonic() > end or not quiet:
                return f"{self.watch.place}: {missing_ranks(now, quiet, reason)}; {RESTART}"
            time.sleep(self.window / 10)
            now = self._beats()
        return self._store_gone()

    def _store_gone(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return (
            f"{self.watch.place}: rank {self.rank} on host {self.host} has lost the store at {address}: the launcher of "
            f"rank 0's node has ended, or the network to it is cut; {RESTART}"
        )


def missing_ranks(beats: list[Beat], quiet: set[int], reason: str) -> str:
    """Return a clause that names the ranks which ended or are `quiet` (without a heartbeat), else the ranks that are behind."""

    def named(ranks: set[int]) -> str:
        pids = f" (pid {', '.join(str(beats[rank].pid) for rank in sorted(ranks))})" if len(ranks) <= 4 else ""
        return ranks_on_hosts({rank: beats[rank].host for rank in ranks}) + pids

    ended = {rank for rank, beat in enumerate(beats) if beat.left and not beat.follows}
    waiting = {rank for rank, beat in enumerate(beats) if not beat.left} - quiet
    clauses = [f"{named(ended)} ended ({beats[min(ended)].left})"] if ended else []
    if quiet:
        place = beats[min(quiet)].place
        clauses.append(f"lost {named(quiet)}, last heard of at {place} (killed, crashed, stopped or cut off)")
    if not clauses:
        front = max(beat.progress for beat in beats)
        behind = {rank for rank, beat in enumerate(beats) if not beat.left and beat.progress < front}
        if not behind:
            return f"{reason}, though no rank is lost or behind (the job may have been suspended)"
        waiting -= behind
        clauses.append(f"{reason}: {named(behind)} is behind, at {beats[min(behind)].place}")
    return "; ".join(clauses) + (f"; {name_ranks(waiting)} waited" if waiting else "")


def is_peer_failure(error: BaseException | None) -> bool:
    """Return whether `error`, or one of its causes, is a collective that failed because of another rank or the network."""
    while error is not None:
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            return True
        if isinstance(error, RuntimeError) and PEER_FAILURES.search(str(error)):
            return True
        error = error.__cause__
    return False


def in_one_line(error: BaseException) -> str:
    """Return the error's type and message without line breaks, at most 300 characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def within(seconds: float, call: Callable[[], T]) -> T | None:
    """Return the result of `call()`, or None if it fails or takes longer. A call that blocks is left to a daemon thread."""
    results: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            results.append(call())

    thread = threading.Thread(target=run, name="heartbeat question", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
