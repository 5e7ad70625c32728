"""The meeting of the ranks of one start in the launcher's store.

`torchrun --max-restarts` gives a restarted run the store of the run that failed, with its keys: a rank would connect to the
address of a dead process (pytorch#135712; seen with torch 2.13), and each node counts restarts for itself. Rank 0 therefore
draws a name for every start, each rank confirms the name with its own token, and all keys of the start are stored under the
name.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from common.errors import PeerLost, UserError
from distributed.rank_names import minutes, name_ranks

CONNECT = 20.0  # seconds, to torchrun's store; torch may retry for twice as long
ASK_AGAIN = 2.0  # seconds; a rank may have read the name of an earlier start


def join(timeout_minutes: float, purpose: str = "start") -> dist.Store:
    """Wait for all ranks of this start, and return a store to which only they write. Every rank must call this.

    Read the environment of torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT). purpose: the
    reason for the meeting, in words. Raise PeerLost after `timeout_minutes`, naming the ranks that have not joined, and
    UserError on every rank if their purposes differ.
    """
    timeout = timedelta(minutes=timeout_minutes)
    end = time.monotonic() + timeout.total_seconds()
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    connect = timeout
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store answers before the ranks are started. If it does not answer now, its launcher has ended.
        connect = min(timeout, timedelta(seconds=CONNECT))
    unreachable = (
        f"rank {os.environ['RANK']} cannot reach the store at {address} within {minutes(connect.total_seconds())}: the launcher "
        "of rank 0's node has ended, or its network cannot be reached; start all nodes again"
    )
    try:
        store, rank, world_size = _connect(address, connect)
    except dist.DistError as error:
        raise PeerLost(unreachable) from error
    try:
        name, tokens = _first(store, world_size, end, purpose) if rank == 0 else _other(store, rank, end, purpose)
    except dist.DistNetworkError as error:
        raise PeerLost(unreachable) from error
    except dist.DistStoreError as error:
        missing = _not_joined(store, world_size)
        raise PeerLost(
            f"{name_ranks(missing)} of {world_size} did not join within {minutes(60 * timeout_minutes)}: look for an error in "
            "the output of their nodes, and start all nodes again"
        ) from error
    purposes = [token.partition(":")[0] for token in (name, *tokens)]  # in the order of the ranks
    different = [peer for peer in range(world_size) if purposes[peer] != purpose]
    if different:
        raise UserError(
            f"rank {rank} has come to the {purpose}, but {name_ranks(different)} to the {purposes[different[0]]}: give all "
            "nodes the same config, model directory and code"
        )
    store.set_timeout(timeout)
    return dist.PrefixStore(f"start/{name}", store)


_CONNECTED: dict[str, tuple[dist.Store, int, int]] = {}


def _connect(address: str, timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return store, rank and world size. A process connects once: without torchrun rank 0 holds the store until it ends."""
    if address not in _CONNECTED:
        _CONNECTED[address] = next(dist.rendezvous("env://", timeout=timeout))
    return _CONNECTED[address]


def _first(store: dist.Store, world_size: int, end: float, purpose: str) -> tuple[str, list[str]]:
    """On rank 0: publish a new name and wait until all ranks have confirmed it.

    Return the name and the tokens of ranks 1 and up.
    """
    name = f"{purpose}:{uuid.uuid4().hex}"
    store.set("name", name)
    keys = [f"{name}/{rank}" for rank in range(1, world_size)]
    if keys:
        store.wait(keys, _until(end))
    tokens = [token.decode() for token in store.multi_get(keys)] if keys else []
    store.set(f"{name}/all", json.dumps(tokens))
    return name, tokens


def _other(store: dist.Store, rank: int, end: float, purpose: str) -> tuple[str, list[str]]:
    """On other ranks: confirm the newest name until rank 0 has read this rank's token. Return as `_first` does."""
    token = f"{purpose}:{uuid.uuid4().hex}"
    while True:
        store.wait(["name"], _until(end))
        name = store.get("name").decode()
        if not (store.check([f"{name}/all"]) and token not in json.loads(store.get(f"{name}/all"))):
            store.set(f"{name}/{rank}", token)
            try:
                store.wait([f"{name}/all"], min(_until(end), timedelta(seconds=ASK_AGAIN)))
            except dist.DistStoreError:
                if time.monotonic() > end:
                    raise
                continue
            tokens = json.loads(store.get(f"{name}/all"))
            if token in tokens:
                return name, tokens
        elif time.monotonic() > end:
            raise dist.DistStoreError("rank 0 has not started again")
        time.sleep(0.2)


def _until(end: float) -> timedelta:
    return timedelta(seconds=max(0.001, end - time.monotonic()))


def _not_joined(store: dist.Store, world_size: int) -> list[int]:
    """Return the ranks that have not confirmed the newest name; rank 0 if it has published none."""
    if not store.check(["name"]):
        return [0]
    name = store.get("name").decode()
    if store.check([f"{name}/all"]):  # the name is from an earlier start: rank 0 has not begun this one
        return [0]
    return [rank for rank in range(1, world_size) if not store.check([f"{name}/{rank}"])]
