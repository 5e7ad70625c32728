"""The children of a check: each rank runs `python COMMAND` as its own child, with the rank and the store of its launcher."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from common.child_process import OF_A_LAUNCHER, environment_of_no_rank, last_words, start_child, tied_to_parent
from common.errors import UserError
from distributed.process_group import Ranks, gather_objects, world_size_from_environment

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.02  # seconds between two looks at the children
GRACE = 10.0  # seconds in which the other children may end by themselves and say why, after one has failed


class ChildFailed(Exception):
    """A child failed. The message has its rank and its error."""


def run_children(
    command: tuple[str, ...],
    world_size: int,
    ranks: Ranks,
    folder: Path,
    kill_when: Callable[[], bool] | None = None,
) -> bool:
    """Run `python COMMAND` on the first `world_size` ranks until it ends. A collective. No child is left, whatever happens.

    world_size 0: on rank 0, as without a launcher. folder: a new directory for the output. When `kill_when()` is true, a rank
    sends SIGKILL to its child; when a child fails, the others are killed after GRACE seconds.

    Return whether the children were killed. Raise UserError on all ranks for a mistake of the user, and ChildFailed if a child
    fails.
    """
    ranks.watch.at(f"the check's run '{folder.name}'")
    own_folder, failed, patience = folder / f"rank{ranks.rank}", folder / "failed", GRACE
    own_folder.mkdir(parents=True, exist_ok=True)
    output = own_folder / "output"
    process, killed = None, False
    try:
        if ranks.rank < max(1, world_size):
            process = start_process(list(command), child_environment(world_size, own_folder), output)
        while process and process.poll() is None and patience > 0 and not killed:
            ranks.watch.tick()
            killed = bool(kill_when and kill_when())
            time.sleep(POLL)
            patience -= POLL if failed.exists() else 0
        code = process.poll() if process else None
        if code and not kill_when:
            failed.touch()
    finally:
        if process and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            while process.poll() is None:
                time.sleep(POLL)
    words = last_words(output.read_text(encoding="utf-8", errors="replace")) if process else ""
    ends = gather_objects((killed, code, socket.gethostname(), words), ranks)
    codes = {rank: code for rank, (_, code, *_) in enumerate(ends) if code}
    was_killed = any(end[0] for end in ends)
    if not codes or was_killed:  # ranks that lose a killed one end by themselves, with an error
        return was_killed
    # The cause is a mistake (2), else a failure, else the loss of another rank (3).
    rank = min(codes, key=lambda rank: (codes[rank] != 2, codes[rank] == 3))
    code, (_, _, host, words) = codes[rank], ends[rank]
    if code == 2:
        raise UserError(words)
    where = f"rank {rank} on host {host}: " if ranks.world_size > 1 else ""
    why = " (the kernel sends it when memory runs out)" if -code == signal.SIGKILL else ""
    signalled = f"killed by {signal.Signals(-code).name}{why}; its last line: " if code < 0 else ""
    raise ChildFailed(f"{where}{signalled}{words or f'exit code {code}'}")


def child_environment(world_size: int, folder: Path) -> dict[str, str]:
    """Return the child's environment, as torchrun would set it for `world_size` ranks."""
    environment = environment_of_no_rank()
    # A copy of train.py works from any directory.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    if not world_size or "RANK" not in os.environ:
        return environment
    environment |= {key: os.environ[key] for key in OF_A_LAUNCHER if key in os.environ}
    return environment | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(min(world_size_from_environment()[1], world_size)),
        # The child must not open a store: the launcher, or the parent of rank 0, has one on this port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        # Each child writes its own error (common/errors.py).
        "TORCHELASTIC_ERROR_FILE": str(folder / "errors" / "error.json"),
    }


def start_process(command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen:
    """Start `python COMMAND`, which ends when its parent ends, with all output in one file."""
    with output.open("wb") as file:
        return start_child(tied_to_parent(command), environment, file)
