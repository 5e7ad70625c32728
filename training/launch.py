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
    """Check the command line of train.py, and the packages of run.log_to, before anything heavy is imported.

    script: its __file__. With --dry-run or --check this process becomes that program and the call does not return. Exit with
    code 2 and one sentence if the command line or the config has a mistake.
    """
    for option, (program, *options) in INSTEAD.items():
        if option in sys.argv[1:]:
            arguments = [argument for argument in sys.argv[1:] if argument != option]
            path = Path(script).resolve().parent / "scripts" / program
            options += [script] if option == "--check" else []
            os.execv(sys.executable, [sys.executable, str(path), *options, *arguments])
    if "--quick-check" in sys.argv:  # the config comes before its settings
        sys.argv = [*(argument for argument in sys.argv if argument != "--quick-check"), "run.check=only"]
    from configs.load import check_command_line
    from training.sinks import check_sinks

    is_first = int(os.environ.get("RANK", 0)) == 0  # other nodes need no package for curves
    check_command_line(documentation, lambda config: check_sinks(config.run.log_to if is_first else ()))
    gc.disable()  # the collector would take a third of the seconds of the imports, and free nothing


def run_program(main: Callable[[], int]) -> None:
    """Run `main` and exit with its code. The collector never visits the objects that the imports have made."""
    from common.errors import run_script

    gc.freeze()
    gc.enable()
    run_script(main)


def launcher_note(is_signal: bool) -> str:
    """Return a sentence on the traceback that torchrun prints after our last line, "" without torchrun or a signal.

    torchrun raises SignalException in its own process after the ranks have ended. No exit code, error file or option of the
    ranks prevents this (torch 2.13: torch/distributed/elastic/multiprocessing/api.py).
    """
    return (
        "; the traceback below is torchrun's own, and no error"
        if is_signal and "TORCHELASTIC_RUN_ID" in os.environ
        else ""
    )


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
