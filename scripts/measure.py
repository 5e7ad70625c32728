"""Measure how much a model has forgotten, and how its loss depends on the position in long documents."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common.command_line import add_number, main_of
from common.errors import run_script
from eval.load_over_ranks import add_sharding_option
from model.dtypes import add_dtype_option


def forgetting(parser: argparse.ArgumentParser) -> None:
    """Measure how much general language a tuned model has forgotten: perplexity per byte, KL, agreement, questions.

        python scripts/measure.py forgetting artifacts/models/SmolLM2-135M-Instruct runs/quickstart/export
        torchrun --nproc_per_node=2 scripts/measure.py forgetting BASE TUNED --texts news.jsonl --json forgetting.json

    Every process reads its share of the texts, and holds a part of a large model (--sharding). Without --texts, the text is
    the held-out part of Python's language reference, which this project's replay and Fisher diagonal never use. Intervals
    are 95% over texts or questions. The tuned model may have an extended or a different vocabulary; KL and
    agreement are then computed over the tokens that both models have (eval/compare_models.py).
    """
    from eval.compare_models import measure_forgetting

    parser.add_argument("base", help="the model before training: a Hugging Face directory")
    parser.add_argument("tuned", help="the model after training")
    parser.add_argument("--texts", nargs="+", type=Path, help="other texts: .txt, or .jsonl or .parquet with `text`")
    about = "approximate amount of text to read, in pieces spread evenly over all texts"
    add_number(parser, "--max-bytes", about, 200_000, least=1)
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    if table := measure_forgetting(**vars(parser.parse_args())):
        print(table)


def positions(parser: argparse.ArgumentParser) -> None:
    """Measure the mean loss by position in long documents, up to and beyond the model's window, with its own and scaled RoPE.

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
    add_number(parser, "--rope-original-length", "the window before scaling (default: from config.json)")
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    if table := measure_positions(**vars(parser.parse_args())):
        print(table)


if __name__ == "__main__":
    run_script(main_of(__doc__, forgetting, positions))
