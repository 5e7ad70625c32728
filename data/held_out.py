"""Which examples are held out for validation, and which occur more than once: both decided by a hash of what they say.

A hash depends on the example alone, not on its file, its position, the rank or the run. It is of the words and symbols of
the content: examples that differ in case, white space or the marks of a sentence alone have the same one. Such copies therefore
fall on the same side of the split, and are counted where they stand on both. A copy with another word is not found.
"""

import hashlib
import json

import numpy as np

HASH_BYTES = 16
KEY_BYTES = 8  # of a hash, kept to find duplicates; a million examples have a false one with probability 3e-8
CONTENT_KEYS = ("messages", "tools", "text", "prompt", "completion", "input_ids")  # of an example, see data/formats.py
WEIGHT_KEY = "weight"  # of a message; the same words with another weight are the same content
BUT_FOR = "but for case, white space and punctuation"  # for messages: what may differ between examples of the same hash
# What separates words, besides ASCII white space. Not symbols such as + - < %, which can be all that tells two sums apart. A
# mark becomes a space, so that 1.5 is not 15.
MARKS = b".,;:!?\"'\\"
_SPACES = bytes.maketrans(MARKS, b" " * len(MARKS))
_OTHER_MARKS = "\u00a0\u202f\u3000“”‘’„«»…。，、：；！？"


def content_hash(example: dict) -> bytes:
    """HASH_BYTES bytes that identify what an example (data/formats.py) says. Weights and unknown keys do not matter."""
    content = {key: example[key] for key in CONTENT_KEYS if key in example}
    if "messages" in content:
        messages = content["messages"]
        content["messages"] = [{key: m[key] for key in m if key != WEIGHT_KEY} for m in messages]
    return _hash(json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")))


def group_hash(example: dict, split_by: str | None) -> bytes | None:
    """What decides on which side of the split an example is: its content, or with data.split_by the value of that key alone.

    None: the example has no such key, or an empty value.
    """
    if split_by is None:
        return content_hash(example)
    value = example.get(split_by)
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)  # 7 and "7" are the same
    return None if value is None or not text.strip() else _hash(text)


def _hash(text: str) -> bytes:
    for escaped in ("\\n", "\\t", "\\r"):  # white space in JSON
        text = text.replace(escaped, " ")
    if not text.isascii():
        for mark in _OTHER_MARKS:
            text = text.replace(mark, " ")
    words = b" ".join(text.casefold().encode(errors="surrogatepass").translate(_SPACES).split())
    return hashlib.blake2b(words, digest_size=HASH_BYTES).digest()


def is_held_out(group: bytes | None, share: float) -> bool:
    """Whether the examples with this `group_hash` belong to the held-out part, a fraction `share` of all hashes.

    A larger share holds out the same examples and more.
    """
    # Not the bytes of `key_of`, so that the two decisions are independent of each other.
    return group is not None and int.from_bytes(group[KEY_BYTES:], "little") < int(share * 2**64)


def key_of(content: bytes) -> int:
    """The unsigned 64-bit key of a content hash, by which duplicates are found."""
    return int.from_bytes(content[:KEY_BYTES], "little")


def num_shared(keys: np.ndarray, others: np.ndarray) -> int:
    """Number of examples in `keys` that say what one in `others` says. Both: uint64 `(examples,)`."""
    others = np.sort(others)  # np.isin takes ten times as long for a hundred million, and several times their memory
    found = np.searchsorted(others, keys)
    return int((others[np.minimum(found, len(others) - 1)] == keys).sum()) if len(others) else 0
