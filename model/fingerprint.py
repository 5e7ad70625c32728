"""Digests that tell a base model and a tokenizer from others.

A result is worth something only for the weights that it was measured with: forgetting is measured against a base, and EWC's
reference are its weights. Shapes alone do not tell two fine-tunes of a model apart.
"""

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data.tokens import backend
from model.weight_files import hash_weights


def fingerprint_of_base(path: str | Path) -> str:
    """SHA-256 of the SHA-256 of all files of weights in a model directory, as hexadecimal digits.

    Their names do not matter, but the distribution of the tensors over them does. Raises UserError if a file is damaged.
    """
    return fingerprint_of_sums(hash_weights(path))


def fingerprint_of_sums(sums: dict[str, str]) -> str:
    """`fingerprint_of_base` from the SHA-256 of each file of weights, by name."""
    return hashlib.sha256(json.dumps(sorted(sums.values())).encode()).hexdigest()


def fingerprint_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what determines token ids and the text of a chat, as hexadecimal digits.

    That is the `tokenizers` backend (vocabulary, merges, added tokens, normaliser, pre- and post-processor), the special
    tokens and the chat template. Truncation and padding do not matter, because calls of the tokenizer change them.
    """
    # The text of tokenizer.json, as parsing it takes seconds for a large vocabulary. Version, truncation and padding stand
    # before the added tokens.
    _, _, contents = backend(tokenizer).to_str().partition('"added_tokens":')
    assert contents
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [contents, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
