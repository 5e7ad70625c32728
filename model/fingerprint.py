"""The digest that tells a base model from others.

A result is worth something only for the weights that it was measured with: forgetting is measured against a base, and EWC's
reference are its weights. Shapes alone do not tell two fine-tunes of a model apart.
"""

import hashlib
import json
from pathlib import Path

from model.weight_files import hash_weights


def fingerprint_of_base(path: str | Path) -> str:
    """SHA-256 of the SHA-256 of all files of weights in a model directory, as hexadecimal digits.

    Their names do not matter, but the distribution of the tensors over them does. Raises UserError if a file is damaged.
    """
    return fingerprint_of_sums(hash_weights(path))


def fingerprint_of_sums(sums: dict[str, str]) -> str:
    """`fingerprint_of_base` from the SHA-256 of each file of weights, by name."""
    return hashlib.sha256(json.dumps(sorted(sums.values())).encode()).hexdigest()
