"""A rank that is lost, stuck or wrong ends every other rank with a sentence. watch_worker.py plants the faults in real processes."""

import json
import os
import platform
import re
import resource
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion

from common.errors import UserError
from distributed.device import choose_device, devices_line
from distributed.process_group import FILES, Ranks, StopSignal, _end_listener, process_group
from distributed.watch import UNKNOWN, Beat, Heartbeat, in_one_line, is_peer_failure, missing_ranks
from tests.processes import run_ranks

WORKER = Path(__file__).with_name("watch_worker.py")
HOST = platform.node()
RESTART = "; start the same command again to continue from the last checkpoint"


def end(faults: str, world_size: int = 2) -> tuple[str, dict[int, int], str]:
    """Run faults of watch_worker.py, the last of which must end it. Return (stdout, rank -> pid, stderr without torch's warnings)."""
    process = run_ranks(world_size, WORKER, faults)
    assert process.returncode, process.stdout + process.stderr
    pids = {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d) has pid (\d+)", process.stdout)}
    return process.stdout, pids, "".join(line for line in process.stderr.splitlines(True) if not line.startswith("["))


@pytest.fixture(scope="module")
def together() -> tuple[str, dict[int, int], str]:
    """Faults after which the ranks can start a new group, then a fault in which a rank waits forever."""
    return end("disagree:1 error:1 wait:0.1", world_size=3)


@pytest.mark.slow
def test_different_inputs_end_every_rank(together) -> None:
    output, _, errors = together
    lines = [line for line in errors.splitlines() if "differs" in line]
    assert lines == [
        f"error: rank 1 on host {HOST} differs from rank 0 on host {HOST} in config.optimizer.learning_rate (2e-05 instead of "
        f"0.0001); rank 2 on host {HOST} differs from rank 0 on host {HOST} in config.optimizer.learning_rate (2e-05 instead of "
        "0.0001), data.rows (396 instead of 400); give all ranks the same files, config and versions"
    ]
    assert output.count("disagree: rank ") == output.count(" exits with 2\n") == 3


@pytest.mark.slow
def test_bug_keeps_traceback_and_is_quoted(together) -> None:
    output, pids, errors = together
    quoted = (
        f"rank 1 on host {HOST} (pid {pids[1]}) ended (ValueError: a row has no tokens); ranks 0, 2 waited{RESTART}\n"
    )
    assert errors.count("ended (ValueError") == 1 and f"error: step 3: {quoted}" in errors
    assert "Traceback" in errors and "ValueError: a row has no\ntokens" in errors
    assert all(f"error: rank {rank} exits with {code}\n" in output for rank, code in enumerate((3, 1, 3)))


@pytest.mark.slow
def test_full_disk_on_rank_0_is_one_sentence() -> None:
    """Rank 0 prints the error. Rank 1 ends because it has lost rank 0, and prints nothing."""
    output, _, errors = end("full:1")
    assert errors == "error: metrics.jsonl: the disk is full; free some space and run the same command again\n"
    assert "full: rank 0 exits with 2\n" in output and "full: rank 1 exits with 3\n" in output


@pytest.mark.slow
def test_stuck_rank_ends_all_within_the_timeout(together) -> None:
    _, _, errors = together
    (line,) = (line for line in errors.splitlines() if "no progress" in line)
    assert re.fullmatch(
        rf"error: step 3: no progress for 6 s, though no rank is lost or behind \(the job may have been suspended\){RESTART}",
        line,
    ), line


@pytest.mark.slow
def test_killed_rank_is_named_once_per_node() -> None:
    output, pids, errors = end("kill:1", 3)
    assert re.fullmatch(
        rf"error: step 3: lost rank 1 on host {HOST} \(pid {pids[1]}\), last heard of at [^:]* "
        rf"\(killed, crashed, stopped or cut off\); ranks 0, 2 waited{RESTART}\n",
        errors,
    ), errors
    assert "rank 0 exits with 3" in output and "rank 2 exits with 3" in output


@pytest.mark.slow
def test_second_signal_ends_a_waiting_rank() -> None:
    output, pids, errors = end("signals:1")
    assert "rank 0: SIGTERM: stopping; a second signal, two seconds later or more, ends at once\n" in errors
    assert "rank 0: SIGTERM again: ended at once; the last complete checkpoint stays\n" in errors
    assert f"step 3: lost rank 0 on host {HOST} (pid {pids[0]})" in errors
    assert "rank 0 exits" not in output and "rank 1 exits with 3" in output


