"""An example as text: marked targets, cuts, whole characters, nothing that a terminal would obey; sources."""

import re
import unicodedata

import numpy as np
import pytest

from data.encoding import ExampleEncoder, Outcome
from data.show import BAR, Style, describe_source, histogram, one_line, run_text, show_outcome, visible
from tests.chat_families import family_tokenizer
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "  The bank\n\tshall  hold 8% €😀 own\u200b funds. "
CHAT = {
    "messages": [
        {"role": "user", "content": "own funds?"},
        {"role": "assistant", "content": "8%\nLCR", "weight": 0.5},
        {"role": "user", "content": "The bank\x1b[2J"},
        {"role": "assistant", "content": "shall report"},
    ]
}


def shown(example, length=1000, too_long="drop", style=Style(), tokenizer=TOKENIZER):  # noqa: B008
    outcome = ExampleEncoder(tokenizer).encode([example])[0]
    return show_outcome(outcome, tokenizer, "text" in example, length, too_long, style)


def length_of(example):
    [sequence] = ExampleEncoder(TOKENIZER).encode([example])[0].sequences
    return len(sequence.ids)


def test_targets_are_marked_and_weights_precede_them():
    plain, coloured = shown(CHAT), "\n".join(shown(CHAT, style=Style(colour=True)))
    assert re.fullmatch(r"\d+ tokens, \d+ of them targets \(sum of weights [\d.]+\)", plain[0])
    assert plain[1:] == [
        "<|im_start|>user⏎",
        "own funds?<|im_end|>⏎",
        "<|im_start|>assistant⏎",
        "⟦0.5× 8%⏎",
        "LCR<|im_end|>⟧⏎",
        "<|im_start|>user⏎",
        "The bank⟨U+001B⟩[2J<|im_end|>⏎",
        "<|im_start|>assistant⏎",
        "⟦shall report<|im_end|>⟧",
    ]
    assert "\x1b[33m0.5× 8%⏎\x1b[0m\n\x1b[33mLCR<|im_end|>\x1b[0m⏎\n" in coloured  # reset on every line
    without = re.sub(r"\x1b\[(32|33|0)m", "", coloured)  # no other escape is printed
    assert without == "\n".join(plain).translate({ord("⟦"): None, ord("⟧"): None})
    assert without.replace("\n", "").isprintable()
    assert "⟦" in Style().legend() and "green" in Style(True).legend()


def test_cuts_are_reported():
    length = length_of(CHAT)
    assert shown(CHAT, length - 2, "truncate")[0] == (
        f"TOO LONG: {length} tokens, data.sequence_length={length - 2}, data.too_long=truncate: TRUNCATED: the last 2 tokens are "
        "cut off, 2 of them targets"
    )
    assert shown(CHAT, 5, "truncate")[1] == "LEFT OUT: no token of it carries loss"
    assert shown(CHAT, 5)[0].endswith("data.too_long=drop: it is dropped")
    assert shown(CHAT, 5, "error")[0].endswith("data.too_long=error: training stops with an error")
    text = {"text": "own funds " * 30}
    lines = shown(text, 20)
    pieces = -(-(length_of(text) - 1) // 19)  # each begins with the last token of the previous piece
    assert lines[0].endswith(f": it is CUT into {pieces} pieces")
    assert lines[1] == f"--- piece 1 of {pieces}"
    assert lines[-1] == f"... {pieces - 2} more pieces are not shown (--full) ..."
    assert f"--- piece {pieces} of {pieces}" in shown(text, 20, style=Style(max_tokens=None))
    assert f"... {length - 9} tokens are not shown (--full) ..." in shown(CHAT, style=Style(max_tokens=9))


def test_split_chats_notes_and_errors_are_shown():
    turns = [{"role": role, "content": "own funds"} for role in ("user", "assistant", "user", "assistant")]
    lines = shown({"messages": turns}, tokenizer=family_tokenizer("qwen3"))
    assert "--- sequence 1 of 2" in lines and "--- sequence 2 of 2" in lines
    assert lines[-1].startswith("counted in the report: chats split by answer")
    assert show_outcome(Outcome(error="bad \x1b"), TOKENIZER, False, 9, "drop") == ["REFUSED: bad ⟨U+001B⟩"]
    assert show_outcome(Outcome(notes=("weightless",)), TOKENIZER, True, 9, "drop") == [
        "LEFT OUT: nothing of it carries loss",
        "counted in the report: examples whose targets all have weight 0",
    ]


def test_invisible_and_harmful_characters_are_replaced():
    assert visible("a\tb\nc d ⟦x⟧ é 句 😀 ½") == "a⇥b⏎\nc d ⟨U+27E6⟩x⟨U+27E7⟩ é 句 😀 ½"
    assert visible("\x1b]0;t\x07\x9b31m\r\u202e\ufeff") == "⟨U+001B⟩]0;t⟨U+0007⟩⟨U+009B⟩31m⟨U+000D⟩⟨U+202E⟩⟨U+FEFF⟩"
    assert one_line("a\nb") == "a⏎b"
    everything = visible("".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)])))
    assert {c for c in everything if unicodedata.category(c) in ("Cc", "Cf", "Cn", "Zl")} == {"\n"}


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


def bars(lengths):
    """Return (range, bar, count) of each line of a histogram."""
    lines = histogram(np.array(lengths))
    assert all(len(line) <= 100 for line in lines)
    split = [(line.partition("|")[0].strip(), line.partition("|")[2]) for line in lines]
    return [(label, rest[:BAR].count("#"), int(rest[BAR:].split()[0].replace(",", ""))) for label, rest in split]


def test_a_source_is_described():
    assert [bar[::2] for bar in bars(range(100, 200))] == [(f"{low} to {low + 9}", 10) for low in range(100, 200, 10)]
    assert bars([7, 7]) == [("7", 50, 2)]
    uneven = bars([*[64] * 150, 222])
    assert uneven[0] == ("64 to 79", 50, 150) and uneven[-1][0].endswith(" to 222")
    assert [bar[1] for bar in uneven] == [50, *[0] * 8, 1]  # even a single length has a bar
    lines = describe_source(
        "data.train", "2 examples\nDROPPED 1\x1b; and why", np.array([10, 30]), np.array([2.5, 7.5])
    )
    assert lines[:3] == ["data.train:", "  2 examples", "  DROPPED 1⟨U+001B⟩; and why"]
    assert lines[-1].startswith("  targets per sequence: 2.5 to 7.5, median 5") and lines[-1].endswith(
        "25.0% of all tokens"
    )
