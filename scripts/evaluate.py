"""Evaluate a model directory on examples: exact match and ROUGE-L of its answers, your own scores, and the loss of the references.

    python scripts/evaluate.py runs/mine/export --data held_out.jsonl --metric scores:right --show 3
    python scripts/evaluate.py artifacts/models/SmolLM2-135M-Instruct --data held_out.jsonl --train mine.jsonl --shots 2
    torchrun --nproc_per_node=2 scripts/evaluate.py runs/mine/export --data held_out.jsonl --json after.json

--task MODULE names a task with its own scores, tables and baselines (eval/task.py). Every process generates (greedily) the
answers to its share of the examples. Several processes share a large model, as in training: each holds a part of it
(--sharding). With --before FILE, the JSON of an earlier evaluation of the same data, the script also prints a table
before | after, with 95% confidence intervals of the change (paired by example; eval/intervals.py). Give a base model a few --shots if
it never saw the form of the answers: otherwise "before" measures how well it guesses the form.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from dataclasses import asdict, fields

import torch.distributed as dist

from common.command_line import add_number, new_parser
from common.durable_files import write_json
from common.errors import run_script
from distributed.process_group import call_on_all, read_on_first, start_process_group
from eval import rouge  # noqa: F401 (asks for its package now, not after the answers)
from eval.asked_examples import add_task_options, read_as
from eval.evaluate_examples import EvaluationInputs, EvaluationOptions, evaluate_examples, read_inputs
from eval.load_over_ranks import add_sharding_option
from eval.metric import metric_figures
from eval.over_ranks import TIMEOUT_MINUTES
from eval.stored_answers import write_answers
from eval.task import Task, add_task_option, full_report
from model.dtypes import add_dtype_option
from model.fingerprint import fingerprint_of_base


def parse_arguments() -> tuple[argparse.Namespace, Task]:
    """Return the arguments, and the task that they name. Raise UserError for a number out of range or an unknown task."""
    parser = new_parser(__doc__)
    parser.add_argument("model", help="a Hugging Face directory (config, safetensors, tokenizer)")
    data = "one file of any form in docs/data.md; texts, completions and final tool calls count for the loss only"
    parser.add_argument("--data", required=True, type=Path, help=data)
    parser.add_argument(
        "--train", type=Path, help="the training split, for --shots, the length of an answer, and the task"
    )
    add_number(parser, "--shots", "K examples of --train stand before each prompt", 0, least=0, metavar="K")
    add_task_options(parser)
    add_number(parser, "--limit", "evaluate at most this many examples, a fixed random choice (default: all)", least=1)
    batch = "answers that each process generates at once, fewer where prompts are long"
    add_number(parser, "--batch-size", batch, EvaluationOptions.batch_size, least=1)
    longest = "maximum length of an answer (default: 25%% more than the longest in --train, or 256)"
    add_number(parser, "--max-new-tokens", longest, least=1)
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write all metrics and answers to this file")
    parser.add_argument("--answers", type=Path, help="write the answers to this file, for scripts/score.py")
    parser.add_argument("--before", type=Path, help="the JSON of an earlier evaluation to compare with")
    add_number(parser, "--show", "number of answers to print", 1, least=0)
    task = add_task_option(parser)
    task.add_options(parser)
    arguments = parser.parse_args()
    task.set_defaults(arguments)
    return arguments, task


def read_checked(options: EvaluationOptions, task: Task) -> EvaluationInputs:
    """Read the inputs, and check the fields that the task scores by, so that a mistake is reported before the model answers."""
    inputs = read_inputs(options)
    task.check(inputs.asked, str(options.data))
    task.check(inputs.training or (), str(options.train))
    return inputs


def main() -> int:
    """Evaluate; on rank 0 write the JSON and print the tables."""
    start = time.perf_counter()
    arguments, task = parse_arguments()
    options = EvaluationOptions(**{entry.name: getattr(arguments, entry.name) for entry in fields(EvaluationOptions)})
    ranks = start_process_group(TIMEOUT_MINUTES)
    inputs = read_on_first(lambda: read_checked(options, task), ranks)
    if ranks.rank == 0 and inputs.control_line:
        print(inputs.control_line, flush=True)
    user_metric = call_on_all(lambda: metric_figures(arguments.metric), ranks)
    reading = read_as(options.format, options.fields)
    task_options = read_on_first(lambda: task.read_options(arguments, reading), ranks)

    def score(texts: list[str], examples: list[dict], *files: list[dict] | str | None) -> dict:
        """Return the scores on every rank, or raise their error on every rank. Rank 0 alone fits the task's baselines."""

        def scores() -> dict:
            if options.answers:  # first, because a function of the user may fail
                write_answers(options.answers, texts, examples)
            return task.score(texts, examples, *files, **task_options) | user_metric(texts, examples)

        return read_on_first(scores, ranks)

    result = evaluate_examples(options, inputs, ranks, score)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if ranks.rank == 0:
        result["weights"] = fingerprint_of_base(options.model)  # so that a later comparison knows what was evaluated
        result |= {"task": arguments.task, "cluster": task.cluster}
        result["figures"] = [asdict(figure) for figure in task.figures(result)]
        if options.json:
            write_json(options.json, result)
        print(full_report(task, result, inputs.before, arguments.show))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_script(main)
