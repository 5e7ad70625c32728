"""The experiments of docs/results.md. Each is a list of commands, and what is done is not run again.

    python scripts/experiment.py --list                         # every command of all of them, what is done, and what is left
    python scripts/experiment.py settle --parallel 2            # interrupted anywhere, the same command goes on
    python scripts/experiment.py settle pareto --until 07:30    # no command is started after half past seven
    python scripts/experiment.py knowledge --report             # the tables and the picture of what is done
    python scripts/experiment.py pareto --keep docs             # keep results in docs/drawn, and go on from there on another machine

`settle`: does full fine-tuning find more violations than LoRA? `pareto`: what does a remedy against forgetting cost on the task?
`knowledge`: what do full fine-tuning and LoRA learn from new text? experiment/NAME.py says what was declared before the runs.
Results are in runs/settle, runs/drawn (of `pareto`) and runs/knowledge: NAME.md, NAME.json, NAME.png and the scores of every run. The
list of commands grows when validation has chosen a rate. A training that was stopped or killed goes on from its last checkpoint. A second
process in the same directory is refused. --keep first copies from FOLDER what is missing, and after each command copies results, answers
and times to it, but no weights.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import add_number, new_parser
from common.durable_files import write_durably, write_json
from common.errors import UserError, run_script
from experiment import knowledge, pareto, settle
from experiment.commands import (
    check_options,
    keep,
    list_commands,
    owned,
    parse_until,
    restore,
    run_commands,
)
from experiment.drawn import BASE

EXPERIMENTS = {"settle": settle, "pareto": pareto, "knowledge": knowledge}


def main() -> int:
    """List, run or report."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all, in this order)"
    )
    add_number(parser, "--parallel", "commands at once, each with one process on its share of the machine", 1, least=1)
    parser.add_argument("--until", type=parse_until, metavar="HH:MM", help="start no command after this time")
    kept = "folder that keeps results, answers and times: read first, and written after each command"
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=kept)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the commands and what is left, and exit")
    what.add_argument("--report", action="store_true", help="write the tables and pictures of what is done, and exit")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in EXPERIMENTS]:
        raise UserError(f"there is no experiment {unknown[0]}; there are {', '.join(EXPERIMENTS)}")
    for name in arguments.names or EXPERIMENTS:
        treat(name, arguments)
    return 0


def treat(name: str, arguments: argparse.Namespace) -> None:
    """List, run or report one experiment."""
    experiment = EXPERIMENTS[name]
    out: Path = experiment.out()
    kept: Path | None = arguments.keep and arguments.keep / out.name
    if kept:
        with owned(out):
            restore(kept, out)
    check_options(experiment.commands(), out)
    if arguments.list:
        print(f"{name}:\n{list_commands(experiment.commands(), out, arguments.parallel)}")
        return
    if not arguments.report:
        on_change = (lambda: keep(experiment.commands(), out, kept)) if kept else lambda: None
        run_commands(experiment.commands, out, arguments.parallel, arguments.until, on_change)
    out.mkdir(parents=True, exist_ok=True)
    from model.architectures import origin  # slow to import

    text, values = experiment.report()
    base = origin(BASE) or BASE
    text = f"Base: {base}.\n\n{text}"
    write_durably(out / f"{name}.md", text + "\n")
    write_json(out / f"{name}.json", {"base": base} | values)
    print(text)


if __name__ == "__main__":
    run_script(main)
