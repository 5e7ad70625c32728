"""Real torchrun: a network that is cut between two hosts, a killed rank and a signal; the next start always continues the run.

The hosts are two network namespaces with names and addresses of their own, joined by a pair of virtual interfaces. Making
them takes root, or the right to make namespaces; the test is skipped without it. Both hosts see the same files.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import ENVIRONMENT, largest_difference, run_of, weights, workplace, write_plan
from tests.distributed.launch import WORKER as TRAIN_WORKER
from tests.processes import ROOT, run_ranks

RESTART = "start the same command again"  # the end of every sentence about a lost rank
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux namespaces"),
]
WORKER = Path(__file__).with_name("host_worker.py")
STEPS, CUT_AFTER = 10, 3
DEADLINE = (
    600  # seconds, for whatever a test waits for; three interpreters that start on a busy machine took more than 180
)
ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, its data, and the finished run `whole`, which nothing interrupted."""
    run = "save_every=1, timeout_minutes=5"
    folder = workplace(tmp_path_factory.mktemp("hosts"), 4 * STEPS, data="", run=run)
    done = run_ranks(2, WORKER, folder / "config.py", "run.name=whole", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder


def run_tool(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path) -> Iterator[dict[str, list[str]]]:
    """Host -> the beginning of a command that runs on it. The namespaces end with the two processes that hold them."""
    holders, enter = {}, {}
    names = tmp_path / "hosts"  # each host knows the other by its name
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()))
    try:
        for name in ADDRESSES:
            make = f"hostname {name} && mount --bind {names} /etc/hosts && echo ready && exec sleep 600"
            hold = ["unshare", "--net", "--uts", "--mount", "sh", "-c", make]
            holders[name] = subprocess.Popen(hold, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if holders[name].stdout.readline() != "ready\n":
                pytest.skip(f"network namespaces are not permitted here: {holders[name].stderr.read().strip()}")
            enter[name] = ["nsenter", "-t", str(holders[name].pid), "--net", "--uts", "--mount", f"--wd={ROOT}"]
        try:
            other = holders["node-b"].pid
            run_tool(
                *enter["node-a"], "ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", other
            )
            for name, address in ADDRESSES.items():
                run_tool(*enter[name], "ip", "address", "add", f"{address}/24", "dev", "veth0")
                run_tool(*enter[name], "ip", "link", "set", "lo", "up")
                run_tool(*enter[name], "ip", "link", "set", "veth0", "up")
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            pytest.skip(f"virtual interfaces are not permitted here: {getattr(error, 'stderr', error)}")
        yield enter
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not installed")
    finally:
        for holder in holders.values():
            holder.kill()
            holder.wait()


class Launcher:
    """torchrun, started in a session of its own; its output is in a file."""

    def __init__(self, output: Path, command: list[object], enter: list[str]) -> None:
        self.output = output
        command = [*enter, sys.executable, "-m", "torch.distributed.run", *map(str, command)]
        network = {"GLOO_SOCKET_IFNAME": "veth0", "TP_SOCKET_IFNAME": "veth0"} if enter else {}
        environment = {**os.environ, **ENVIRONMENT, **network}
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def text(self) -> str:
        return self.output.read_text()

    def workers(self) -> list[int]:
        """The running ones: a launcher that waits for a cut network does not reap those that have ended."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if " Z " not in Path(f"/proc/{child}/stat").read_text()]

    def kill(self) -> None:
        """With its workers, which have sessions of their own."""
        if self.process.poll() is None:
            for pid in self.workers():
                os.killpg(pid, signal.SIGKILL)
            self.process.kill()
        self.process.wait()


def wait_for(what: Callable[[], object], launchers: list[Launcher], running: bool = False) -> None:
    """Until `what()` is true. Fails after the deadline or, with `running`, if a launcher has ended before."""
    end = time.monotonic() + DEADLINE
    while not what():
        if running and any(launcher.process.poll() is not None for launcher in launchers):
            end = 0.0
        assert time.monotonic() < end, "\n".join(launcher.text()[-3000:] for launcher in launchers)
        time.sleep(0.05)


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def test_a_cut_network_ends_both_hosts_with_a_sentence_and_the_next_start_finishes_the_run(folder, hosts) -> None:
    options = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv-backend=c10d",
        "--rdzv-id=run",
        "--rdzv-endpoint=node-a:29400",
    ]
    arguments = [folder / "config.py", "run.name=cut"]
    command = [*options, WORKER, *arguments, "run.timeout_minutes=0.25"]  # both hosts wait as long for each other
    launchers = [Launcher(folder / f"{name}.out", command, hosts[name]) for name in ADDRESSES]
    try:
        wait_for(lambda: last_step(folder / "runs" / "cut") >= CUT_AFTER, launchers, running=True)
        run_tool(*hosts["node-a"], "ip", "link", "set", "veth0", "down")
        wait_for(lambda: all(RESTART in launcher.text() for launcher in launchers), launchers)
        said = [next(line for line in launcher.text().splitlines() if RESTART in line) for launcher in launchers]
        wait_for(
            lambda: not any(launcher.process.poll() is None and launcher.workers() for launcher in launchers), launchers
        )
    finally:
        for launcher in launchers:
            launcher.kill()
    assert last_step(folder / "runs" / "cut") < STEPS
    with_store = next(i for i, line in enumerate(said) if "lost rank" in line)
    other = list(ADDRESSES)[1 - with_store]
    assert f"lost rank {1 - with_store} on host {other} (pid" in said[with_store]
    assert f"rank {1 - with_store} on host {other} has lost the store at node-" in said[1 - with_store]
    done = run_ranks(2, WORKER, *arguments, **ENVIRONMENT)  # on one host: the files of both are the same
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert largest_difference(weights(folder / "runs" / "whole"), weights(folder / "runs" / "cut")) == 0


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_passes_a_signal_on(folder) -> None:
    """Each start takes 3 steps; its fourth has a million micro-batches. Torchrun would kill the ranks 30 s after the signal."""
    plan = write_plan(folder, "restarted", [run_of(folder, "restarted", plant="endless_step:3")])
    command = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", TRAIN_WORKER, plan]
    run, launcher = folder / "runs" / "restarted", Launcher(folder / "restarted.out", command, [])
    latest = run / "checkpoints" / "latest"
    try:
        wait_for(lambda: latest.is_file() and latest.read_text() == "step-000003", [launcher], running=True)
        os.kill(launcher.workers()[-1], signal.SIGKILL)
        wait_for(lambda: latest.read_text() == "step-000006", [launcher], running=True)
        launcher.process.terminate()
        launcher.process.wait(DEADLINE)
    finally:
        launcher.kill()
    assert all((folder / f"restarted.0.rank{rank}.exit").read_text() == "0" for rank in range(2)), launcher.text()
    assert "lost rank" in launcher.text() and "resumed from" in launcher.text()
    done = run_ranks(2, WORKER, folder / "config.py", "run.name=restarted", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert largest_difference(weights(folder / "runs" / "whole"), weights(run)) == 0
