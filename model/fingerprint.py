"""The fingerprint of a base model's weights.

A measured result is valid only for the weights that it was measured with. Forgetting is measured against a base model, and the
base's weights are EWC's reference. Two fine-tunes of one model have the same shapes, so the fingerprint hashes the values.
"""

import hashlib
import json
from pathlib import Path

from model.weight_files import hash_weights


def fingerprint_of_base(path: str | Path) -> str:
    """Return the SHA-256 of the SHA-256 of all weight files in a model directory, as hexadecimal digits.

    It does not depend on the names of the files, but on how the tensors are distributed over them. Raises UserError if a file is
    damaged.
    """
    return fingerprint_of_sums(hash_weights(path))


def fingerprint_of_sums(sums: dict[str, str]) -> str:
    """Return `fingerprint_of_base` from the SHA-256 of each weight file. `sums`: file -> SHA-256."""
    return hashlib.sha256(json.dumps(sorted(sums.values())).encode()).hexdigest()
