"""The split by content is the same in any order and file, has the share that was asked for, and keeps duplicates together."""

import subprocess
import sys

import numpy as np

from data.held_out import HASH_BYTES, content_hash, is_held_out, key_of, num_repeated, num_shared

CHAT = [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "97.3%"}]
HASHES = [content_hash({"text": f"document {i}"}) for i in range(20_000)]


def test_the_hash_is_of_the_content_alone() -> None:
    whole = content_hash({"messages": CHAT, "tools": [{"name": "f", "type": "function"}]})
    assert len(whole) == HASH_BYTES
    weighted = [CHAT[0], CHAT[1] | {"weight": 0.0}]
    reordered = {"tools": [{"type": "function", "name": "f"}], "id": 7, "messages": weighted, "weight": 0.5}
    assert content_hash(reordered) == whole and "weight" in reordered["messages"][1]
    different = [
        {"messages": CHAT},
        {"messages": CHAT[::-1]},
        {"messages": [CHAT[0], CHAT[1] | {"reasoning_content": "r"}]},
        {"text": "ab"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "ab", "completion": ""},
    ]
    assert len({whole, *map(content_hash, different)}) == 1 + len(different)


def test_the_hash_is_the_same_in_another_process() -> None:
    code = "from data.held_out import content_hash; print(content_hash({'messages': [{'role': 'user', 'content': 'ü'}]}).hex())"
    command = [sys.executable, "-c", code]
    made = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": s, "PYTHONPATH": "."}, capture_output=True, text=True, check=True
        ).stdout
        for s in "12"
    }
    assert made == {content_hash({"messages": [{"role": "user", "content": "ü"}]}).hex() + "\n"}


def test_the_held_out_part_has_its_share_and_grows_with_it() -> None:
    held_out = {share: {i for i, h in enumerate(HASHES) if is_held_out(h, share)} for share in (0.0, 0.02, 0.1, 0.5)}
    assert not held_out[0.0] and held_out[0.02] < held_out[0.1] < held_out[0.5]
    for share, items in held_out.items():
        assert abs(len(items) - share * len(HASHES)) <= 4 * (len(HASHES) * share * (1 - share)) ** 0.5
    assert is_held_out(b"\0" * HASH_BYTES, 1e-9) and not is_held_out(b"\xff" * HASH_BYTES, 0.999_999)


def keys_of(hashes: list[bytes]) -> np.ndarray:
    return np.array([key_of(one) for one in hashes], dtype=np.uint64)


def test_the_split_is_independent_of_the_keys() -> None:
    """Keys are the other half of a hash: the held-out part is not a range of them."""
    keys = keys_of([h for h in HASHES if is_held_out(h, 0.1)])
    quarters = np.histogram(keys / 2**64, bins=4, range=(0, 1))[0]
    assert quarters.min() > 0.8 * len(keys) / 4


def test_repeated_and_shared_examples_are_counted() -> None:
    training, validation = keys_of([*HASHES[:100], *HASHES[:7], HASHES[0]]), keys_of(HASHES[98:103])
    assert num_repeated(training) == 8 and num_repeated(validation) == 0
    assert num_shared(training, validation) == 2 and num_shared(validation, training) == 2
    assert num_shared(training, keys_of(HASHES[:1])) == 3
    nothing = keys_of([])
    assert num_repeated(nothing) == num_shared(training, nothing) == num_shared(nothing, training) == 0
