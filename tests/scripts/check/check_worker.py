"""One rank of a check in a test: scripts/check.py, or parts of a check with planted faults. Its children are forked.

    check_worker.py PLAN.json

PLAN.json: {"checks": [arguments of scripts/check.py, ...], "parts": [...]}, see `PARTS`. First all checks are run, then all parts.
Rank 0 writes the results of the parts to PLAN.results.json. The runs of a part with "keep" are kept.
"""

import functools
import gc
import json
import os
import shutil
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[3]


def main() -> None:
    plan_file = Path(sys.argv[1])
    plan = json.loads(plan_file.read_text())
    if "folders" in plan:  # another working directory on each rank, as nodes without a shared file system have
        os.chdir(plan["folders"][int(os.environ["RANK"])])
    sys.path[0] = str(root)
    import scripts.check.step  # noqa: F401  so that the children need not import it
    import train  # noqa: F401
    import training.identity
    from scripts.check import children
    from tests.code_memory import remember_code
    from tests.zygote import Forked, Zygote, become

    remember_code()  # the children of a check run the same code
    checks = plan.get("checks", ())
    for script in {part["script"] for part in plan["parts"]} | {check[1] for check in checks if check[0] == "--train"}:
        training.identity.code_of(Path(script), None)
    gc.freeze()  # a collection in a child would write to, and so copy, every page of the libraries
    zygote = Zygote()  # after the imports: they start no thread, which a fork would lose

    import torch

    torch.set_num_threads(1)

    def start_process(command: list[str], environment: dict[str, str], output: Path) -> Forked:
        output.write_bytes(b"")  # the zygote adds to it
        return zygote.start(command, environment, output)

    children.start_process = start_process
    if plan.get("alone"):
        each_rank_is_a_node()
    for arguments in checks:  # a check ends its process
        if os.fork() == 0:
            become([str(root / "scripts" / "check.py"), *arguments], dict(os.environ), None)
        # In one write, because two ranks share the output.
        print(f"exit code {os.waitstatus_to_exitcode(os.wait()[1])}\n", end="", flush=True)
    from common.errors import run_script

    run_script(lambda: parts(plan_file, plan))


def each_rank_is_a_node() -> None:
    """Let each rank run as on a node of its own, without the slow check of data and model."""
    import training.owner
    from scripts.check import command

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    look = training.owner.check_shared
    training.owner.check_shared = functools.partial(look, wait_seconds=0.5)
    command.probe = lambda check: None


def parts(plan_file: Path, plan: dict) -> int:
    """Do the parts one after the other in one process group, and write the results of each."""
    import torch

    from configs.load import load_config
    from distributed.process_group import process_group
    from scripts.check.command import Check

    results = {}
    with process_group(2.0, torch.device("cpu")) as ranks:
        for part in plan["parts"]:
            file = part.get("config", plan["config"])
            arguments = (file, *part.get("overrides", ()), f"run.name={part['name'].replace(' ', '-')}")
            config = load_config(file, arguments[1:])
            check = Check(config, Path(part["script"]), arguments, ranks, lambda text: None)
            PARTS[part["do"]](check, part)
            results[part["name"]] = [vars(result) for result in check.results]
            if ranks.rank == 0 and not part.get("keep"):
                shutil.rmtree(check.scratch, ignore_errors=True)
        if ranks.rank == 0:
            plan_file.with_suffix(".results.json").write_text(json.dumps(results))
    return 0


def straight(check, part: dict) -> None:
    """Train three steps, and add all lines about them."""
    from scripts.check.command import attempt, three_steps

    if "reference" in part and check.ranks.rank == 0:
        (check.scratch / "step").mkdir(parents=True, exist_ok=True)
        shutil.copy(part["reference"], check.scratch / "step")
    attempt(check, "three steps", lambda: three_steps(check))


def resumed(check, part: dict) -> None:
    """Train the straight run, then the run that is killed."""
    from scripts.check.command import kill_and_resume

    straight(check, part)
    kill_and_resume(check)


def fewer(check, part: dict) -> None:
    """Train the straight run, then resume it on half of the ranks."""
    from scripts.check.command import fewer_ranks

    straight(check, part)
    fewer_ranks(check)


def one_fails(check, part: dict) -> None:
    """Let the child of the last rank fail while the other waits for ever. The other is ended, and the line names the failure."""
    from scripts.check import children, command

    children.GRACE = 0.5
    run = lambda: command.run_children(check, "fails", (part["script"],), check.ranks.world_size)  # noqa: E731
    command.attempt(check, "one fails", run)


PARTS = {function.__name__: function for function in (straight, resumed, fewer, one_fails)}

if __name__ == "__main__":
    main()
