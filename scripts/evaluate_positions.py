"""Mean loss by position in long documents, up to and beyond a model's window, as it is and with its RoPE scaled.

    python scripts/evaluate_positions.py artifacts/models/SmolLM2-135M-Instruct --length 12288 --rope-type yarn --rope-factor 2
    python scripts/evaluate_positions.py runs/long/export --data reports.txt.gz more.jsonl --length 12288 --json after.json

Each file's texts are read as one long text and cut into documents of --length tokens. Without --data it is general text
that is on every machine (Python's own language reference, without the part that other evaluations hold out).
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from data.files import read_file
from data.tokens import load_tokenizer
from eval import general_text
from eval.positions import Bucket, buckets, cut, losses_by_position
from model.architectures import read_model_config
from model.language_model import build_on_meta, load_weights
from model.rope import STRETCHING

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument(
        "--data", nargs="+", type=Path, help="long texts: .txt, or .jsonl or .parquet with `text`; also .gz"
    )
    parser.add_argument("--length", type=int, required=True, help="tokens of a document; may be beyond the window")
    parser.add_argument("--bucket", type=int, default=1024, help="positions in a line of the table (%(default)s)")
    parser.add_argument("--documents", type=int, default=2, help="at most so many, spread over the text (%(default)s)")
    parser.add_argument("--rope-type", nargs="+", default=[], choices=tuple(STRETCHING), help="a column for each")
    parser.add_argument("--rope-factor", type=float, help="the window becomes this many times as long")
    parser.add_argument(
        "--rope-original-length", type=int, help="of the window; default: as the model's config.json says"
    )
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 where the hardware has it (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    for name in ("bucket", "documents"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(arguments, name)}")
    if arguments.length < 2:
        raise UserError(f"--length must be 2 or more, not {arguments.length}")
    return arguments


def main() -> int:
    """Measure each column, print the table, write the JSON."""
    arguments = parse_arguments()
    scaling = (arguments.rope_factor, arguments.rope_original_length)
    columns = {"as it is": read_model_config(arguments.model)}
    if scaling != (None, None) and not arguments.rope_type:
        raise UserError("--rope-factor and --rope-original-length need a --rope-type")
    for kind in arguments.rope_type:
        config = read_model_config(arguments.model, kind, *scaling)
        columns[f"{kind} x{arguments.rope_factor:g}"] = config
    windows = {name: config.max_position_embeddings for name, config in columns.items()}
    tokenizer = load_tokenizer(arguments.model)
    documents = long_documents(arguments, tokenizer)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arguments.dtype if arguments.dtype != "auto" else "bf16" if has_native_bf16(device) else "fp32"
    results = {}
    with tqdm(total=len(columns) * len(documents), unit="document") as bar:
        for name, config in columns.items():
            bar.set_description(name)
            model = build_on_meta(config).to(DTYPES[dtype])
            load_weights(model, arguments.model, device)
            results[name] = buckets(losses_by_position(model.eval(), documents, device, bar.update), arguments.bucket)

    source = ", ".join(map(str, arguments.data)) if arguments.data else general_text.SOURCE
    print(f"{arguments.model} on {len(documents)} documents of {arguments.length} tokens from {source} ({dtype})")
    print(f"windows: {', '.join(f'{name} {window}' for name, window in windows.items())}")
    print(table(results))
    if arguments.json:
        result = {"model": arguments.model, "source": source, "length": arguments.length, "documents": len(documents)}
        result |= {"dtype": dtype, "windows": windows}
        result["buckets"] = {name: [vars(b) | {"mean": b.mean} for b in column] for name, column in results.items()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def long_documents(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Documents of --length tokens, each beginning with BOS where the tokenizer sets one. Raises UserError for too little text."""
    if arguments.data:
        texts = [_joined(path) for path in arguments.data]
    else:
        texts = ["\n\n".join(general_text.training_texts())]
    bos = [tokenizer.bos_token_id] if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else []
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
    share = -(-arguments.documents // len(texts))
    documents = [document for ids in encoded for document in cut(ids, arguments.length, share, bos)]
    if not documents:
        longest = max(map(len, encoded))
        raise UserError(
            f"no text has --length={arguments.length} tokens, the longest has {longest}; give more with --data"
        )
    return documents[: arguments.documents]


def _joined(path: Path) -> str:
    texts = []
    for where, example in read_file(path):
        if "text" not in example:
            raise UserError(f"{where} is a chat; long texts are wanted here, with `text`")
        texts.append(example["text"])
    return "\n\n".join(texts)


def table(results: dict[str, list[Bucket]]) -> str:
    """Nats per token by position, a column for each model."""
    names = list(results)
    lines = [f"{'positions':>15} {'tokens':>7}" + "".join(f"{name:>14}" for name in names)]
    for row in zip(*results.values(), strict=True):
        where = f"{row[0].start}-{row[0].end - 1}"
        lines.append(f"{where:>15} {row[0].tokens:>7}" + "".join(f"{bucket.mean:>14.3f}" for bucket in row))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
