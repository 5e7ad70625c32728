"""Split examples into training and validation, and find duplicates: both by a hash of their content.

A hash depends on the example alone, not on its file, its position, the rank or the run. It covers the words and symbols of the
content: examples that differ only in case, white space or punctuation have the same hash. Such copies therefore fall on the same
side of the split, and are counted as duplicates. A copy with a different word is not found.
"""

import hashlib
import json

import numpy as np

HASH_BYTES = 16
KEY_BYTES = 8  # of a hash, kept to find duplicates; among a million examples a false one has probability 3e-8
CONTENT_KEYS = ("messages", "tools", "text", "prompt", "completion", "input_ids")  # of an example, see data/formats.py
WEIGHT_KEY = "weight"  # of a message; two messages that differ in weight alone have the same content
BUT_FOR = "but for case, white space and punctuation"  # in messages: the differences that a hash ignores
# Characters that separate words, besides ASCII white space. Symbols such as + - < % are kept, because they can be the only
# difference between two sums. A mark becomes a space, so that 1.5 differs from 15.
MARKS = b".,;:!?\"'\\"
_SPACES = bytes.maketrans(MARKS, b" " * len(MARKS))
_OTHER_MARKS = "\u00a0\u202f\u3000“”‘’„«»…。，、：；！？"


def content_hash(example: dict) -> bytes:
    """Return HASH_BYTES bytes that identify the content of an example (data/formats.py), without weights and unknown keys."""
    content = {key: example[key] for key in CONTENT_KEYS if key in example}
    if "messages" in content:
        messages = content["messages"]
        content["messages"] = [{key: m[key] for key in m if key != WEIGHT_KEY} for m in messages]
    return _hash(json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":")))


def group_hash(example: dict, split_by: str | None) -> bytes | None:
    """Return the hash that decides the side of the split: of the example's content, or of its value of data.split_by.

    Return None if the example has no such key or an empty value.
    """
    if split_by is None:
        return content_hash(example)
    value = example.get(split_by)
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)  # 7 and "7" are the same
    return None if value is None or not text.strip() else _hash(text)


def _hash(text: str) -> bytes:
    for escaped in ("\\n", "\\t", "\\r"):  # white space as JSON escapes it
        text = text.replace(escaped, " ")
    if not text.isascii():
        for mark in _OTHER_MARKS:
            text = text.replace(mark, " ")
    words = b" ".join(text.casefold().encode(errors="surrogatepass").translate(_SPACES).split())
    return hashlib.blake2b(words, digest_size=HASH_BYTES).digest()


def is_held_out(group: bytes | None, share: float) -> bool:
    """Return whether the examples with this `group_hash` are held out, as a fraction `share` of all hashes is.

    A larger share holds out the same examples and more.
    """
    # Other bytes than in `key_of`, so that the two decisions are independent of each other.
    return group is not None and int.from_bytes(group[KEY_BYTES:], "little") < int(share * 2**64)


def key_of(content: bytes) -> int:
    """Return the unsigned 64-bit key of a content hash, by which duplicates are found."""
    return int.from_bytes(content[:KEY_BYTES], "little")


def num_shared(keys: np.ndarray, other_keys: np.ndarray) -> int:
    """Return the number of `keys` that also occur in `other_keys`. Both: uint64 `(examples,)`."""
    # np.isin takes ten times as long for a hundred million keys, and several times their memory.
    other_keys = np.sort(other_keys)
    places = np.searchsorted(other_keys, keys)
    return int((other_keys[np.minimum(places, len(other_keys) - 1)] == keys).sum()) if len(other_keys) else 0
