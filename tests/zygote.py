"""Children of a program under test, forked from a process that has imported the libraries and does nothing else.

The program itself has threads, and a fork copies only the calling thread. Start the zygote after the imports, which start no thread.
"""

import multiprocessing
import os
import signal
import sys
import traceback
import types
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Forked:
    """A child of `Zygote`, with the part of subprocess.Popen that the programs use."""

    def __init__(self, pid: int, pipe: multiprocessing.connection.Connection) -> None:
        self.pid, self.pipe, self.code = pid, pipe, None

    def poll(self) -> int | None:
        if self.code is None:
            self.pipe.send(("poll", self.pid))
            self.code = self.pipe.recv()
        return self.code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Zygote:
    """The process that forks the children."""

    def __init__(self) -> None:
        self.pipe, far_end = multiprocessing.Pipe()
        if os.fork() == 0:
            self.pipe.close()
            with suppress(EOFError):
                serve(far_end)
            os._exit(0)
        far_end.close()

    def start(self, command: list[str], environment: dict[str, str], output: Path) -> Forked:
        """Start `python COMMAND` in a session of its own, and append its output to a file."""
        self.pipe.send(("start", command, environment, str(output)))
        return Forked(self.pipe.recv(), self.pipe)


def serve(pipe: multiprocessing.connection.Connection) -> None:
    while True:
        request, *arguments = pipe.recv()
        if request == "poll":
            pid, status = os.waitpid(arguments[0], os.WNOHANG)
            pipe.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        ready, has_session = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(has_session)
            code = 1
            try:
                become(*arguments)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(has_session)
        os.read(ready, 1)  # like Popen, return only when the child can be killed by its process group
        os.close(ready)
        pipe.send(pid)


def become(command: list[str], environment: dict[str, str], output: str | None) -> None:
    """Turn into `python COMMAND`."""
    if output:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.execv = lambda _, command: run(command[1:])  # train.py --dry-run runs another program in the same interpreter
    sys.path[:1] = [str(Path(command[0]).parent), str(ROOT)]
    run(command)


def run(command: list[str]) -> None:
    """Run a program as `__main__`."""
    script = Path(command[0])
    sys.argv = list(command)
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    program.__file__ = str(script)
    exec(compile(script.read_bytes(), script, "exec"), program.__dict__)
