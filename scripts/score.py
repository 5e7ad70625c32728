"""Score stored answers, by any model, service or person, without loading a model.

    python scripts/score.py --data held_out.jsonl --answers answers.jsonl --metric scores:right
    python scripts/score.py --data held_out.jsonl --answers answers.jsonl --json after.json --before before.json

Each line of --answers is an object with the keys id and answer; scripts/evaluate.py --answers writes such a file. The script
prints the same scores as scripts/evaluate.py, except for the loss, which needs the model. --task MODULE names a task with its own
scores, tables and baselines (eval/task.py).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from dataclasses import asdict

from common.command_line import add_number, new_parser
from common.durable_files import write_json
from common.errors import run_script
from eval import rouge  # noqa: F401 (asks for its package now, not after the answers)
from eval.asked_examples import add_task_options, read_as
from eval.metric import metric_figures
from eval.results import prepare_output
from eval.stored_answers import score_stored
from eval.task import Task, add_task_option, full_report


def parse_arguments() -> tuple[argparse.Namespace, Task]:
    """Return the arguments, and the task that they name. Raise UserError for a number out of range or an unknown task."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="the examples that were answered")
    parser.add_argument("--answers", required=True, type=Path, help="JSON Lines with the keys id and answer")
    parser.add_argument("--train", type=Path, help="the training split, for the baselines of the task")
    add_task_options(parser)
    add_number(parser, "--limit", "score only the examples that scripts/evaluate.py chooses with this --limit", least=1)
    parser.add_argument("--json", type=Path, help="write all metrics and answers to this file")
    parser.add_argument("--before", type=Path, help="the JSON of an earlier evaluation to compare with")
    add_number(parser, "--show", "number of answers to print", 1, least=0)
    task = add_task_option(parser)
    task.add_options(parser)
    arguments = parser.parse_args()
    task.set_defaults(arguments)
    return arguments, task


def main() -> int:
    """Score, write the JSON and print the tables."""
    start = time.perf_counter()
    arguments, task = parse_arguments()
    reading = read_as(arguments.format, arguments.fields)
    if arguments.json:
        prepare_output(arguments.json)
    task_options = task.read_options(arguments, reading)
    user_metric = metric_figures(arguments.metric)

    def score(texts: list[str], examples: list[dict], *files: list[dict] | str | None) -> dict:
        return task.score(texts, examples, *files, **task_options) | user_metric(texts, examples)

    options = arguments.train, arguments.limit, arguments.before, reading
    result, before = score_stored(arguments.data, arguments.answers, score, *options)
    result |= {"seconds": round(time.perf_counter() - start, 1), "task": arguments.task, "cluster": task.cluster}
    result["figures"] = [asdict(figure) for figure in task.figures(result)]
    if arguments.json:
        write_json(arguments.json, result)
    print(full_report(task, result, before, arguments.show))
    return 0


if __name__ == "__main__":
    run_script(main)
