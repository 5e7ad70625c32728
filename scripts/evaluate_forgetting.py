"""What a tuned model forgot of general language, against its base: perplexity per byte, KL, agreement, general questions.

    python scripts/evaluate_forgetting.py artifacts/models/SmolLM2-135M-Instruct runs/laptop/export
    torchrun --nproc_per_node=2 scripts/evaluate_forgetting.py BASE TUNED --texts news.jsonl --json forgetting.json

Every process holds both models and reads its share. Without --texts the text is the held-out part of Python's language
reference, which replay and Fisher of this project never see. The intervals are 95%, by a bootstrap over texts or questions.
The tuned model may have an extended or another vocabulary; what is compared then is in eval/compare_models.py.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from data.files import read_file
from data.tokens import load_tokenizer
from distributed.process_group import start_process_group
from eval import general_text
from eval.compare_models import Loaded, before_after, table
from eval.forgetting import spread_over
from eval.questions import read_questions
from eval.results import prepare_output, write_result
from model.architectures import read_model_config
from model.language_model import build_on_meta, load_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the model before training: a Hugging Face directory")
    parser.add_argument("tuned", help="the model after training")
    parser.add_argument(
        "--texts", nargs="+", type=Path, help="other general text: .txt, or .jsonl or .parquet with `text`"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=200_000,
        help="about so much text, in whole pieces spread over all of it (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the intervals (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 where the hardware has it (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.max_bytes < 1:
        raise UserError(f"--max-bytes must be 1 or more, not {arguments.max_bytes}")
    return arguments


def main() -> int:
    """Measure, print the table on rank 0, write the JSON."""
    arguments = parse_arguments()
    start = time.perf_counter()
    # All that can be a mistake comes before a process group starts, so that it is one sentence.
    configs = [read_model_config(path) for path in (arguments.base, arguments.tuned)]
    tokenizers = [load_tokenizer(path) for path in (arguments.base, arguments.tuned)]
    texts = general_text.held_out_texts()
    if arguments.texts:
        found = [(where, example) for path in arguments.texts for where, example in read_file(path)]
        chats = [where for where, example in found if "text" not in example]
        if chats:
            raise UserError(f"{chats[0]} is a chat; general text is wanted here, with `text`")
        texts = [example["text"] for _, example in found]
    texts = spread_over(general_text.pieces(texts), arguments.max_bytes)
    if not texts:
        raise UserError(f"there is no text in {', '.join(map(str, arguments.texts))}")
    questions = read_questions()
    if arguments.json:
        prepare_output(arguments.json)

    ranks = start_process_group(timeout_minutes=24 * 60)
    dtype = arguments.dtype if arguments.dtype != "auto" else "bf16" if has_native_bf16(ranks.device) else "fp32"
    models = [build_on_meta(config).to(DTYPES[dtype]).eval() for config in configs]
    for model, path in zip(models, (arguments.base, arguments.tuned), strict=True):
        load_weights(model, path, ranks.device)
    base, tuned = (Loaded(*pair) for pair in zip(models, tokenizers, strict=True))
    total = 2 * -(-(2 * len(texts) + sum(len(q.options) for q in questions)) // ranks.world_size)
    what = "documents" if ranks.world_size == 1 else f"documents (rank 0 of {ranks.world_size})"
    with tqdm(total=total, desc=what, unit="document", disable=ranks.rank != 0) as bar:
        result = before_after(base, tuned, texts, questions, ranks, bar.update, arguments.seed)
    result = {
        "base": arguments.base,
        "tuned": arguments.tuned,
        "text": ", ".join(map(str, arguments.texts)) if arguments.texts else general_text.SOURCE,
        "dtype": dtype,
        "processes": ranks.world_size,
        "seconds": round(time.perf_counter() - start, 1),
        **result,
    }
    if ranks.rank == 0:
        print(f"{arguments.tuned} against {arguments.base} on {result['text']} ({dtype}, {result['seconds']:.0f} s)\n")
        print(table(result))
        if arguments.json:
            write_result(arguments.json, result)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_script(main)
