"""One rank of a check in a test: scripts/check.py, or parts of it with planted faults. Its children are forked.

    check_worker.py PLAN.json

PLAN.json: {"check": arguments of scripts/check.py}, {"checks": [arguments, ...], "parts": []} or {"parts": [...]}, see `PARTS`.
Rank 0 writes the results of the parts to PLAN.results.json. A part with "keep" leaves its runs.
"""

import functools
import gc
import json
import os
import shutil
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]


def main() -> None:
    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text())
    if "folders" in plan:  # another working directory on each rank, as nodes without a shared file system have
        os.chdir(plan["folders"][int(os.environ["RANK"])])
    sys.path[0] = str(root)
    import tools.check
    import tools.check_step  # noqa: F401  what the children would import, each for itself
    import train  # noqa: F401
    import training.identity
    from tests.code_memory import remember_code
    from tests.zygote import Forked, Zygote, become

    remember_code()  # of the children of a check, which run the same code
    checks = [command for command in [*plan.get("checks", ()), plan.get("check", ())] if "--train" in command]
    parts_of_train = [part for part in plan.get("parts", ()) if "script" in part]
    for script in [*(command[1] for command in checks), *(part["script"] for part in parts_of_train)]:
        training.identity.code_of(Path(script), None)
    gc.freeze()  # a collection in a child would write to, and so copy, every page of the libraries
    zygote = Zygote()  # after the imports, which start no thread

    import torch

    torch.set_num_threads(1)

    def start_process(command: list[str], environment: dict[str, str], output: Path) -> Forked:
        output.write_bytes(b"")  # the zygote adds to it
        return zygote.start(command, environment, output)

    tools.check.start_process = start_process
    if plan.get("alone"):
        each_rank_is_a_node()
    for arguments in plan.get("checks", ()):  # one after the other; a check ends its process
        if os.fork() == 0:
            become([str(root / "scripts" / "check.py"), *arguments], dict(os.environ), None)
        print("exit code", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    if "check" in plan:
        become([str(root / "scripts" / "check.py"), *plan["check"]], dict(os.environ), None)
    from common.errors import run_script

    run_script(lambda: parts(plan_file, plan))


def each_rank_is_a_node() -> None:
    """As on a node of its own, and without what would only take time."""
    import tools.check
    import training.owner

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    look = training.owner.check_shared
    training.owner.check_shared = functools.partial(look, wait_seconds=0.5)
    tools.check.probe = lambda check: ([], {})


def parts(plan_file: Path, plan: dict) -> int:
    """Do the parts one after the other in one process group; write what each has found."""
    import torch

    from configs.load import load_config
    from distributed.process_group import process_group
    from tools.check import Check

    found = {}
    with process_group(2.0, torch.device("cpu")) as ranks:
        for part in plan["parts"]:
            file = part.get("config", plan["config"])
            arguments = (file, *part.get("overrides", ()), f"run.name={part['name'].replace(' ', '-')}")
            config = load_config(file, arguments[1:])
            script = Path(part.get("script", "train.py"))
            check = Check(config, script, arguments, ranks, lambda text: None)
            found[part["name"]] = [vars(result) for result in PARTS[part["do"]](check, part)]
            if ranks.rank == 0 and not part.get("keep"):
                shutil.rmtree(check.scratch, ignore_errors=True)
        if ranks.rank == 0:
            plan_file.with_suffix(".results.json").write_text(json.dumps(found))
    return 0


def straight(check, part: dict) -> list:
    """Three steps, and all lines about them."""
    from common.errors import UserError
    from tools.check import Result, three_steps

    reference = {}
    if "reference" in part:
        reference = json.loads(Path(part["reference"], "step.json").read_text())["reference"]
        if check.ranks.rank == 0:
            check.scratch.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(part["reference"], "step.safetensors"), check.scratch)
    try:
        return three_steps(check, reference)[0]
    except UserError as error:
        return [Result("run", "three steps", "fails", str(error))]


def resumed(check, part: dict) -> list:
    """The straight run, then the killed one."""
    from tools.check import kill_and_resume

    return [*straight(check, part), kill_and_resume(check, {})]


def fewer(check, part: dict) -> list:
    """The straight run, then on half of the ranks."""
    from tools.check import fewer_ranks

    return [*straight(check, part), fewer_ranks(check, has_auxiliary=False)]


def one_fails(check, part: dict) -> list:
    """The child of the last rank fails while the other would wait for ever: it is ended, and the line is that of the failure."""
    import tools.check

    tools.check.GRACE = 0.5
    try:
        tools.check.run_children(check, "fails", (part["script"],), check.ranks.world_size)
    except tools.check.ChildFailed as error:
        return [tools.check.Result("run", "one fails", "fails", str(error))]


PARTS = {function.__name__: function for function in (straight, resumed, fewer, one_fails)}

if __name__ == "__main__":
    main()
