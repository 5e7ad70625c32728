"""Extended tokenizers: new tokens are found, and every text decodes as before."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from common.errors import UserError
from model.vocabulary import (
    can_be_token,
    extend_tokenizer,
    first_new_id,
    read_base_tokenizer,
    sub_tokens,
    write_tokenizer,
)
from tests.tiny import WORDS, tiny_tokenizer

NEW = [
    "r0010",
    " r0010",
    " c0010",
    "C 03.00",
    " capital ratio",
    " H2O capital ratio | ",
    " ratio é",
    ", of which",
    " {c0040}",
]
KINDS = ("byte-level", "normalising")
domain = st.lists(st.sampled_from([*NEW, *WORDS, " ", "\n", "12.3%", " | ", "é", "<0x0A>", "▁x", "<s>"]), max_size=12)
texts = st.one_of(domain.map("".join), domain.map(" ".join), st.text(max_size=40))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_base(directory: Path, kind: str) -> Path:
    """Write a tokenizer of a kind in KINDS. Return its directory."""
    tokenizer = tiny_tokenizer()
    if kind == "normalising":  # as Qwen
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple:
    """Return (kind, base tokenizer, extended tokenizer as loaded from its directory)."""
    folder = write_base(tmp_path_factory.mktemp("tokenizers") / request.param, request.param)
    base = read_base_tokenizer(folder)
    new = [text for text in NEW if can_be_token(base, text)]
    write_tokenizer(extend_tokenizer(base, new), folder)
    return request.param, base, AutoTokenizer.from_pretrained(folder)


def decoded(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


@settings(max_examples=60)
@given(text=texts)
def test_every_text_decodes_as_before(pair, text) -> None:
    kind, base, extended = pair
    if kind != "normalising":  # NFC depends on where the text is split
        assert decoded(extended.backend_tokenizer, text) == decoded(base, text)
    if kind == "byte-level":
        assert decoded(extended.backend_tokenizer, text) == text


@settings(max_examples=30)
@given(
    words=st.lists(st.sampled_from([word for word in WORDS if "0" not in word and "capital" not in word]), max_size=12)
)
def test_texts_without_new_tokens_are_encoded_as_before(pair, words) -> None:
    _, base, extended = pair
    ids = base.encode(" ".join(words), add_special_tokens=False).ids
    assert extended.backend_tokenizer.encode(" ".join(words), add_special_tokens=False).ids == ids


def test_longest_new_token_wins(pair) -> None:
    _, base, extended = pair
    first = first_new_id(base)
    assert len(extended) == first + len([text for text in NEW if can_be_token(base, text)])
    text = "x r0010 c0010 H2O capital ratio | 4.31%"
    ids = extended.encode(text, add_special_tokens=False)
    assert [i - first for i in ids if i >= first] == [1, 2, 5] and extended.decode(ids).strip() == text
    with_code, without = (base.encode(text, add_special_tokens=False).ids for text in ("x r0010", "x"))
    assert len(sub_tokens(base, " r0010")) == len(with_code) - len(without)


def test_can_be_token(tmp_path) -> None:
    base = read_base_tokenizer(write_base(tmp_path / "a", "byte-level"))
    assert can_be_token(base, " é") and can_be_token(base, "r0010") and not can_be_token(base, "é-code")
    assert can_be_token(base, "<|user|>")
    for rendered in ("<|im_start|>user", " is met.<|im_end|>"):  # a prompt would lose its control token
        assert not can_be_token(base, rendered)
    normalising = read_base_tokenizer(write_base(tmp_path / "b", "normalising"))
    assert not can_be_token(normalising, " e\u0301") and can_be_token(normalising, " é")


def test_other_tokenizers_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="has no valid tokenizer"):
        read_base_tokenizer(tmp_path / "nothing")
    path = write_base(tmp_path / "a", "byte-level")
    change(path / "tokenizer.json", pre_tokenizer=None)  # as sentencepiece BPE: Llama 2 and Gemma
    with pytest.raises(UserError, match="only byte-level BPE .* can be extended"):
        read_base_tokenizer(path)
    change(
        path / "tokenizer.json",
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    with pytest.raises(UserError, match="a space before"):
        read_base_tokenizer(path)
