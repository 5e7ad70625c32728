"""Which examples are held out for validation, and which occur more than once: both decided by a hash of their content.

A hash depends on the example alone, not on its file, its position, the rank or the run. Duplicates therefore fall on
the same side of the split.
"""

import hashlib
import json

import numpy as np

HASH_BYTES = 16
KEY_BYTES = 8  # of a hash, kept to find duplicates; a million examples have a false one with probability 3e-8
CONTENT_KEYS = ("messages", "tools", "text", "prompt", "completion", "input_ids")  # of an example, see data/formats.py
WEIGHT_KEY = "weight"  # of a message; the same words with another weight are the same content


def content_hash(example: dict) -> bytes:
    """HASH_BYTES bytes that identify what an example (data/formats.py) says. Weights and unknown keys do not matter."""
    content = {key: example[key] for key in CONTENT_KEYS if key in example}
    if any(WEIGHT_KEY in message for message in content.get("messages", ())):
        content["messages"] = [
            {key: value for key, value in message.items() if key != WEIGHT_KEY} for message in content["messages"]
        ]
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=HASH_BYTES).digest()


def is_held_out(content: bytes, share: float) -> bool:
    """Whether the example with this content hash belongs to the held-out part, a fraction `share` of all contents.

    A larger share holds out the same examples and more.
    """
    # Not the bytes of `key_of`, so that the two decisions are independent of each other.
    return int.from_bytes(content[KEY_BYTES:], "little") < int(share * 2**64)


def key_of(content: bytes) -> int:
    """The unsigned 64-bit key of a content hash, by which duplicates are found."""
    return int.from_bytes(content[:KEY_BYTES], "little")


def num_repeated(keys: np.ndarray) -> int:
    """Number of examples whose content occurred earlier. keys: uint64 `(examples,)`."""
    ordered = np.sort(keys)
    return int((ordered[1:] == ordered[:-1]).sum())


def num_shared(keys: np.ndarray, others: np.ndarray) -> int:
    """Number of examples in `keys` whose content is also in `others`. Both: uint64 `(examples,)`."""
    if not len(others):
        return 0
    ordered = np.sort(others)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return int((ordered[places] == keys).sum())
