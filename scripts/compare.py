"""Compare trained models on the same examples: intervals, declared contrasts, figures, and a page to read.

    python scripts/compare.py tuned=runs/mine base=artifacts/models/NAME --data held_out.jsonl --metric scores:right
    python scripts/compare.py full=runs/full-1,runs/full-2,runs/full-3 lora=runs/lora-1,runs/lora-2,runs/lora-3 \\
        --data held_out.jsonl --metric scores:right --general --primary full lora right --margin right=0.05

An arm is NAME=PATH or PATH; several paths are seeds of one arm. PATH is the directory of a finished run, a model directory, or
the JSON of scripts/evaluate.py. The first arm is the reference. Without --data the validation file of the runs is used. Results
in RUN and RUN/eval are used; missing ones are measured after all checks and kept in RUN/eval (for a model directory in OUT/eval),
so the same command continues after an interruption. An arm with one seed is only described. A
declared contrast (--primary) is tested over seeds and examples; every other difference gets an interval. --task MODULE names a
task (eval/task.py), whose baselines become rows too. docs/results.md explains the tables.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from typing import Any

from common.command_line import add_number, new_parser
from common.errors import run_script
from data.formats import read_examples
from eval.asked_examples import add_task_options, choose_examples, has_answer, read_as
from eval.comparison.arms import final_validation, find_base, parse_arms, validation_data
from eval.comparison.comparison import check_metrics, check_names, compare
from eval.comparison.contrasts import declare
from eval.comparison.disagreements import beside
from eval.comparison.measured import Measuring
from eval.comparison.measures import OWN, label_terms, named_labels, with_metric
from eval.comparison.page import write_outputs
from eval.comparison.words import final_curves
from eval.intervals import terms_of
from eval.metric import metric_figures
from eval.results import prepare_output
from eval.task import Task, add_task_option


def parse_arguments() -> tuple[argparse.Namespace, Task]:
    """Return the arguments, and the task that they name. Raise UserError for a number out of range or an unknown task."""
    parser = new_parser(__doc__)
    parser.add_argument("arms", nargs="+", metavar="[NAME=]PATH[,PATH...]", help="a run, a model or a result")
    data = "examples that no arm was trained on (default: the validation file in the configs of the runs)"
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--train", type=Path, help="the training split, as for scripts/evaluate.py")
    add_task_options(parser)
    parser.add_argument("--base", help="the model before training (default: the base of the runs)")
    general = "also measure what was forgotten: perplexity, KL, general questions"
    parser.add_argument("--general", action="store_true", help=general)
    out = Path("runs/comparison")
    parser.add_argument("--out", type=Path, default=out, help="directory of the outputs (%(default)s)")
    add_number(parser, "--processes", "processes of each evaluation", 1, least=1)
    pairs = "compare every arm with every other, not only with the first"
    parser.add_argument("--pairs", action="store_true", help=pairs)
    add_number(parser, "--worst", "examples on the page with all answers", 10, least=0, metavar="N")
    add_number(
        parser, "--show", "examples to print with all answers, first those on which the arms differ most", 1, least=0
    )
    declared = parser.add_argument_group("contrasts to test", "at most three, with Holm's correction among them")
    contrast: dict[str, Any] = {"nargs": 3, "action": "append", "default": [], "metavar": ("OF", "AGAINST", "METRIC")}
    help = "a contrast of two rows, such as full lora f1; its arms need two seeds or more"
    declared.add_argument("--primary", help=help, **contrast)
    help = "the same, paired by seed: the n-th runs of both arms go together (equal run.seed)"
    declared.add_argument("--primary-paired", help=help, **contrast)
    help = "arms that differ by less are equivalent: f1=0.05 (two one-sided tests)"
    declared.add_argument("--margin", action="append", default=[], metavar="METRIC=NUMBER", help=help)
    task = add_task_option(parser)
    task.add_options(parser)
    arguments = parser.parse_args()
    task.set_defaults(arguments)
    return arguments, task


def main() -> int:
    """Measure the missing results, compare, write the outputs, and print the verdict."""
    arguments, task = parse_arguments()
    sources = parse_arms(arguments.arms)
    primary = declare(arguments.primary, arguments.primary_paired, arguments.margin, sources)
    curves = final_validation(sources)
    if curves:
        print("\n".join(["The runs' own last validation:", *final_curves(curves)]), flush=True)
    if arguments.data is None:
        file, form, fields = validation_data(sources)
        arguments.data = Path(file)
        if (arguments.format, arguments.fields) == ("auto", ""):
            arguments.format, arguments.fields = form, ",".join(f"{ours}={theirs}" for ours, theirs in fields.items())
    user_metric = metric_figures(arguments.metric)
    reading = read_as(arguments.format, arguments.fields)
    examples = read_examples(arguments.data, reading)
    training = [*filter(has_answer, read_examples(arguments.train, reading))] if arguments.train else None
    prepare_output(arguments.out / "comparison.json")
    base = arguments.base or (find_base(sources) if arguments.general else None)
    measuring = Measuring(
        arguments.data,
        arguments.train,
        base,
        arguments.general,
        arguments.out,
        arguments.processes,
        arguments.task,
        ("--format", arguments.format, "--fields", arguments.fields),
    )
    # Everything that may be refused comes before the first model computes.
    stored = measuring.stored(sources)
    measuring.check(sources, stored)
    asked = [*filter(has_answer, choose_examples(examples, stored.limit))]
    task.check(asked, str(arguments.data))
    task.check(training or (), str(arguments.train))
    task_options = task.read_options(arguments, reading)
    baselines = task.baselines(asked, training, str(arguments.data), **task_options) if asked else {}
    check_names([*sources], baselines, primary)
    perfect = [example["messages"][-1]["content"] for example in asked]
    own_scores = user_metric(perfect, asked).get("metric", {}).get("each", {}) if asked else {}
    if primary and asked:
        where = str(arguments.data), training, str(arguments.train)
        scored = task.score(perfect, asked, *where, **task_options)
        check_metrics(
            [*terms_of(scored), *label_terms(scored, named_labels([scored])), *map(OWN.__add__, own_scores)], primary
        )
    arms = with_metric(measuring.arms(sources, stored), asked, user_metric)
    result = compare(arms, baselines, asked, primary, arguments.pairs, arguments.worst, task, curves)
    written = write_outputs(result, arms, arguments.out)
    for group, sentences in result["verdict"].items():
        print("\n".join([f"{group}:", *sentences]))
    for disagreement in result["disagreements"][: arguments.show]:
        print(beside(disagreement))
    for sentence in result["warnings"]:
        print(f"warning: {sentence}")
    print("wrote", *written)
    return 0


if __name__ == "__main__":
    run_script(main)
