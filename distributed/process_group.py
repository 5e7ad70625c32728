"""The process group, under torchrun or in a single process, and collectives between the ranks that do not wait for a device.

Two nodes may have different files, another config or other libraries. Such a run would train on silently, or hang where one
rank takes a step that another does not have. So the ranks compare everything before the first step (`check_agreement`).
"""

import functools
import importlib.metadata
import json
import os
import platform
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from common.errors import UserError
from distributed.device import choose_device, device_name, devices_line
from distributed.rank_names import ranks_on_hosts
from distributed.rendezvous import join
from distributed.watch import Heartbeat, Watch, in_one_line

T = TypeVar("T")
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP comes when the terminal is closed
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
MISSING = "nothing"
WIDTH = 48  # characters of a value in a message
SHOWN = 4  # items, and groups of ranks, in a message
FILES = 2**16  # that a process may open: gloo has a socket to every other rank, in each group


@dataclass(frozen=True)
class Ranks:
    """This process's place among all ranks.

    flags: a gloo group, whose collectives never wait for the GPU. watch: the place in the program that this rank has reached.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    flags: dist.ProcessGroup
    watch: Watch = field(default_factory=Watch)


def world_size_from_environment() -> tuple[int, int]:
    """Return (ranks in total, ranks on this node) as torchrun sets them; (1, 1) for plain python. Needs no process group.

    Raise UserError if a launcher has set invalid or incomplete values.
    """
    if "RANK" not in os.environ:
        return 1, 1
    # Some launchers do not set the local ones.
    defaults = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ""}
    variables = {name: os.environ.get(name, default) for name, default in defaults.items()}
    with suppress(ValueError):
        rank, world, local_rank, local_world = (int(variables[name]) for name in list(defaults)[:4])
        if 0 <= rank < world and local_rank >= 0 and local_world > 0 and variables["MASTER_ADDR"]:
            return world, local_world
    values = ", ".join(f"{name} is {value or 'not set'}" for name, value in variables.items())
    raise UserError(f"the environment of the launcher is not complete: {values}; start with torchrun, or unset RANK")


@contextmanager
def process_group(timeout_minutes: float = 30.0, device: torch.device | None = None) -> Iterator[Ranks]:
    """Join torchrun's processes, or start a group of one, and destroy the group at the end. A collective, at both ends.

    device: of this rank; None chooses its GPU, or the CPU. timeout_minutes: the limit for the start, for every collective, and
    for the time that the main thread may spend without `ranks.watch.at` or `StopSignal.agreed`. If another rank ends first, hangs
    or cannot be reached, raise PeerLost or end the process with its exit code and sentence. Raise UserError if the node has too
    few GPUs.
    """
    watch, heartbeat = Watch(), None
    device = device or _device()
    store = join(timeout_minutes) if "RANK" in os.environ else None
    failed = True
    try:
        if store:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            heartbeat = Heartbeat(store, rank, world_size, watch, 60 * timeout_minutes)
        ranks = _start(device, store, timeout_minutes, watch)
        yield ranks
        if heartbeat:
            heartbeat.leaving = True
        barrier(ranks)
        failed = False
    except BaseException as error:
        failed = store is not None or not isinstance(error, UserError)  # alone, NCCL can end, or would warn at exit
        lost = heartbeat.lost(error) if heartbeat else None
        if heartbeat:
            if isinstance(error, UserError | OSError) and os.environ.get("LOCAL_RANK", "0") == "0":
                heartbeat.claim_line_of_node()  # `run_script` prints one line; the other ranks of this node print none
            heartbeat.leave(str(lost) if lost else in_one_line(error), follows=lost is not None)
        if lost:
            raise lost from error
        raise
    finally:
        if heartbeat and not failed:
            heartbeat.leave("it had finished")
        # NCCL's shutdown may wait for the rank that is lost; the process ends anyway.
        if dist.is_initialized() and (device.type == "cpu" or not failed):
            dist.destroy_process_group()


def start_process_group(timeout_minutes: float = 30.0) -> Ranks:
    """Start a group as `process_group` does, for a short script: the caller destroys it, and no heartbeat names a lost rank."""
    device = _device()
    return _start(device, join(timeout_minutes) if "RANK" in os.environ else None, timeout_minutes, Watch())


def _device() -> torch.device:
    return choose_device(int(os.environ.get("LOCAL_RANK", 0)), world_size_from_environment()[1])


def _start(device: torch.device, store: dist.Store | None, timeout_minutes: float, watch: Watch) -> Ranks:
    """Start the group of all ranks: NCCL and gloo on GPUs, gloo alone on the CPU. `store` is None in a group of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES:  # often 1,024, which 512 ranks need in two groups; below 0: no limit
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard) if hard >= 0 else FILES, hard))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    rank, world_size = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if store else (0, 1)
    dist.init_process_group(
        backend,
        store=store or dist.HashStore(),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        # NCCL connects now, and not in the first collective: a rank that cannot is found before anything is read.
        device_id=device if device.type == "cuda" else None,
    )
    flags = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(flags, dist.ProcessGroup)  # an int on processes outside of the group, and there is none
    return Ranks(rank, world_size, int(os.environ.get("LOCAL_RANK", 0)), device, flags, watch)