@pytest.mark.slow
def test_a_rank_that_never_joins_is_named() -> None:
    output, _, errors = end("never_joins:0.1", 3)
    sentence = "error: rank 1 of 3 did not join within 6 s: look for an error in the output of their nodes, and start all nodes"
    assert errors.count(sentence) == 2 and "rank 0 exits with 3" in output and "rank 2 exits with 3" in output


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_end_themselves() -> None:
    _, _, errors = end("launcher:1", 3)
    for rank in range(2):
        assert f"error: step 3: rank {rank} on host {HOST} has lost the store at " in errors, errors
    assert "the launcher of rank 0's node has ended, or the network to it is cut" in errors


def give_signals_back() -> None:
    """End the thread of a StopSignal, and restore Python's signal handlers."""
    _end_listener(signal.set_wakeup_fd(-1))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_failures_of_another_rank_are_told_from_bugs() -> None:
    pair = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
    assert is_peer_failure(RuntimeError(pair + "Connection closed by peer [127.0.0.1]:2469."))
    assert is_peer_failure(RuntimeError("Timed out waiting 3000ms for recv operation to complete"))
    assert is_peer_failure(RuntimeError("Application timeout caused pair closure"))
    assert is_peer_failure(
        dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error")
    )
    assert is_peer_failure(dist.DistNetworkError("Broken pipe"))
    wrapped = ValueError("while saving")
    wrapped.__cause__ = RuntimeError(pair + "Connection reset by peer")
    assert is_peer_failure(wrapped)
    assert not is_peer_failure(RuntimeError(pair + "op.preamble.length <= op.nbytes. 8 vs 4"))
    assert not is_peer_failure(dist.DistBackendError("ncclInvalidUsage: Duplicate GPU detected"))
    assert not is_peer_failure(UserError("Connection closed by peer"))
    assert (
        in_one_line(ValueError("a\n  b")) == "ValueError: a b" and in_one_line(ValueError()) == "ValueError: no message"
    )


def test_ranks_behind_are_named_and_followers_not() -> None:
    step_9, step_8 = [(progress, f"step {progress}") for progress in (9, 8)]
    alive = [Beat("a", 1, 7, *step_9), Beat("b", 2, 7, *step_8), Beat("b", 3, 7, *step_9)]
    assert missing_ranks(alive, set(), "no progress for 30 minutes") == (
        "no progress for 30 minutes: rank 1 on host b (pid 2) is behind, at step 8; ranks 0, 2 waited"
    )
    # Rank 2 has already ended because it lost rank 1: rank 1 alone is to blame.
    follower = Beat("b", 3, 8, *step_8, left="lost rank 1", follows=True)
    assert missing_ranks([*alive[:2], follower], {1}, "x") == (
        "lost rank 1 on host b (pid 2), last heard of at step 8 (killed, crashed, stopped or cut off); rank 0 waited"
    )
    equal = Beat("b", 2, 7, *step_9)
    assert missing_ranks([alive[0], equal, follower], set(), "x").startswith("x, though no rank is lost or behind")
    ended = [Beat("b", pid, 8, *step_9, left="ValueError: x") for pid in (2, 3)]
    assert missing_ranks([alive[0], *ended], set(), "x") == (
        "ranks 1-2 on host b (pid 2, 3) ended (ValueError: x); rank 0 waited"
    )


