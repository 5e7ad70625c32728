"""Measure what scores on a task do not show: what a model has forgotten, and how far back it reads."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common.command_line import add_number, main_of
from common.dtypes import add_dtype_option
from common.errors import run_script
from eval.load_over_ranks import add_sharding_option


def forgetting(parser: argparse.ArgumentParser) -> None:
    """Measure how much general language a tuned model has forgotten: perplexity per byte, KL, agreement, questions.

        python scripts/measure.py forgetting artifacts/models/SmolLM2-135M-Instruct runs/quickstart/export
        torchrun --nproc_per_node=2 scripts/measure.py forgetting BASE TUNED --texts news.jsonl --json forgetting.json

    Every process reads its share of the texts, and holds a part of a large model (--sharding). Without --texts, the text is
    the held-out part of Python's language reference, which this project's replay and Fisher diagonal never use. Intervals
    are 95% bootstrap intervals over texts or questions. The tuned model may have an extended or a different vocabulary;
    eval/compare_models.py defines what is compared in that case.
    """
    from eval.compare_models import measure_forgetting

    parser.add_argument("base", help="the model before training: a Hugging Face directory")
    parser.add_argument("tuned", help="the model after training")
    parser.add_argument("--texts", nargs="+", type=Path, help="other texts: .txt, or .jsonl or .parquet with `text`")
    about = "approximate amount of text to read, in pieces spread evenly over all of it"
    add_number(parser, "--max-bytes", about, 200_000, least=1)
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    if table := measure_forgetting(**vars(parser.parse_args())):
        print(table)


def positions(parser: argparse.ArgumentParser) -> None:
    """Mean loss by position in long documents, up to and beyond a model's window, with its own RoPE and with scaled RoPE.

        python scripts/measure.py positions MODEL --length 12288 --rope-type yarn --rope-factor 2
        torchrun --nproc_per_node=2 scripts/measure.py positions MODEL --data reports.txt.gz --length 12288 --json after.json

    The texts of each file are joined to one long text and cut into documents of --length tokens. Without --data, the text
    is the part of Python's language reference that other evaluations do not hold out. Several processes share the
    documents, and a large model too (--sharding).
    """
    from eval.positions import measure_positions
    from model.rope import STRETCHING

    parser.add_argument("model", help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument("--data", nargs="+", type=Path, help="long texts: .txt, or .jsonl or .parquet with `text`")
    parser.add_argument("--rope-type", nargs="+", default=[], choices=tuple(STRETCHING), help="also with this scaling")
    add_number(parser, "--length", "tokens per document; may exceed the window", least=2, required=True)
    add_number(parser, "--bucket", "positions per row of the table", 1024, least=1)
    add_number(parser, "--documents", "maximum number of documents, spread over the text", 2, least=1)
    add_number(parser, "--rope-factor", "the factor by which the window is extended", kind=float)
    add_number(parser, "--rope-original-length", "the window before scaling (default: that of config.json)")
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    if table := measure_positions(**vars(parser.parse_args())):
        print(table)


def methods(parser: argparse.ArgumentParser) -> None:
    """Compare methods against forgetting on one task: plain training, low learning rate, replay, EWC, replay with EWC.

        python scripts/measure.py methods configs/quickstart.py data.mix=none --test artifacts/quickstart/test.jsonl \\
            --general artifacts/replay/topics.jsonl --out runs/comparison

    Each method is a run of train.py in --out, with the same base, examples, order and number of steps. Its model is
    evaluated on --test and, against the base, on general text that no method trains on. After an interruption the same
    command goes on. At the end it prints the table (also in comparison.md). --only runs some of
    the methods. docs/forgetting.md explains the figures. One run per method describes what came out, and proves no difference.
    """
    from experiment.methods import compare_methods

    parser.add_argument("config", help="a config of plain training, without data.mix and ewc")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run, as for train.py")
    parser.add_argument("--test", type=Path, required=True, help="examples of the task that no run trains on")
    parser.add_argument(
        "--general", type=Path, required=True, help="text of the old domain, for replay and the Fisher diagonal"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and results")
    add_number(parser, "--low", "the low learning rate relative to the config's", 1 / 3)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.25], help="of replay (default: 0.05 0.25)")
    strengths = "of EWC; the run of the first one estimates the Fisher diagonal for all (default: 1 10 100)"
    parser.add_argument("--strengths", type=float, nargs="*", default=[1, 10, 100], help=strengths)
    both = "replay and EWC together; may be repeated (default: 0.05 10 and 0.05 100)"
    names = ("SHARE", "STRENGTH")
    parser.add_argument("--both", type=float, nargs=2, action="append", metavar=names, help=both)
    add_number(parser, "--processes", "processes of each training and evaluation", 1, least=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these methods, e.g. plain replay-5")
    parser.add_argument(
        "--list", dest="plan_only", action="store_true", help="print the methods and overrides, and exit"
    )
    print(compare_methods(**vars(parser.parse_intermixed_args())))


if __name__ == "__main__":
    run_script(main_of(__doc__, forgetting, positions, methods))
