"""A rank that is lost, stuck or wrong ends every other rank with one sentence. Real processes go wrong in watch_worker.py."""

import json
import os
import pickle
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

from common.errors import UserError
from distributed.device import choose_device, devices_line
from distributed.process_group import FILES, Ranks, StopSignal, _end_listener, process_group
from distributed.watch import UNKNOWN, Beat, Heartbeat, Watch, in_one_line, is_peer_failure
from tests.processes import run_ranks

WORKER = Path(__file__).with_name("watch_worker.py")
HOST = platform.node()
RESTART = "; start the same command again to continue from the last checkpoint"


def end(faults: str, world_size: int = 2, directory: Path | str = "") -> tuple[str, dict[int, int], str]:
    """(stdout, rank -> pid, stderr without warnings of torch) of faults of watch_worker.py, of which the last must end it."""
    done = run_ranks(world_size, WORKER, faults, directory)
    assert done.returncode, done.stdout + done.stderr
    pids = {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d) has pid (\d+)", done.stdout)}
    return done.stdout, pids, "".join(line for line in done.stderr.splitlines(True) if not line.startswith("["))


@pytest.fixture(scope="module")
def together() -> tuple[str, dict[int, int], str]:
    """The faults after which the ranks can start a new group, and one in which a rank waits forever."""
    return end("disagree:1 error:1 wait:0.1", world_size=3)


@pytest.mark.slow
def test_every_rank_ends_with_the_same_sentence_if_inputs_differ(together) -> None:
    output, _, errors = together
    said = [line for line in errors.splitlines() if "differs" in line]
    assert said == [
        f"error: rank 1 on host {HOST} differs from rank 0 on host {HOST} in config.optimizer.learning_rate (2e-05 instead of "
        f"0.0001); rank 2 on host {HOST} differs from rank 0 on host {HOST} in config.optimizer.learning_rate (2e-05 instead of "
        "0.0001), data.rows (396 instead of 400); give all ranks the same files, config and versions"
    ]
    assert output.count("disagree: rank ") == output.count(" exits with 2\n") == 3


@pytest.mark.slow
def test_a_bug_keeps_its_traceback_and_the_others_quote_it(together) -> None:
    output, pids, errors = together
    quoted = (
        f"rank 1 on host {HOST} (pid {pids[1]}) ended (ValueError: a row has no tokens); ranks 0, 2 waited{RESTART}\n"
    )
    assert errors.count("ended (ValueError") == 1 and f"error: step 3: {quoted}" in errors
    assert "Traceback" in errors and "ValueError: a row has no\ntokens" in errors
    assert all(f"error: rank {rank} exits with {code}\n" in output for rank, code in enumerate((3, 1, 3)))


@pytest.mark.slow
def test_a_disk_that_is_full_for_rank_0_alone_is_one_sentence() -> None:
    """Rank 0 says it; the other ends for it has lost rank 0, and need not say so too."""
    output, _, errors = end("full:1")
    assert errors == "error: metrics.jsonl: the disk is full; free some space and run the same command again\n"
    assert "full: rank 0 exits with 2\n" in output and "full: rank 1 exits with 3\n" in output


@pytest.mark.slow
def test_a_rank_that_never_comes_ends_all_within_the_timeout_and_is_shown_where_it_stands(together) -> None:
    _, _, errors = together
    (line,) = (line for line in errors.splitlines() if "no progress" in line)
    assert re.fullmatch(
        r"error: step 3: no progress for 6 s, though every rank is alive and none is behind: ranks 0, 2 in backward "
        r"\(watch_worker.py:\d+\), rank 1 in wait \(threading.py:\d+\) \(a job that is suspended for so long looks the same "
        rf"when it goes on\){RESTART}",
        line,
    ), line


@pytest.mark.slow
def test_a_killed_rank_is_named_by_all_others_once_per_node(tmp_path) -> None:
    prefix = f"{tmp_path}/collectives_rank_"
    output, pids, errors = end("kill:1", 3, tmp_path)
    assert re.fullmatch(
        rf"error: step 3: lost rank 1 on host {HOST} \(pid {pids[1]}\), last heard of at [^:]* in \w+ \(\w+.py:\d+\): no "
        rf"heartbeat for 5 s \(killed, crashed, stopped or cut off\); ranks 0, 2 waited{RESTART}; the last collectives of the "
        rf"ranks that are left are in {prefix}\*, which torchfrtrace reads\n",
        errors,
    ), errors
    assert sorted(tmp_path.iterdir()) == [Path(f"{prefix}{rank}") for rank in (0, 2)]
    for rank in (0, 2):  # the flight recorder of torch: pickled by this process's own children
        entries = pickle.loads(Path(f"{prefix}{rank}").read_bytes())["entries"]
        assert entries[-1]["profiling_name"] == "gloo:all_reduce" and entries[-1]["frames"]
    assert "rank 0 exits with 3" in output and "rank 2 exits with 3" in output


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_in_a_collective() -> None:
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
    """End the thread of a StopSignal, and let Python have the signals again."""
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


def sentence(beats: list[Beat], quiet: set[int], left: set[int]) -> str:
    """What rank 0 would say."""
    heartbeat = object.__new__(Heartbeat)
    heartbeat.rank, heartbeat.window, heartbeat.watch = 0, 5.0, Watch()
    return heartbeat._missing(beats, quiet, left, "no progress for 30 minutes")


