"""A killed rank, a cut network between two hosts, and a signal, with real torchrun. The next start always continues the run.

The hosts are two network namespaces with names and addresses of their own, joined by a pair of virtual interfaces. Creating
namespaces needs root or a permission; without it no network is cut. Both hosts see the same files. The launchers are forked
(tests/processes.py), and they start the ranks as new processes.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distributed.checkpoint_directory import latest_checkpoint
from tests.distributed.launch import ENVIRONMENT, largest_difference, launch, run_of, weights, workplace
from tests.processes import ROOT, become, new_process

RESTART = "start the same command again"  # the end of every sentence about a lost rank
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux namespaces"),
]
WORKER = Path(__file__).with_name("host_worker.py")
STEPS = 7
DEADLINE = 600  # seconds; three interpreters that start on a busy machine took more than 180
ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tiny model and its data, and train the run `whole` without interruption."""
    run = "save_every=3, timeout_minutes=5"
    folder = workplace(tmp_path_factory.mktemp("hosts"), 4 * STEPS, data="", run=run)
    launch(folder, "whole", 2, [run_of(folder, "whole")])
    return folder


def run_on(host: int, *command: object) -> None:
    """Run a command in the network of a host."""
    enter = ["nsenter", "-t", str(host), "--net", "--uts", "--mount"]
    subprocess.run([*enter, *map(str, command)], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path) -> Iterator[dict[str, int]]:
    """Create the hosts. Yield host -> pid of a process that keeps its namespaces alive, or {} without permission."""
    holders = {}
    names = tmp_path / "hosts"  # each host knows the other by its name
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()))
    try:
        try:
            for name in ADDRESSES:
                make = f"hostname {name} && mount --bind {names} /etc/hosts && echo ready && exec sleep 600"
                hold = ["unshare", "--net", "--uts", "--mount", "sh", "-c", make]
                holders[name] = subprocess.Popen(hold, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                if holders[name].stdout.readline() != "ready\n":
                    raise PermissionError("unshare")
            pids = {name: holder.pid for name, holder in holders.items()}
            second_host = pids["node-b"]
            link = ("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", second_host)
            run_on(pids["node-a"], *link)
            for name, address in ADDRESSES.items():
                run_on(pids[name], "ip", "address", "add", f"{address}/24", "dev", "veth0")
                run_on(pids[name], "ip", "link", "set", "lo", "up")
                run_on(pids[name], "ip", "link", "set", "veth0", "up")
        except (subprocess.CalledProcessError, FileNotFoundError, PermissionError):
            pids = {}
        yield pids
    finally:
        for holder in holders.values():
            holder.kill()
            holder.wait()


def torchrun(host: int, script: str, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """Become torchrun, in a new session, in the namespaces of the process `host` (0: keep this host's). Call it in a new process."""
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("uts", "net", "mnt") if host else ():
        with open(f"/proc/{host}/ns/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), kind)
    become([script, *arguments], str(ROOT), environment, [output, output])


class Launcher:
    """A forked torchrun; its output is in a file."""

    def __init__(self, output: Path, command: list[object], host: int = 0, **environment: str) -> None:
        self.output = output
        output.touch()
        script = output.with_suffix(".py")
        script.write_text("from torch.distributed.run import main\n\nmain()\n")
        network = {"GLOO_SOCKET_IFNAME": "veth0", "TP_SOCKET_IFNAME": "veth0"} if host else {}
        environment = {**os.environ, **ENVIRONMENT, **network, **environment}
        self.process = new_process(torchrun, host, str(script), [str(part) for part in command], environment, output)

    def text(self) -> str:
        return self.output.read_text()

    def workers(self) -> list[int]:
        """Return the pids of running workers. A launcher that waits for a cut network does not reap ended workers (zombies)."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if " Z " not in Path(f"/proc/{child}/stat").read_text()]

    def kill(self) -> None:
        """Kill the launcher and its workers, which have sessions of their own."""
        if self.process.is_alive():
            for pid in self.workers():
                os.killpg(pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()


def wait_for(condition: Callable[[], object], launchers: list[Launcher], running: bool = False) -> None:
    """Wait until `condition()` is true. Fail after the deadline or, with `running`, if a launcher ends first."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if running and not all(launcher.process.is_alive() for launcher in launchers):
            end = 0.0
        assert time.monotonic() < end, "\n".join(launcher.text()[-3000:] for launcher in launchers)
        time.sleep(0.05)


def saved(run: Path, step: int) -> bool:
    newest = latest_checkpoint(run / "checkpoints")
    return newest is not None and newest.name == f"step-{step:06d}"


def test_restart_after_kill_and_sentence_after_cut_network(folder, hosts) -> None:
    """Each start takes 3 steps; its fourth step has a million micro-batches. The rest of the run is trained on one host."""
    run = folder / "runs" / "cut"
    first, port = ("node-a", 29400) if hosts else ("127.0.0.1", free_port())
    options = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=run"]
    command = [*options, f"--rdzv-endpoint={first}:{port}", WORKER, folder / "config.py", "run.name=cut"]
    command.append("run.timeout_minutes=0.25")  # both hosts wait for each other equally long
    launchers = [
        Launcher(folder / f"{name}.out", command, hosts.get(name, 0), PLANT="endless_step:3") for name in ADDRESSES
    ]
    sentences = []
    try:
        wait_for(lambda: saved(run, 3), launchers, running=True)
        os.kill(launchers[1].workers()[0], signal.SIGKILL)
        wait_for(lambda: saved(run, 6), launchers, running=True)
        assert any("lost rank" in launcher.text() for launcher in launchers)
        assert "resumed from" in "".join(launcher.text() for launcher in launchers)
        if hosts:
            before = [len(launcher.text()) for launcher in launchers]

            def after() -> list[str]:
                texts = [launcher.text()[start:] for launcher, start in zip(launchers, before, strict=True)]
                return [next((line for line in text.splitlines() if RESTART in line), "") for text in texts]

            run_on(hosts["node-a"], "ip", "link", "set", "veth0", "down")
            wait_for(lambda: all(after()), launchers)
            sentences = after()
            wait_for(
                lambda: not any(launcher.process.is_alive() and launcher.workers() for launcher in launchers),
                launchers,
            )
    finally:
        for launcher in launchers:
            launcher.kill()
    assert saved(run, 6)
    launch(folder, "continued", 2, [run_of(folder, "cut")])  # on one host, because both hosts share the files
    assert "resumed from" in (folder / "continued.out").read_text()
    assert largest_difference(weights(folder / "runs" / "whole"), weights(run)) == 0
    if not hosts:
        pytest.skip("network namespaces are not permitted here: no network was cut")
    with_store = next(i for i, line in enumerate(sentences) if "lost rank" in line)
    other_host = list(ADDRESSES)[1 - with_store]
    assert f"lost rank {1 - with_store} on host {other_host} (pid" in sentences[with_store]
    assert f"rank {1 - with_store} on host {other_host} has lost the store at node-" in sentences[1 - with_store]


def test_run_continues_after_a_signal_to_torchrun(folder) -> None:
    """The signal comes in the second step, which has a million micro-batches. torchrun would kill the rank 30 s later."""
    command = ["--standalone", "--nproc_per_node=1", WORKER, folder / "config.py", "run.name=signalled"]
    run, launcher = folder / "runs" / "signalled", Launcher(folder / "signalled.out", command, PLANT="endless_step:1")
    try:
        wait_for(lambda: '"train/loss"' in rows_of(run), [launcher], running=True)
        launcher.process.terminate()
        launcher.process.join(DEADLINE)
    finally:
        launcher.kill()
    assert saved(run, 1) and "SIGTERM: stopped after step 1/7, saved" in launcher.text(), launcher.text()
    launch(folder, "finished", 2, [run_of(folder, "signalled")])
    assert largest_difference(weights(folder / "runs" / "whole"), weights(run)) < 1e-5


def rows_of(run: Path) -> str:
    return (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
