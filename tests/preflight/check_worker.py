"""One rank of a check in a test: `train.py --check`, or parts of it with planted faults. Its children are forked.

    check_worker.py PLAN.json

PLAN.json: {"check": arguments of train.py} or {"parts": [...]}, see `PARTS`. Rank 0 writes the results of the parts to
PLAN.results.json.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
import types
from contextlib import suppress
from pathlib import Path

root = Path(__file__).resolve().parents[2]


class Forked:
    """A child of `Zygote`, with what is used of subprocess.Popen."""

    def __init__(self, pid: int, pipe: multiprocessing.connection.Connection) -> None:
        self.pid, self.pipe, self.code = pid, pipe, None

    def poll(self) -> int | None:
        if self.code is None:
            self.pipe.send(("poll", self.pid))
            self.code = self.pipe.recv()
        return self.code


class Zygote:
    """A process with the libraries imported and one thread, which forks the children: the check itself has threads."""

    def __init__(self) -> None:
        self.pipe, other = multiprocessing.Pipe()
        if os.fork() == 0:
            self.pipe.close()
            with suppress(EOFError):
                serve(other)
            os._exit(0)
        other.close()

    def start(self, command: list[str], environment: dict[str, str], output: Path) -> Forked:
        self.pipe.send(("start", command, environment, str(output)))
        return Forked(self.pipe.recv(), self.pipe)


def serve(pipe: multiprocessing.connection.Connection) -> None:
    while True:
        what, *arguments = pipe.recv()
        if what == "poll":
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
        os.read(ready, 1)  # Popen, too, returns when the child can be killed by its group
        os.close(ready)
        pipe.send(pid)


def become(command: list[str], environment: dict[str, str], output: str) -> None:
    """Turn into `python COMMAND`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[0] = str(root)
        run(root / f"{command[1].replace('.', '/')}.py")
    else:
        sys.argv = list(command)
        sys.path[:1] = [str(Path(command[0]).parent), str(root)]
        run(Path(command[0]))


def run(script: Path) -> None:
    """Run a program as `__main__`."""
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    program.__file__ = str(script)
    exec(compile(script.read_bytes(), script, "exec"), program.__dict__)


def main() -> None:
    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text())
    if "folders" in plan:  # another working directory on each rank, as nodes without a shared file system have
        os.chdir(plan["folders"][int(os.environ["RANK"])])
    zygote = Zygote()
    sys.path[0] = str(root)

    import torch

    torch.set_num_threads(1)
    import preflight.launch

    preflight.launch.start_process = zygote.start
    if plan.get("alone"):
        each_rank_is_a_node()
    if "check" in plan:
        sys.argv = plan["check"]
        sys.path[:1] = [str(Path(sys.argv[0]).parent), str(root)]
        run(Path(sys.argv[0]))
        return
    from common.errors import run_script

    run_script(lambda: parts(plan_file, plan, zygote))


def each_rank_is_a_node() -> None:
    """As on a node of its own, and no probe, which would only take time."""
    import preflight.start
    import training.owner

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    look = training.owner.check_shared_directory
    training.owner.check_shared_directory = functools.partial(look, wait_seconds=0.5)
    preflight.start.probe = lambda *arguments: ([], None)


def parts(plan_file: Path, plan: dict, zygote: Zygote) -> int:
    """Do the parts one after the other in one process group; write what each has found."""
    import torch

    from configs.loading.config_file import load_config
    from distributed.process_group import StopSignal, process_group
    from preflight.context import Context

    config = load_config(plan["config"])
    found = {}
    with process_group(2.0, torch.device("cpu")) as ranks:
        stop = StopSignal(ranks)
        for part in plan["parts"]:
            own = dataclasses.replace(config, run=dataclasses.replace(config.run, name=part["name"].replace(" ", "-")))
            arguments = (plan["config"], f"run.name={own.run.name}")
            context = Context(own, Path(part.get("script", "train.py")), arguments, ranks, stop, lambda text: None)
            results = PARTS[part["do"]](context, part)
            found[part["name"]] = [vars(result) for result in results]
        stop.close()
        if ranks.rank == 0:
            plan_file.with_suffix(".results.json").write_text(json.dumps(found))
    return 0


def straight(context, part: dict) -> list:
    """Three steps, and their first one against the reference."""
    from preflight import judge, runs

    if "sample" in part and context.ranks.rank == 0:
        context.scratch.mkdir(parents=True)
        shutil.copy(part["sample"], context.sample)
    command = runs.train_command(context, "straight")
    ended = context.run("straight", command, context.ranks.world_size)
    if ended.problem:
        return [judge.Result("run", "three steps", "fails", ended.problem)]
    judged = [judge.judge_steps(context, ended.seconds)] if context.ranks.rank == 0 else []
    for key in (judge.LOSS, judge.NORM):
        judged += [judge.judge_first(context, part["reference"], key)] if context.ranks.rank == 0 else []
    judged += [judge.judge_shares(context, part["reference"])] if context.ranks.rank == 0 else []
    return judged


def resumed(context, part: dict) -> list:
    """The straight run, then the killed one."""
    from preflight import runs

    return [*straight(context, part), runs.kill_and_resume(context, None)]


def fewer(context, part: dict) -> list:
    """The straight run, then on half of the ranks."""
    from preflight import runs

    return [*straight(context, part), runs.fewer_ranks(context)]


def small_disk(context, part: dict) -> list:
    """A disk with so much room, for three checkpoints of 1 GiB and an export of 256 MiB."""
    from preflight.machine import Room, disk

    usage = shutil.disk_usage
    results = []
    for free in part["free"]:
        shutil.disk_usage = lambda path, free=free: usage(path)._replace(free=free)
        found = disk(context.config, Room(2**30, 2**28, "measured"), context.ranks)
        results.append(dataclasses.replace(found, name=f"{free / 2**30:g} GiB"))
    shutil.disk_usage = usage
    return results


def other_code(context, part: dict) -> list:
    """Rank 1 has another train.py."""
    from preflight.machine import agreement

    script = Path(part["scripts"][context.ranks.rank])
    return [agreement(context.config, script, context.ranks)]


def interrupted(context, part: dict) -> list:
    """A SIGTERM to the last rank while the children run. The children are gone when the check has ended."""
    import preflight.launch
    from preflight import judge, runs
    from preflight.launch import Interrupted

    children = []
    start = preflight.launch.start_process

    def signalled(*arguments) -> object:
        child = start(*arguments)
        children.append(child)
        if context.ranks.rank == context.ranks.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return child

    preflight.launch.start_process = signalled
    try:
        context.run("interrupted", runs.train_command(context, "interrupted"), context.ranks.world_size)
        said = "not interrupted"
    except Interrupted as error:
        said = str(error)
    finally:
        preflight.launch.start_process = start
    context.stop.name = None
    return [judge.Result("run", "interrupted", "ok", said, {"codes": [child.poll() for child in children]})]


PARTS = {function.__name__: function for function in (straight, resumed, fewer, small_disk, other_code, interrupted)}

if __name__ == "__main__":
    main()
