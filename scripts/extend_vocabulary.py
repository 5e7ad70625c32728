"""Give a model tokens for the strings of its domain: a new model directory, which train.py then takes as model.path.

    python scripts/extend_vocabulary.py artifacts/models/SmolLM2-135M-Instruct --out artifacts/models/SmolLM2-135M-bank \\
        --corpus artifacts/xbrl/train.jsonl --forms --held-out artifacts/xbrl/test_banks.jsonl package.txt

Corpus and held-out files are .jsonl or .parquet (chats or `text`) or .txt, each also .gz. Printed are tokens per document
before and after, on the held-out files and on general text (a held-out part of Python's own documentation), the tokens
that save most, and the loss per byte before any training for each way to initialise their rows. OUT appears only when all
of it is there; OUT/new_tokens.json lists the tokens.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PretrainedConfig

from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from data.files import read_file
from data.regulator.dpm import DISTILLED, load_cells
from data.regulator.forms import form_texts
from data.tokens import load_tokenizer
from eval import general_text
from eval.positions import losses_by_position
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel, build_on_meta, load_weights
from model.vocabulary.candidates import PATTERNS, NewToken, find_new_tokens
from model.vocabulary.rows import INITIALISATIONS, NOISE, new_rows, write_extended_model
from model.vocabulary.tokenizer import (
    can_be_token,
    extend_tokenizer,
    read_base_tokenizer,
    sub_tokens,
    write_tokenizer,
)

SHOWN = 20  # tokens
PASSAGE = 6000  # characters of a text that the loss is measured on, from its beginning


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="where new tokens are looked for")
    parser.add_argument(
        "--forms",
        nargs="*",
        metavar="MODULE",
        help="and in the EBA's forms (scripts/fetch_dpm.py), all or COREP_LCR_DA ...",
    )
    parser.add_argument(
        "--patterns",
        nargs="*",
        default=["regulator"],
        help=f"what is one token as a whole: regular expressions, or {', '.join(PATTERNS)} (%(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, default=2000, help="at most so many (%(default)s)")
    parser.add_argument(
        "--min-count", type=int, default=20, help="the floor: seen so often in the corpus (%(default)s)"
    )
    parser.add_argument("--init", choices=INITIALISATIONS, default="subtokens", help="of the new rows (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="in standard deviations of the old rows (%(default)s)"
    )
    parser.add_argument("--multiple", type=int, default=64, help="training pads the vocabulary to it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s)")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="files to measure on, not in the corpus")
    parser.add_argument(
        "--loss-bytes", type=int, default=40_000, help="of each kind to measure; 0: no loss (%(default)s)"
    )
    arguments = parser.parse_args()
    for name in ("new_tokens", "min_count", "multiple"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}")
    if arguments.noise < 0 or arguments.loss_bytes < 0:
        raise UserError("--noise and --loss-bytes must not be negative")
    if not arguments.corpus and arguments.forms is None:
        raise UserError("there is nothing to look for tokens in: give --corpus FILE or --forms")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out")
    if arguments.forms is not None and not DISTILLED.is_file():
        raise UserError("--forms needs the EBA's Data Point Model; run scripts/fetch_dpm.py")
    return arguments


def read_texts(path: Path) -> list[str]:
    """The texts of a file; of a chat all messages, as one text."""
    return [
        example["text"] if "text" in example else "\n\n".join(message["content"] for message in example["messages"])
        for _, example in read_file(path)
    ]


def read_patterns(given: list[str]) -> list[str]:
    """Regular expressions, named ones spelled out. Raises UserError for one that is none."""
    patterns = [pattern for name in given for pattern in PATTERNS.get(name, (name,))]
    for pattern in patterns:
        try:
            if re.search(pattern, ""):
                raise UserError(f"--patterns: {pattern!r} matches the empty text")
            if re.compile(pattern).groups:
                raise UserError(f"--patterns: {pattern!r} has a group; write (?:...)")
        except re.error as error:
            raise UserError(f"--patterns: {pattern!r} is no regular expression: {error}") from error
    return patterns


def main() -> int:
    """Find, extend, write, measure, print."""
    arguments = parse_arguments()
    config = read_model_config(str(arguments.model))
    base = read_base_tokenizer(arguments.model)
    corpus = [text for path in tqdm(arguments.corpus, desc="corpus", leave=False) for text in read_texts(path)]
    if arguments.forms is not None:
        corpus += form_texts(load_cells(DISTILLED), tuple(arguments.forms))
    measured = {str(path): read_texts(path) for path in arguments.held_out}
    measured["general text"] = general_text.held_out_texts()

    print(f"looking for new tokens in {len(corpus):,} texts, {sum(map(len, corpus)):,} characters ...", flush=True)
    found = find_new_tokens(
        corpus,
        lambda text: len(sub_tokens(base, text)),
        arguments.new_tokens,
        read_patterns(arguments.patterns),
        arguments.min_count,
        general_text.training_texts(),
        lambda text: can_be_token(base, text),
    )
    if not found:
        raise UserError("no string of the corpus is worth a token; give more text or lower --min-count")
    texts = [token.text for token in found]
    spelled = [sub_tokens(base, text) for text in texts]
    extended = extend_tokenizer(base, texts)

    draft = arguments.out.with_name(arguments.out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    how = {"noise": arguments.noise, "seed": arguments.seed}
    write_extended_model(
        arguments.model, draft, config, base.size, spelled, arguments.init, multiple=arguments.multiple, **how
    )
    write_tokenizer(extended, base, texts, draft)
    record = {"base": str(arguments.model), "first_id": base.size, "init": arguments.init, **how}
    record["tokens"] = [vars(token) for token in found]
    (draft / "new_tokens.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    if len(found) < arguments.new_tokens:
        print(
            f"fewer than --new-tokens {arguments.new_tokens}: every other string stands in the corpus less than --min-count "
            f"{arguments.min_count} times, or saves nothing"
        )
    print(
        f"{len(found)} new tokens, ids {base.size} to {base.size + len(found) - 1}; the model had {config.vocab_size} rows"
    )
    print(token_table(measured, base.backend, extended))
    print(best_table(found))
    if arguments.loss_bytes:
        losses = step_0_losses(arguments, config, base.size, spelled, measured, draft)
        print(loss_table(losses))
    draft.rename(arguments.out)
    print(f"{arguments.out}: rows initialised by {arguments.init}; train with model.path={arguments.out}")
    return 0


def token_table(measured: dict[str, list[str]], before: Tokenizer, after: Tokenizer) -> str:
    """Tokens per document with both tokenizers; every text is checked to decode to itself."""
    lines = ["", f"{'tokens per document':40} {'before':>9} {'after':>9} {'change':>8} {'documents':>10}"]
    for name, texts in measured.items():
        counts = [sum(len(t.encode(text, add_special_tokens=False).ids) for text in texts) for t in (before, after)]
        change = counts[1] / max(1, counts[0]) - 1
        mean = [count / len(texts) for count in counts]
        lines.append(f"{name[-40:]:40} {mean[0]:9.1f} {mean[1]:9.1f} {change:+8.2%} {len(texts):10}")
    return "\n".join(lines)


def best_table(found: list[NewToken]) -> str:
    """The tokens that save most in the corpus."""
    lines = ["", f"{'tokens that save most':56} {'count':>8} {'saved':>9}"]
    lines += [f"{token.text!r:56} {token.count:8,} {token.saved:9,}" for token in found[:SHOWN]]
    return "\n".join(lines)


def step_0_losses(
    arguments: argparse.Namespace,
    config: PretrainedConfig,
    first: int,
    spelled: list[list[int]],
    measured: dict[str, list[str]],
    directory: Path,
) -> dict[str, dict[str, float]]:
    """Row of the table -> kind of text -> loss per byte in nats: the old model, then the new one under each initialisation."""
    passages = {name: passages_of(texts, arguments.loss_bytes) for name, texts in measured.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded(arguments.model, device)
    result = {
        "before, old tokenizer": {n: loss_per_byte(model, arguments.model, t, device) for n, t in passages.items()}
    }
    model = loaded(directory, device)
    embedding, head = (
        module.weight for module in (model.causal_lm.get_input_embeddings(), model.causal_lm.get_output_embeddings())
    )
    for init in tqdm(INITIALISATIONS, desc="loss of each initialisation", leave=False):
        for number, weight in enumerate([embedding] if head is embedding else [embedding, head]):
            rows = new_rows(
                weight.detach()[:first].cpu(),
                spelled,
                init,
                arguments.noise,
                config.initializer_range,
                arguments.seed + number,
            )
            with torch.no_grad():
                weight[first : first + len(rows)] = rows
        result[init] = {name: loss_per_byte(model, directory, texts, device) for name, texts in passages.items()}
    return result


def passages_of(texts: list[str], limit: int) -> list[str]:
    """Beginnings of texts spread over all, together about `limit` bytes."""
    wanted = max(1, limit // PASSAGE)
    return [text[:PASSAGE] for text in texts[:: max(1, len(texts) // wanted)]][:wanted]


def loaded(path: Path, device: torch.device) -> PackedLanguageModel:
    """The model of a directory, for evaluation."""
    model = build_on_meta(read_model_config(str(path))).to(torch.bfloat16 if has_native_bf16(device) else torch.float32)
    load_weights(model, str(path), device)
    return model.eval()


def loss_per_byte(model: PackedLanguageModel, path: Path, texts: list[str], device: torch.device) -> float:
    """Nats over all tokens, divided by the bytes that they spell: it compares between tokenizers."""
    tokenizer = load_tokenizer(str(path))
    begin = tokenizer.bos_token_id if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else tokenizer.eos_token_id
    documents = [[begin, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    nats = sum(loss.sum().item() for loss in losses_by_position(model, documents, device))
    return nats / sum(len(text.encode()) for text in texts)


def loss_table(losses: dict[str, dict[str, float]]) -> str:
    """A row for each initialisation, a column for each kind of text."""
    names = list(next(iter(losses.values())))
    lines = ["", f"{'loss per byte at step 0 (nats)':32}" + "".join(f"{Path(name).name[-24:]:>26}" for name in names)]
    lines += [f"{row:32}" + "".join(f"{values[name]:26.4f}" for name in names) for row, values in losses.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
