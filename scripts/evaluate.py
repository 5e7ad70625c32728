"""Evaluate a model directory on examples: exact match and ROUGE-L of its answers, scores of your own, the loss of the references.

    python scripts/evaluate.py runs/mine/export --data held_out.jsonl --metric scores:right --show 3
    python scripts/evaluate.py artifacts/models/SmolLM2-135M-Instruct --data FILE --train FILE --shots 2 --constrained
    torchrun --nproc_per_node=2 scripts/evaluate.py runs/quickstart/export --data FILE --train FILE --json after.json

Of bank reports it scores rules, facts and letters (docs/xbrl.md). Every process generates (greedily) the answers to its share of
the examples. Several processes share a large model, as in training: each holds a part of it (--sharding). With --before FILE,
the JSON of an earlier evaluation of the same data, a table before | after is printed as well, with 95% confidence intervals of
the change (bootstrap, paired by example). A base model that never saw the form of the answers is asked fairly with --shots and
--constrained: else "before" measures the form.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from common.command_line import add_number, new_parser
from common.dtypes import add_dtype_option
from common.durable_files import write_json
from common.errors import run_script
from data.formats import read_examples
from distributed.process_group import call_on_all, read_on_first, start_process_group
from eval.asked_examples import add_task_options, read_as
from eval.evaluate_examples import EvaluationInputs, EvaluationOptions, evaluate_examples, read_inputs
from eval.load_over_ranks import add_sharding_option
from eval.metric import metric_figures
from eval.over_ranks import TIMEOUT_MINUTES
from eval.stored_answers import write_answers
from model.fingerprint import fingerprint_of_base
from xbrl.answers import tables as report
from xbrl.answers.baselines import add_baseline_options, with_siblings
from xbrl.answers.scores import check_scored_fields, score_answers


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = new_parser(__doc__)
    parser.add_argument("model", help="a Hugging Face directory (config, safetensors, tokenizer)")
    data = "one file of any form in docs/data.md; texts, completions and last calls of tools count for the loss only"
    parser.add_argument("--data", required=True, type=Path, help=data)
    add_baseline_options(parser)
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
    return with_siblings(parser.parse_args())


def read_checked(options: EvaluationOptions) -> EvaluationInputs:
    """`read_inputs`, and what the scores of this task need: a mistake is reported before the answers are generated."""
    inputs = read_inputs(options)
    check_scored_fields(inputs.examples, str(options.data))
    check_scored_fields(inputs.training or (), str(options.train))
    return inputs


def main() -> int:
    """Evaluate; on rank 0 write the JSON and print the tables."""
    start = time.perf_counter()
    arguments = vars(parse_arguments())
    show, validation, probe, metric = (arguments.pop(name) for name in ("show", "validation", "probe", "metric"))
    options = EvaluationOptions(**arguments)
    ranks = start_process_group(TIMEOUT_MINUTES)
    inputs = read_on_first(lambda: read_checked(options), ranks)
    if ranks.rank == 0 and inputs.control_line:
        print(inputs.control_line, flush=True)
    own = call_on_all(lambda: metric_figures(metric), ranks)
    reading = read_as(options.format, options.fields)
    tuned_on = read_on_first(lambda: read_examples(validation, reading) if validation else [], ranks)

    def score(*arguments: Any) -> dict:  # noqa: ANN401  those of score_answers
        """The scores on all ranks, or their error: the first rank fits the baselines, and the others need not fit them too."""
        examples, texts, *_ = arguments

        def scores() -> dict:
            if options.answers:  # before a function of the user's may fail
                write_answers(options.answers, examples, texts)
            return score_answers(*arguments, validation=tuned_on, probe=probe) | own(texts, examples)

        return read_on_first(scores, ranks)

    result = evaluate_examples(options, inputs, ranks, score)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if ranks.rank == 0:
        result["weights"] = fingerprint_of_base(options.model)  # so that a later comparison knows what was evaluated
        result["figures"] = [asdict(figure) for figure in report.figures(result)]
        if options.json:
            write_json(options.json, result)
        print(report.full_report(result, inputs.before, show))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_script(main)