def device_line(ranks: Ranks) -> str:
    """Return a line on the devices of all ranks, for the start of a run. Every rank must call this."""
    node = (socket.gethostname(), os.environ.get("GROUP_RANK", "0"))
    return devices_line(gather_objects((node, ranks.device.type, device_name(ranks.device)), ranks))


def agree_any(flag: bool, ranks: Ranks) -> bool:
    """Return whether `flag` is true on any rank. Every rank must call this at the same point, and gets the same answer."""
    return any(gather_objects(flag, ranks))


def read_on_first(read: Callable[[], T], ranks: Ranks) -> T:
    """Call `read()` on rank 0 alone and return its result on every rank. Every rank must call this.

    A UserError of rank 0 is raised on all ranks with its class, an OSError as a UserError. Use it for everything that is read
    from disk: two nodes may see a shared file system at different moments.
    """
    box = [_outcome(read, ranks) if ranks.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, group=ranks.flags)
    value, problem = cast(tuple, box[0])
    if problem is not None:
        raise problem
    return value


def _outcome(call: Callable[[], T], ranks: Ranks) -> tuple[T | None, UserError | None]:
    """Return the result of `call()`, or None and its UserError. An OSError becomes a UserError."""
    try:
        return call(), None
    except UserError as error:
        return None, type(error)(str(error))  # without its traceback
    except OSError as error:
        return None, UserError(f"{error.filename or f'rank {ranks.rank}'}: {error.strerror or error}")


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """Return every rank's `value`, by rank. Every rank must call this. Values are pickled, so they should be small."""
    values: list = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.flags)
    return values


def call_on_all(call: Callable[[], T], ranks: Ranks) -> T:
    """Call `call()` on every rank and return this rank's result. Every rank must call this.

    Raise on all ranks the first UserError of any rank with its class, or its first OSError as a UserError.
    """
    value, problem = _outcome(call, ranks)
    problems = [each for each in gather_objects(problem, ranks) if each is not None]
    if problems:
        raise problems[0]
    return value  # pyright: ignore[reportReturnType]  only an error leaves it None


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks, on the CPU. Every rank must call this."""
    dist.barrier(group=ranks.flags)


# ---- Agreement ----


def check_agreement(values: dict[str, object], ranks: Ranks) -> None:
    """Compare `values`, item -> JSON value, on all ranks. Every rank must call this. It runs on the CPU.

    Pass a digest in place of a large value. A nested dict is compared key by key, under "item.key". Raise the same UserError on
    every rank if any rank differs from rank 0.
    """
    problem = disagreement(gather_objects((socket.gethostname(), flatten(values)), ranks))
    if problem:
        raise UserError(problem)


@functools.cache  # the metadata of a package are long texts, and a start reads them in several places
def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the result of a step."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = MISSING
    return versions


def flatten(values: dict[str, object], prefix: str = "") -> dict[str, str]:
    """Return every value as text, nested dicts by dotted keys: `{"a": {"b": 1}}` -> `{"a.b": "1"}`."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            flat[f"{prefix}{key}"] = text
    return flat


def disagreement(gathered: list[tuple[str, dict[str, str]]]) -> str | None:
    """Return a sentence on all ranks that differ from rank 0; None if all agree. gathered: (host, values) by rank."""
    first_host, expected = gathered[0]
    groups: dict[str, dict[int, str]] = {}  # differences in words -> rank -> host
    for rank, (host, values) in enumerate(gathered):
        pairs = {name: (values.get(name, MISSING), expected.get(name, MISSING)) for name in {**expected, **values}}
        differences = [f"{name} ({_beside(*pair)})" for name, pair in pairs.items() if pair[0] != pair[1]]
        if differences:
            groups.setdefault(_some(differences), {})[rank] = host
    if not groups:
        return None
    verbs = {True: "differs", False: "differ"}
    sentences = [
        f"{ranks_on_hosts(hosts)} {verbs[len(hosts) == 1]} from rank 0 on host {first_host} in {differences}"
        for differences, hosts in groups.items()
    ]
    return f"{_some(sentences, '; ')}; give all ranks the same files, config and versions"


