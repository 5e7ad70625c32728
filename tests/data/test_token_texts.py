"""The texts of tokens: whole characters, visible signs, and nothing that a terminal would obey."""

import unicodedata

import pytest

from data.show import one_line, run_text, visible
from tests.chat_families import family_tokenizer
from tests.tiny import tiny_tokenizer

TEXT = "  The bank\n\tshall  hold 8% €😀 own\u200b funds. "


def test_what_is_invisible_or_harmful_is_replaced():
    assert visible("a\tb\nc d") == "a⇥b⏎\nc d"
    assert visible("\x1b]0;title\x07\x9b31m\r\x00\x7f") == "⟨U+001B⟩]0;title⟨U+0007⟩⟨U+009B⟩31m⟨U+000D⟩⟨U+0000⟩⟨U+007F⟩"
    assert visible("\u202eabc\u2028\u00a0\u200d\ufeff") == "⟨U+202E⟩abc⟨U+2028⟩⟨U+00A0⟩⟨U+200D⟩⟨U+FEFF⟩"
    assert visible("⟦x⟧") == "⟨U+27E6⟩x⟨U+27E7⟩"
    assert visible("é 句 😀 ½") == "é 句 😀 ½"
    assert one_line("a\nb") == "a⏎b"
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    shown = visible(everything)
    assert {character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Cn", "Zl")} == {"\n"}


@pytest.mark.parametrize("name", ["smollm2", "llama2", "mistral-v3", "gemma"])
def test_the_texts_of_tokens_make_up_the_text(name):
    tokenizer = family_tokenizer(name)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    decoded = tokenizer.decode(ids)
    assert run_text(tokenizer, ids, 0, len(ids)) == decoded
    for cut in range(len(ids)):
        halves = run_text(tokenizer, ids, 0, cut) + run_text(tokenizer, ids, cut, len(ids))
        if "\ufffd" not in tokenizer.decode(ids[:cut]):  # not inside a character
            assert halves == decoded


def test_special_tokens_are_shown():
    tokenizer = tiny_tokenizer()
    ids = [1, *tokenizer.encode("own funds"), 2]
    assert run_text(tokenizer, ids, 0, len(ids)) == "<|im_start|>own funds<|im_end|>"
