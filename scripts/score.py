"""Score stored answers without a model: those of any model, service or person.

    python scripts/score.py --data held_out.jsonl --answers answers.jsonl --metric scores:right
    python scripts/score.py --data artifacts/xbrl/test.jsonl --train artifacts/xbrl/train.jsonl --answers answers.jsonl
    python scripts/score.py --data artifacts/xbrl/test.jsonl --audit

Each line of --answers is an object with the keys id and answer; scripts/evaluate.py --answers writes such a file. The figures
are those of scripts/evaluate.py (docs/xbrl.md), without the ones that need a model. --audit prints what the measures say
of answers that are wrong in a known way, as a Markdown table.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from dataclasses import asdict
from typing import Any

from common.command_line import add_number, new_parser
from common.durable_files import write_json
from common.errors import run_script
from data.formats import read_examples
from eval.asked_examples import add_task_options, choose_examples, has_answer, read_as
from eval.metric import metric_figures
from eval.results import prepare_output
from eval.stored_answers import score_stored
from xbrl.answers.audit import audit, audit_table
from xbrl.answers.baselines import add_baseline_options, with_siblings
from xbrl.answers.scores import check_scored_fields, score_answers
from xbrl.answers.tables import figures, full_report


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help. Raises UserError for a number that is out of range."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="the examples that were answered")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--answers", type=Path, help="JSON Lines with the keys id and answer")
    what.add_argument("--audit", action="store_true", help="score right and wrong answers made from those of --data")
    add_task_options(parser)
    add_baseline_options(parser)
    add_number(parser, "--limit", "only the examples that scripts/evaluate.py chooses with this --limit", least=1)
    parser.add_argument("--json", type=Path, help="write all metrics and answers to this file")
    parser.add_argument("--before", type=Path, help="the JSON of an earlier evaluation to compare with")
    add_number(parser, "--show", "number of answers to print", 1, least=0)
    return with_siblings(parser.parse_args())


def main() -> int:
    """Score, write the JSON and print the tables."""
    start = time.perf_counter()
    arguments = parse_arguments()
    reading = read_as(arguments.format, arguments.fields)
    if arguments.audit:
        examples = [*filter(has_answer, choose_examples(read_examples(arguments.data, reading), arguments.limit))]
        check_scored_fields(examples, str(arguments.data))
        print(audit_table(audit(examples)))
        return 0
    if arguments.json:
        prepare_output(arguments.json)
    tuned_on = read_examples(arguments.validation, reading) if arguments.validation else []
    own = metric_figures(arguments.metric)

    def score(examples: list[dict], texts: list[str], *others: Any) -> dict:  # noqa: ANN401  those of score_answers
        found = score_answers(examples, texts, *others, validation=tuned_on, probe=arguments.probe)
        return found | own(texts, examples)

    options = arguments.train, arguments.limit, arguments.before, reading
    result, before = score_stored(arguments.data, arguments.answers, score, *options)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["figures"] = [asdict(figure) for figure in figures(result)]
    if arguments.json:
        write_json(arguments.json, result)
    print(full_report(result, before, arguments.show))
    return 0


if __name__ == "__main__":
    run_script(main)
