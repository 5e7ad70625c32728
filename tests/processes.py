"""Run Python programs as separate processes, without importing torch and transformers again in each process.

These imports take 4 to 9 seconds of CPU per process, far more than the tiny runs of the tests. Processes are therefore
forked from a warm parent: multiprocessing's fork server, which imports the libraries once (`PRELOADED`) and then waits. The
child sets its command line, environment, working directory, sys.path and output files, and runs the program as `__main__`.
Everything else is as usual: one process per rank, gloo between them, real exit codes and signals.

A fork copies only the calling thread. The warm parent therefore imports and never computes, so that it has a single
thread, and every child starts its own threads for autograd, OpenMP and gloo. The parent imports nothing from this
repository: each program does that itself, as in a fresh interpreter.

`fresh=True` starts a new interpreter, or the real torchrun. This is also the fallback outside Linux and on a machine with
a GPU, because CUDA does not survive a fork.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = [
    "peft",
    "scipy.stats",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.utils.flop_counter",
    "torch.utils.tensorboard",
    "torchao.optim",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
    # Last: each operator that it defines asks for the file of every module, and the files of the modules above are known by then.
    "torch.nn.attention.varlen",
]
# Environment variables that the libraries read when they are imported. No threads in the warm parent, and no network.
READ_AT_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
}
CAN_FORK = sys.platform == "linux" and not torch.cuda.is_available()
TIMEOUT = 400  # seconds; far more than a run takes. Ranks that wait for each other forever are killed.
GRACE = 15  # seconds in which the other ranks may end after a rank has failed


# Called with the pid of a process and a function that tells whether it still runs.
Meanwhile = Callable[[int, Callable[[], bool]], None]


def run_python(
    *command: object, cwd: Path = ROOT, fresh: bool = False, meanwhile: Meanwhile | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python COMMAND`, a script and its arguments, with `environment` added. Return the exit code and the output."""
    if fresh or not CAN_FORK:
        return _run_fresh([sys.executable, *command], cwd, environment, meanwhile)
    return _run_forked(command, cwd, [environment], meanwhile)


def new_process(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """Start `target(*arguments)` in a child of the warm parent, or in a new interpreter where none is forked."""
    context = _warm_parent() if CAN_FORK else multiprocessing.get_context("spawn")
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run_ranks(
    world_size: int, *command: object, cwd: Path = ROOT, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run `torchrun --standalone --nproc_per_node=WORLD_SIZE COMMAND`. The exit code is 0 if every rank's is 0."""
    if fresh or not CAN_FORK:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        return _run_fresh([*torchrun, *command], cwd, environment)
    # As torchrun does: the launcher owns the store, on a free port, and tells the ranks so.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        **environment,
    }
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    return _run_forked(command, cwd, ranks)


def _run_fresh(
    command: list[object], cwd: Path, environment: dict[str, str], meanwhile: Meanwhile | None = None
) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            if meanwhile:
                meanwhile(process.pid, lambda: process.poll() is None)
            output = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *output)


def _run_forked(
    command: tuple[object, ...], cwd: Path, environments: list[dict[str, str]], meanwhile: Meanwhile | None = None
) -> subprocess.CompletedProcess:
    """Run a child per environment. All children append to the same two files, which are the output."""
    context = _warm_parent()
    argv = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for output in outputs:
            output.touch()
        children = [
            context.Process(target=become, args=(argv, str(cwd), {**os.environ, **environment}, outputs))
            for environment in environments
        ]
        try:
            for child in children:
                child.start()
            if meanwhile:
                meanwhile(children[0].pid, children[0].is_alive)
            _wait(children)
        finally:
            for child in children:
                if child.pid:
                    child.kill()
                    child.join()
        failed = [child.exitcode for child in children if child.exitcode]
        code = failed[0] if failed else 0
        return subprocess.CompletedProcess(argv, code, *(output.read_text() for output in outputs))


def _warm_parent() -> multiprocessing.context.BaseContext:
    """Return the fork server, which the first call starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in READ_AT_IMPORT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _wait(children: list[multiprocessing.Process]) -> None:
    """Wait until all children have ended, at most `GRACE` seconds after a failure and `TIMEOUT` seconds in all."""
    end = time.monotonic() + TIMEOUT
    running = list(children)
    while running and (left := end - time.monotonic()) > 0:
        connection.wait([child.sentinel for child in running], left)
        if any(child.exitcode for child in running):
            end = min(end, time.monotonic() + GRACE)
        running = [child for child in running if child.exitcode is None]


def become(argv: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> None:
    """Turn this child into `python ARGV`."""
    gc.freeze()  # a collection would write to, and so copy, every page of the libraries
    for descriptor, output in zip((1, 2), outputs, strict=True):
        opened = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    script = Path(argv[0]).resolve()
    inherited = ("", str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep))  # pytest's own sys.path
    libraries = [folder for folder in sys.path if folder not in inherited]
    sys.path[:] = [str(script.parent), *filter(None, inherited[2:]), *libraries]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    multiprocessing.set_start_method(None, force=True)  # the platform's default, as in a fresh interpreter
    sys.argv = [str(script), *argv[1:]]
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    program.__file__ = str(script)
    exec(compile(script.read_bytes(), script, "exec"), program.__dict__)