def test_different_devices_are_listed_with_their_ranks(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    h100 = [((f"host{node}", str(node)), "cuda", "NVIDIA H100 80GB HBM3") for node in (0, 0, 1, 1)]
    assert devices_line(h100[:2]) == "device: 2 x NVIDIA H100 80GB HBM3, NCCL, on 1 node"
    assert devices_line(h100) == "device: 4 x NVIDIA H100 80GB HBM3, NCCL, on 2 nodes"
    a100 = (("host1", "1"), "cuda", "NVIDIA A100-SXM4-40GB")
    assert devices_line([*h100[:3], a100]) == (
        "device: 3 x NVIDIA H100 80GB HBM3 (ranks 0-2) + 1 x NVIDIA A100-SXM4-40GB (rank 3), NCCL, on 2 nodes; they are not "
        "alike, and the slowest sets the pace"
    )
    on_cpu = [(("a", "0"), "cpu", "CPU (X, 1 thread each)")]
    assert devices_line(on_cpu) == "device: 1 x CPU (X, 1 thread each), gloo"
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.14.1+cu132"))
    assert devices_line(on_cpu) == "device: 1 x CPU (X, 1 thread each), gloo"
    assert devices_line(h100[:2]) == (
        "device: 2 x NVIDIA H100 80GB HBM3, NCCL, on 1 node; this project has not run on GPUs with torch 2.14 or "
        "later: run scripts/gpu_proof.sh first, or install torch<2.14"
    )


def test_fewer_gpus_than_local_ranks_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    message = rf"{HOST}\) has 4 GPUs for 8 ranks; start with --nproc_per_node=4, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
    with pytest.raises(UserError, match=message):
        choose_device(0, 8)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device(3, 4) == torch.device("cuda", 3) == chosen[0]


@pytest.fixture
def stop(monkeypatch, capsys, request):
    """Yield (a StopSignal, the list of exit codes, `wait(text)`, which waits until stderr has the text). `os._exit` is replaced.

    The fixture's parameter is the handler of SIGHUP before the StopSignal.
    """
    before = signal.signal(signal.SIGHUP, getattr(request, "param", signal.SIG_DFL))
    exit_codes: list[int] = []
    errors = []
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    ranks = Ranks(0, 1, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    stop_signal = StopSignal(ranks)

    def wait(text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in "".join(errors):
            assert time.monotonic() < deadline, errors
            errors.append(capsys.readouterr().err)
            time.sleep(0.005)

    yield stop_signal, exit_codes, wait
    give_signals_back()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("saving", [True, False])
def test_second_signal_ends_the_process_unless_saving(stop, saving) -> None:
    stop_signal, exit_codes, wait = stop
    stop_signal.SAME_SIGNAL = 1e9
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    wait("SIGTERM: stopping; a second signal, two seconds later or more, ends at once\n")
    assert stop_signal.name == "SIGTERM" and not exit_codes
    stop_signal.SAME_SIGNAL = 0.0
    with stop_signal.saving() if saving else nullcontext():
        os.kill(os.getpid(), signal.SIGTERM)
        if saving:
            wait("SIGTERM: a checkpoint is being saved; one more signal ends at once, without it\n")
            assert not exit_codes
            os.kill(os.getpid(), signal.SIGINT)
        wait(f"{'SIGINT' if saving else 'SIGTERM'} again: ended at once; the last complete checkpoint stays\n")
    assert exit_codes == [130 if saving else 143]


def test_closed_terminal_stops_the_run(stop) -> None:
    """The shell and the kernel both send SIGHUP, at different times. The second one does not end the process at once."""
    stop_signal, exit_codes, wait = stop
    stop_signal.SAME_SIGNAL = 0.0
    os.kill(os.getpid(), signal.SIGHUP)
    wait("SIGHUP: stopping; a second signal")
    stop_signal._count(signal.SIGHUP)
    assert stop_signal.name == "SIGHUP" and not exit_codes


@pytest.mark.parametrize("stop", [signal.SIG_IGN], indirect=True)
def test_nohup_ignores_a_closed_terminal(stop) -> None:
    stop_signal, *_ = stop
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop_signal.name is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_heartbeats_of_hundreds_of_ranks_take_one_request() -> None:
    """When a rank is lost, all ranks read the heartbeats at once. With 1,024 requests each, the store took longer than SILENCE."""

    class CountingStore(dict):
        count = 0

        def check(self, keys: list[str]) -> bool:
            self.count += 1
            return all(key in self for key in keys)

        def multi_get(self, keys: list[str]) -> list[bytes]:
            self.count += 1
            return [self[key] for key in keys]

    beats = [Beat(f"node-{rank // 8}", rank, 7, 9, "step 3") for rank in range(512)]
    store = CountingStore({f"beat/{rank}": json.dumps(beat.__dict__).encode() for rank, beat in enumerate(beats)})
    heartbeat = Heartbeat.__new__(Heartbeat)
    heartbeat.world_size, heartbeat.window, heartbeat.reading_store = 512, 60.0, store  # pyright: ignore
    assert heartbeat._beats() == beats and store.count == 2
    del store["beat/3"]  # rank 3 has not written a heartbeat yet
    assert heartbeat._beats() == [*beats[:3], UNKNOWN, *beats[4:]]


def test_process_group_raises_the_limit_of_open_files() -> None:
    """gloo opens a socket to every rank in each of two groups: 1,024 files are too few for 512 ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with process_group(device=torch.device("cpu")):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (min(FILES, hard) if hard >= 0 else FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