def test_ranks_that_are_behind_are_named_and_those_that_follow_are_not_blamed() -> None:
    step_9, step_8 = [(progress, f"step {progress}", f"forward (model.py:{progress})") for progress in (9, 8)]
    alive = [Beat("a", 1, 7, *step_9), Beat("b", 2, 7, *step_8), Beat("b", 3, 7, *step_9)]
    assert sentence(alive, set(), set()) == (
        "no progress for 30 minutes: rank 1 on host b (pid 2) is behind, at step 8 in forward (model.py:8); ranks 0, 2 waited"
    )
    # Rank 2 has already ended because it lost rank 1: rank 1 alone is to blame.
    follower = Beat("b", 3, 8, *step_9, left=f"step 9: lost rank 1{RESTART}", follows=True)
    assert "lost rank 1 on host b (pid 2), last heard of at step 8" in sentence([*alive[:2], follower], {1}, set())
    # Rank 1 is not known to be lost: what rank 2 has found is passed on.
    equal = Beat("b", 2, 7, *step_9)
    assert sentence([alive[0], equal, follower], set(), set()) == "another rank had found: step 9: lost rank 1"
    two = [Beat("b", pid, 8, *step_9, left="ValueError: x") for pid in (2, 3)]
    assert sentence([alive[0], *two], set(), {1, 2}) == (
        "ranks 1-2 on host b (pid 2, 3) ended (ValueError: x); rank 0 waited"
    )


def test_devices_are_one_line_and_unlike_ones_are_listed() -> None:
    h100 = [((f"host{node}", str(node)), "cuda", "NVIDIA H100 80GB HBM3") for node in (0, 0, 1, 1)]
    assert devices_line(h100[:2]) == "device: 2 x NVIDIA H100 80GB HBM3, NCCL, on 1 node"
    assert devices_line(h100) == "device: 4 x NVIDIA H100 80GB HBM3, NCCL, on 2 nodes"
    a100 = (("host1", "1"), "cuda", "NVIDIA A100-SXM4-40GB")
    assert devices_line([*h100[:3], a100]) == (
        "device: 3 x NVIDIA H100 80GB HBM3 (ranks 0-2) + 1 x NVIDIA A100-SXM4-40GB (rank 3), NCCL, on 2 nodes; they are not "
        "alike, and the slowest sets the pace"
    )
    assert devices_line([(("a", "0"), "cpu", "CPU (X, 1 thread each)")]) == "device: 1 x CPU (X, 1 thread each), gloo"


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
    """(StopSignal, `ended`: exit codes, `wait(text)`: until stderr has it). `os._exit` only remembers the code.

    A parameter is what the process does on SIGHUP before.
    """
    before = signal.signal(signal.SIGHUP, getattr(request, "param", signal.SIG_DFL))
    ended: list[int] = []
    heard = []
    monkeypatch.setattr(os, "_exit", ended.append)
    ranks = Ranks(0, 1, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    made = StopSignal(ranks)

    def wait(text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in "".join(heard):
            assert time.monotonic() < deadline, heard
            heard.append(capsys.readouterr().err)
            time.sleep(0.005)

    yield made, ended, wait
    give_signals_back()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("saving", [True, False])
def test_signals_within_two_seconds_are_one_and_the_second_ends_the_process_but_not_a_save(stop, saving) -> None:
    made, ended, wait = stop
    made.SAME_SIGNAL = 1e9
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    wait("SIGTERM: stopping; a second signal, two seconds later or more, ends at once\n")
    assert made.name == "SIGTERM" and not ended
    made.SAME_SIGNAL = 0.0
    with made.saving() if saving else nullcontext():
        os.kill(os.getpid(), signal.SIGTERM)
        if saving:
            wait("SIGTERM: a checkpoint is being saved; one more signal ends at once, without it\n")
            assert not ended
            os.kill(os.getpid(), signal.SIGINT)
        wait(f"{'SIGINT' if saving else 'SIGTERM'} again: ended at once; the last complete checkpoint stays\n")
    assert ended == [130 if saving else 143]


def test_a_closed_terminal_stops_the_run_and_never_ends_it_at_once(stop) -> None:
    """The shell and the kernel both say so, and not at the same time."""
    made, ended, wait = stop
    made.SAME_SIGNAL = 0.0
    os.kill(os.getpid(), signal.SIGHUP)
    wait("SIGHUP: stopping; a second signal")
    made._count(signal.SIGHUP)
    assert made.name == "SIGHUP" and not ended


@pytest.mark.parametrize("stop", [signal.SIG_IGN], indirect=True)
def test_what_nohup_has_started_hears_nothing_of_a_closed_terminal(stop) -> None:
    made, *_ = stop
    os.kill(os.getpid(), signal.SIGHUP)
    assert made.name is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_heartbeats_of_hundreds_of_ranks_are_one_request() -> None:
    """When a rank is lost, all others read them at once: 1,024 requests each took the store longer than WINDOW."""

    class Asked(dict):
        count = 0

        def check(self, keys: list[str]) -> bool:
            self.count += 1
            return all(key in self for key in keys)

        def multi_get(self, keys: list[str]) -> list[bytes]:
            self.count += 1
            return [self[key] for key in keys]

    beats = [Beat(f"node-{rank // 8}", rank, 7, 9, "step 3", "backward (train.py:230)") for rank in range(512)]
    store = Asked({f"beat/{rank}": json.dumps(beat.__dict__).encode() for rank, beat in enumerate(beats)})
    heartbeat = Heartbeat.__new__(Heartbeat)
    heartbeat.world_size, heartbeat.window, heartbeat.questions = 512, 60.0, store  # pyright: ignore
    assert heartbeat._beats() == beats and store.count == 2
    del store["beat/3"]  # it has not written one yet
    assert heartbeat._beats() == [*beats[:3], UNKNOWN, *beats[4:]]


def test_a_process_group_may_open_more_files_than_a_shell_allows() -> None:
    """gloo has a socket to each other rank in each of two groups: 1,024 files are too few for 512 ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with process_group(device=torch.device("cpu")):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == (min(FILES, hard) if hard >= 0 else FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