def _beside(value: str, expected: str) -> str:
    """Return "VALUE instead of EXPECTED", for long values only the part that differs."""
    is_long = max(len(value), len(expected)) > WIDTH
    start = max(0, len(os.path.commonprefix([value, expected])) - WIDTH // 2) if is_long else 0
    cut = [
        "..." * (start > 0) + text[start : start + WIDTH] + "..." * (text[start + WIDTH :] != "")
        for text in (value, expected)
    ]
    return " instead of ".join(cut)


def _some(items: Iterable[str], between: str = ", ") -> str:
    first, *rest = items
    shown = [first, *rest[: SHOWN - 1]] + [f"{len(rest) + 1 - SHOWN} more"] * (len(rest) >= SHOWN)
    return between.join(shown)


# ---- Random numbers and signals ----


def random_state(ranks: Ranks) -> dict[str, torch.Tensor]:
    """Return the state of torch's random number generators on this rank's CPU and GPU."""
    state = {f"random.{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"random.cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return state


def set_random_state(state: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Set the generators to a state from `random_state`."""
    if f"random.{ranks.rank}" in state:
        torch.set_rng_state(state[f"random.{ranks.rank}"])
    if f"random.cuda.{ranks.rank}" in state:
        torch.cuda.set_rng_state(state[f"random.cuda.{ranks.rank}"], ranks.device)


class StopSignal:
    """A stop that all ranks agree on: the loop polls `agreed`, and a second signal of STOPS ends the process at once.

    Python runs its signal handlers only in the main thread, and not while that thread waits inside a collective. A thread
    therefore reads the signals' numbers from a socket (`signal.set_wakeup_fd`). Signals within two seconds count as one,
    because a launcher may pass Ctrl-C on.
    """

    SAME_SIGNAL = 2.0  # seconds

    def __init__(self, ranks: Ranks) -> None:
        self.name: str | None = None  # of the signal that this process received
        self.stopped = False  # all ranks have agreed that one has come
        # Two numbers of at least 0 that this rank sends with its polls (training/observe.py), and the received ones by rank.
        self.told = (0.0, 0.0)
        self.told_by_ranks = torch.zeros(ranks.world_size, 2, dtype=torch.float64)
        self.clock = 0.0  # seconds on rank 0's clock at a poll: the same on all ranks; 0 before the second poll
        self.ranks = ranks
        self._poll: dist.Work | None = None
        self._counted = 0
        self._last = 0.0  # time of the last signal that counted
        self._saving = False
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        _end_listener(previous)
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self._remember)
        threading.Thread(target=self._listen, args=(reader, writer), name="stop signal", daemon=True).start()

    def agreed(self) -> bool:
        """Return whether any rank had received a signal by the previous call. Every rank must call this and gets the same
        answer.

        Each call starts a reduction on the CPU and reads the result of the previous one, which has had a whole micro-batch to
        finish. A stop therefore comes one call after the signal. Once true, the answer stays true.
        """
        self.ranks.watch.tick()
        if self._poll:
            self._poll.wait()
            self.stopped = self.stopped or bool(self._polled[-1, 0])
            self.told_by_ranks, self.clock = self._polled[:-1, :-1], self._polled[0, -1].item()
        if not self.stopped:  # alike on all ranks
            self._polled = torch.zeros(self.ranks.world_size + 1, len(self.told) + 1, dtype=torch.float64)
            self._polled[self.ranks.rank] = torch.tensor([*self.told, time.monotonic()], dtype=torch.float64)
            self._polled[-1, 0] = self.name is not None
            self._poll = dist.all_reduce(self._polled, op=dist.ReduceOp.MAX, group=self.ranks.flags, async_op=True)
        return self.stopped

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within this context the second signal only prints that a checkpoint is being saved, and the third ends the process."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _remember(self, number: int, frame: object) -> None:
        """Handle a signal in the main thread, so that the next `agreed` sees it."""
        self.name = self.name or signal.Signals(number).name

    def _listen(self, reader: socket.socket, writer: socket.socket) -> None:
        with reader, writer:
            while number := reader.recv(1)[0]:
                if number in STOPS:
                    self._count(signal.Signals(number))

    def _count(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._counted and (now - self._last < self.SAME_SIGNAL or received == signal.SIGHUP):
            return
        self._counted += 1
        self._last = now
        self.name = self.name or received.name
        if self._counted == 1:
            self._say(f"{received.name}: stopping; a second signal, two seconds later or more, ends at once")
        elif self._counted == 2 and self._saving:
            self._say(f"{received.name}: a checkpoint is being saved; one more signal ends at once, without it")
        else:
            self._say(f"{received.name} again: ended at once; the last complete checkpoint stays")
            os._exit(128 + received)

    def _say(self, text: str) -> None:
        rank = f"rank {self.ranks.rank}: " if self.ranks.world_size > 1 else ""
        with suppress(OSError):  # the reader may be gone, and this thread must live to end the process
            print(f"{rank}{text}", file=sys.stderr, flush=True)


def _end_listener(wakeup_fd: int) -> None:
    """End the thread of the StopSignal that used `wakeup_fd`. Other users of such a descriptor ignore the zero."""
    if wakeup_fd != -1:
        with suppress(OSError):
            os.write(wakeup_fd, b"\0")
