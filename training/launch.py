"""train.py as a program: the steps before its imports and around its `main`, and Python's garbage collector.

This module imports nothing heavy, so that a mistake on the command line ends within a fraction of a second.
"""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

COLLECT_EVERY = 50  # steps
# Options with which another program runs in place of train.py.
INSTEAD = {"--dry-run": ("plan.py", "--here"), "--check": ("check.py", "--train")}


def before_imports(script: str, documentation: str | None) -> None:
    """Check the command line of train.py before anything heavy is imported.

    script: its __file__. With --dry-run or --check this process becomes that program and the call does not return. Exit with
    code 2 and one sentence if the command line or the config has a mistake.
    """
    for option, (program, *options) in INSTEAD.items():
        if option in sys.argv[1:]:
            arguments = [argument for argument in sys.argv[1:] if argument != option]
            path = Path(script).resolve().parent / "scripts" / program
            options += [script] if option == "--check" else []
            os.execv(sys.executable, [sys.executable, str(path), *options, *arguments])
    sys.argv = ["run.check=only" if argument == "--quick-check" else argument for argument in sys.argv]
    from configs.load import check_command_line

    check_command_line(documentation)
    gc.disable()  # the collector would take a third of the seconds of the imports, and free nothing


def run_program(main: Callable[[], int]) -> None:
    """Run `main` and exit with its code. The collector never visits the objects that the imports have made."""
    from common.errors import run_script

    gc.freeze()
    gc.enable()
    run_script(main)


def freeze_garbage() -> None:
    """Collect everything once and turn the collector off, before the first step.

    It would pause one rank at a time, and the others would wait: `collect_garbage` runs it on all ranks after the same steps.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_garbage(step: int) -> None:
    """Collect the young objects after every COLLECT_EVERY-th step."""
    if step % COLLECT_EVERY == 0:
        gc.collect(1)
