"""Extend a model directory with new tokens: weights, config and tokenizer, in a new directory."""

import json
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PretrainedConfig

from model.vocabulary.candidates import NewToken
from model.vocabulary.rows import Initialisation, write_extended_model
from model.vocabulary.tokenizer import BaseTokenizer, extend_tokenizer, sub_tokens, write_tokenizer


def write_extension(
    source: Path,
    target: Path,
    config: PretrainedConfig,
    base: BaseTokenizer,
    tokens: list[NewToken],
    init: Initialisation,
    multiple: int,
) -> Tokenizer:
    """Write the model directory `source`, extended with `tokens`, into the empty directory `target`.

    config, base: those of `source`. multiple: training pads the vocabulary to it. `new_tokens.json` lists the new tokens and
    how their rows were initialised. Returns the extended tokenizer.
    """
    texts = [token.text for token in tokens]
    extended = extend_tokenizer(base, texts)
    spelled = [sub_tokens(base, text) for text in texts]
    write_extended_model(source, target, config, base.size, spelled, init, multiple)
    write_tokenizer(extended, base, texts, target)
    record = {"base": str(source), "first_id": base.size, "init": init.method, "noise": init.noise, "seed": init.seed}
    record["tokens"] = [asdict(token) for token in tokens]
    (target / "new_tokens.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return extended
