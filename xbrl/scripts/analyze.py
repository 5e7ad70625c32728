"""Analyse bank reports: judge them by the rules, and write a decision letter for each report (docs/xbrl.md).

    python xbrl/scripts/analyze.py MODEL FILE|DIR ... --out DIR [--register register.csv]
    python xbrl/scripts/analyze.py --engine-only FILE|DIR ... --out DIR

FILE is a report in any XBRL syntax. DIR is an unpacked package or a folder of reports. The modules of one bank and date are
joined. The rules judge the figures, and the letter consists of approved blocks (xbrl/desk/blocks). A model only proposes: the
rules confirm or refute each of its findings or leave it open, and a person decides on the facts that it read in a note
(--findings). The model's own letter is shown as a draft that is never sent.

OUT/index.html lists the reports, and OUT/findings.csv the findings. Each report has a folder with report.html, report.json,
audit.json and, once it is ready, letter.txt. A second run skips reports that have not changed. The exit code is 0 without
findings, 1 with findings or a letter that is not ready, and 2 if a file was refused; all other files are then still analysed.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import os
from dataclasses import replace

from common.command_line import add_number, new_parser
from common.errors import UserError, run_script
from xbrl.answers.profiles import PROFILES
from xbrl.desk.analysis import Options, analyse, choose_profile
from xbrl.desk.letters import LANGUAGES
from xbrl.desk.record import Form


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line. Raise UserError for a number that is out of range."""
    parser = new_parser(__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="MODEL FILE|DIR", help="the model, then the reports")
    parser.add_argument("--engine-only", action="store_true", help="without a model: all paths are reports")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="output directory (default: %(default)s)")
    draft = "write a decision letter that is not ready as letter-DRAFT.txt, with the reasons (never the model's letter)"
    parser.add_argument("--draft", action="store_true", help=draft)
    parser.add_argument("--register", type=Path, help="a CSV with the names of the banks: entity,name,country,type")
    parser.add_argument("--findings", type=Path, help="the desk's decisions on notes, in the form of findings.csv")
    hearings = "a CSV with the day on which each bank was heard, or why that is too urgent: entity,period,heard,urgent"
    parser.add_argument("--hearings", type=Path, help=hearings)
    parser.add_argument(
        "--basis", default="model", help="legal basis of the letters, in xbrl/rules/bases.json (%(default)s)"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="language of the letters (%(default)s)")
    parser.add_argument("--taxonomy", action="append", default=[], type=Path, metavar="ZIP", help="a taxonomy package")
    profile = "the profile that the model was trained on (default: from the data card of its run)"
    parser.add_argument("--profile", choices=list(PROFILES), help=profile)
    add_number(parser, "--max-new-tokens", "maximum length of an answer (default: by profile)", least=1)
    add_number(parser, "--batch-size", "number of answers generated at once", 64, least=1)
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="dtype of the model (%(default)s)"
    )
    add_number(parser, "--workers", "worker processes", os.cpu_count(), least=1)
    return parser.parse_args()


def main() -> int:
    """Analyse the reports. With a model, every rank answers its share."""
    arguments = parse_arguments()
    model, files = (None, arguments.paths) if arguments.engine_only else (arguments.paths[0], arguments.paths[1:])
    options = Options(
        files=tuple(files),
        out=arguments.out,
        draft=arguments.draft,
        register=arguments.register,
        findings=arguments.findings,
        hearings=arguments.hearings,
        taxonomy=tuple(arguments.taxonomy),
        form=Form(arguments.basis, arguments.language),
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
    )
    if model is None:
        return analyse(options)
    if not (model / "config.json").is_file():
        raise UserError(
            f"{model} is not a model directory (no config.json); name the model first, or give --engine-only"
        )
    if not files:
        raise UserError("no report is named after the model; give a file or a folder of reports")
    profile, source = choose_profile(arguments.profile, model)
    # Imported here because an analysis without a model needs no torch.
    from xbrl.desk.model_answers import analyse_over_ranks

    longest = arguments.max_new_tokens or profile.answer_tokens
    return analyse_over_ranks(replace(options, model=model, profile=profile, source=source, max_new_tokens=longest))


if __name__ == "__main__":
    run_script(main)
