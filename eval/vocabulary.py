"""Measure the effect of an extended vocabulary before training: tokens per document, loss per byte of each initialisation."""

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PretrainedConfig

from data.formats import example_text, read_files
from data.tokens import bos_ids, load_tokenizer
from eval.general_text import sample_evenly
from eval.positions import document_losses
from model.architectures import read_model_config
from model.dtypes import choose_dtype
from model.language_model import PackedLanguageModel, load_for_evaluation
from model.new_tokens import NewToken
from model.vocabulary import METHODS, Initialisation, new_rows

PASSAGE_CHARACTERS = 6000  # the loss of a text is measured on its beginning only
NUM_SHOWN = 20  # new tokens in a table


def read_texts(path: Path) -> list[str]:
    """Return the texts of a file; the messages of a chat are joined to one text."""
    return [example_text(example) for _, example in read_files([path])]


def select_passages(texts: list[str], num_bytes: int) -> list[str]:
    """Return the beginnings of evenly spaced texts, about `num_bytes` bytes in total."""
    return sample_evenly([text[:PASSAGE_CHARACTERS] for text in texts], num_bytes)


def token_table(texts: dict[str, list[str]], before: Tokenizer, after: Tokenizer) -> str:
    """Return a table of tokens per document with two tokenizers, without special tokens. texts: kind of text -> documents."""
    lines = ["", f"{'tokens per document':40} {'before':>9} {'after':>9} {'change':>8} {'documents':>10}"]
    for kind, documents in texts.items():
        old, new = (
            sum(len(t.encode(text, add_special_tokens=False).ids) for text in documents) for t in (before, after)
        )
        means = f"{old / len(documents):9.1f} {new / len(documents):9.1f}"
        lines.append(f"{kind[-40:]:40} {means} {new / max(1, old) - 1:+8.2%} {len(documents):10}")
    return "\n".join(lines)


def best_table(new_tokens: list[NewToken]) -> str:
    """Return a table of the tokens that save most in the corpus. new_tokens: the best ones first."""
    lines = ["", f"{'tokens that save most':56} {'count':>8} {'saved':>9}"]
    lines += [f"{token.text!r:56} {token.count:8,} {token.saved:9,}" for token in new_tokens[:NUM_SHOWN]]
    return "\n".join(lines)


def loss_table(
    old: Path,
    new: Path,
    first_id: int,
    sub_tokens: list[list[int]],
    init: Initialisation,
    texts: dict[str, list[str]],
    num_bytes: int,
) -> str:
    """Return a table of nats per byte before any training: the old model, and the new model with each initialisation method.

    It has a column for each kind of `texts`, measured on about `num_bytes` each. old, new: model directories. first_id and
    sub_tokens: as for `new_rows`. init: noise and seed for all methods.
    """
    passages = {kind: select_passages(part, num_bytes) for kind, part in texts.items()}
    lines = ["", f"{'loss per byte at step 0 (nats)':32}" + "".join(f"{Path(kind).name[-24:]:>26}" for kind in texts)]

    def measure(name: str, model: PackedLanguageModel, directory: Path) -> None:
        losses = [loss_per_byte(model, directory, part) for part in passages.values()]
        lines.append(f"{name:32}" + "".join(f"{loss:26.4f}" for loss in losses))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = _load(old, device)
    measure("before, old tokenizer", model, old)
    model, config = _load(new, device)
    for method in tqdm(METHODS, desc="loss of each initialisation", leave=False, disable=None):
        for number, weight in enumerate(model.vocabulary_weights()):  # embedding, then an untied head
            own_init = dataclasses.replace(init, method=method, seed=init.seed + number)
            rows = new_rows(weight.detach()[:first_id].cpu(), sub_tokens, own_init, config.initializer_range)
            with torch.no_grad():
                weight[first_id : first_id + len(rows)] = rows
        measure(method, model, new)
    return "\n".join(lines)


def loss_per_byte(model: PackedLanguageModel, directory: Path, texts: list[str]) -> float:
    """Return the total loss in nats divided by the bytes of the texts (UTF-8), which is comparable between tokenizers.

    Every text is preceded by BOS if the tokenizer of `directory` adds it, else by EOS.
    """
    tokenizer = load_tokenizer(str(directory))
    first = bos_ids(tokenizer) or [tokenizer.eos_token_id]
    documents = [[*first, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    device = model.vocabulary_weights()[0].device
    nats = sum(document_losses(model, [ids], device).sum().item() for ids in documents)
    return nats / sum(len(text.encode()) for text in texts)


def _load(directory: Path, device: torch.device) -> tuple[PackedLanguageModel, PretrainedConfig]:
    config = read_model_config(str(directory))
    return load_for_evaluation(config, str(directory), choose_dtype("auto", device), device), config
