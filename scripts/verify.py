"""Compare a run with its record: the chain of entries, every file, its steps trained again, and the examples that it has seen.

    python scripts/verify.py runs/quickstart
    python scripts/verify.py runs/quickstart --head 3f0c52...      # a copy of the head that was kept elsewhere
    python scripts/verify.py runs/quickstart --replay 50           # train from step 50 to the next checkpoint again
    python scripts/verify.py runs/quickstart --replay all
    python scripts/verify.py runs/quickstart --seen "Jane Roe"     # a file, an id, a hash, or a text
    python scripts/verify.py release/quickstart --key public.pem   # a signed export, which needs no run beside it

Exit codes: 0, everything was compared and is equal; 1, a line names the first difference, or an export whose
checkpoint is gone and that no replay has exported again; 2, a mistake in the command, or the replay
cannot run here; 3, equal as far as compared, as the last line says. docs/check.md says what each comparison proves.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import functools
import signal

from common.command_line import new_parser
from common.errors import UserError, run_script
from scripts.verify.files import NOT_COMPARED, Differs, compare, unproved_exports
from scripts.verify.replay import NOT_EXACT, replay
from scripts.verify.seen import seen
from scripts.verify.timestamps import check_timestamps


def main() -> int:
    """Read the command line, and compare. Return the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run; with --key of an export")
    parser.add_argument("--head", metavar="HEX", help="the head of the record, or its first 16 digits or more")
    later = "with --head: entries may follow it; they are listed, and the head proves nothing of them"
    parser.add_argument("--allow-later", action="store_true", help=later)
    stamps = "compare the time stamps: certificates (PEM) of the RFC 3161 service, or the file of run.timestamp"
    parser.add_argument("--timestamps", type=Path, metavar="FILE", help=stamps)
    again = "train from the checkpoint of step K (0: the base) to the next one again and compare; all: all steps"
    parser.add_argument("--replay", metavar="K|all", help=again)
    examples = "list the training examples that a file, an id, a hash or a text names, with their steps and ranks"
    parser.add_argument("--seen", metavar="FILE|ID|TEXT", help=examples)
    parser.add_argument("--key", type=Path, metavar="FILE", help="the public key (PEM) of a signed export")
    arguments = parser.parse_args()
    if arguments.key and (arguments.head or arguments.replay or arguments.seen):
        raise UserError("--key looks at an export alone; name the run without it for --head, --replay and --seen")
    if arguments.key:
        from scripts.export.signature import verify_release

        problems = verify_release(arguments.run, arguments.key)
        print(*(problems or [f"{arguments.run}: every file is as the owner of {arguments.key} signed it"]), sep="\n")
        return 1 if problems else 0
    step = arguments.replay
    if step not in (None, "all") and not step.isdecimal():
        raise UserError(f"--replay {step}: give the step of a checkpoint, 0 for the base, or all")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the context of a replay kills its processes
    say, run = functools.partial(print, flush=True), arguments.run.absolute()
    try:
        left = list[str]()  # lines about parts that were not compared
        entries = compare(run, arguments.head, say, arguments.allow_later, left)
        for line in check_timestamps(run, entries, arguments.timestamps):
            say(line)
            left += [line] if NOT_COMPARED in line else []
        if arguments.seen:
            for line in seen(entries, arguments.seen):
                say(line)
        unproved, code = unproved_exports(run, entries), 0
        if step:
            code = replay(run, entries, None if step == "all" else int(step), say, unproved)
        for folder, entry in unproved.items():
            say(
                f"NOT PROVED: {folder} is of step {entry.step}, whose checkpoint is gone; only --replay all exports it again"
            )
        if unproved:
            return 1
        say(
            f"equal as far as compared; not compared: {len(left)} of the lines above"
            if left
            else "everything was compared and is equal"
        )
        return NOT_EXACT if left else code
    except Differs as error:
        print(f"DIFFERS: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    run_script(main)
