"""Digests that tell a base model and a tokenizer from others, without reading all of the weights.

A resumed run must continue from the same base: forgetting is measured against it, and EWC's reference are its weights.
Shapes alone do not tell two fine-tunes of a model apart, and hashing 140 GB would take minutes on every rank.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from model.weight_files import StoredTensor, stored_tensors

BLOCK = 4096  # bytes
BLOCKS = 4  # of each tensor, evenly spaced, the first and the last bytes included


def fingerprint_of_base(path: str | Path) -> str:
    """SHA-256 of the name, dtype, shape and sampled data of every tensor of a model directory, as hexadecimal digits.

    Reads at most 16 KiB of each tensor (12 MB of a 70B model), and tensors of up to that size as a whole. Fine-tuning
    moves nearly all weights, so it is seen in any of the blocks. Not seen is a change of a few elements outside of them,
    such as an edited row in the middle of the embedding. Path, file names, metadata and the distribution of the tensors
    over files do not matter. Raises UserError if a file is damaged (`stored_tensors`).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_tensors(path).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with open(tensor.file, "rb", buffering=0) as file:
            for start, size in _blocks(tensor):
                file.seek(start)
                digest.update(file.read(size))
    return digest.hexdigest()


def fingerprint_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what determines token ids and the text of a chat, as hexadecimal digits.

    That is the `tokenizers` backend (vocabulary, merges, added tokens, normaliser, pre- and post-processor) or, without
    one, class and vocabulary; and the special tokens and the chat template. Truncation and padding do not matter, because
    calls of the tokenizer change them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        contents = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        # The text of tokenizer.json, as parsing it takes seconds for a large vocabulary. Version, truncation and padding
        # stand before the added tokens.
        _, _, contents = backend.to_str().partition('"added_tokens":')
        assert contents
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [contents, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _blocks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """(start in the file, size) of the sampled blocks, in bytes."""
    if tensor.size <= BLOCKS * BLOCK:
        yield tensor.start, tensor.size
        return
    last = tensor.size - BLOCK
    for number in range(BLOCKS):
        yield tensor.start + last * number // (BLOCKS - 1), BLOCK
