"""An example as text: marked targets, boundaries, what is cut. Without colour unless asked for."""

import re

from data.encoding import ExampleEncoder, Outcome
from data.show import Style, show_outcome
from tests.chat_families import family_tokenizer
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
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


def test_targets_stand_between_marks_and_weights_before_them():
    lines = shown(CHAT)
    assert re.fullmatch(r"\d+ tokens, \d+ of them targets \(sum of weights [\d.]+\)", lines[0])
    assert lines[1:] == [
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


def test_colour_is_reset_on_every_line_and_no_other_escape_is_printed():
    text = "\n".join(shown(CHAT, style=Style(colour=True)))
    assert "\x1b[33m0.5× 8%⏎\x1b[0m\n\x1b[33mLCR<|im_end|>\x1b[0m⏎\n" in text
    assert text.endswith("\x1b[32mshall report<|im_end|>\x1b[0m")
    assert re.sub(r"\x1b\[(32|33|0)m", "", text).isprintable() is False  # only because of the line breaks:
    assert re.sub(r"\x1b\[(32|33|0)m|\n", "", text).isprintable()
    assert re.sub(r"\x1b\[(32|33|0)m", "", text).replace("0.5× ", "") == "\n".join(shown(CHAT)).translate(
        {ord("⟦"): None, ord("⟧"): None}
    ).replace("0.5× ", "")
    assert "\x1b" not in "\n".join(shown(CHAT)) and "⟦" in Style().legend() and "green" in Style(True).legend()


def test_what_is_cut_is_said():
    [length] = [len(s.ids) for s in ExampleEncoder(TOKENIZER).encode([CHAT])[0].sequences]
    assert shown(CHAT, length - 2, "truncate")[0] == (
        f"TOO LONG: {length} tokens, data.sequence_length={length - 2}, data.too_long=truncate: TRUNCATED: the last 2 tokens are "
        "cut off, 2 of them targets"
    )
    assert shown(CHAT, 5, "truncate")[1] == "LEFT OUT: no token of it carries loss"
    assert shown(CHAT, 5)[0].endswith("data.too_long=drop: it is dropped")
    assert shown(CHAT, 5, "error")[0].endswith("data.too_long=error: training stops with an error")
    text = {"text": "own funds " * 30}
    [count] = [len(s.ids) for s in ExampleEncoder(TOKENIZER).encode([text])[0].sequences]
    lines = shown(text, 20)
    pieces = -(-(count - 1) // 19)  # each begins with the last token of the one before
    assert lines[0].endswith(f": it is CUT into {pieces} pieces")
    assert lines[1] == f"--- piece 1 of {pieces}"
    assert lines[-1] == f"... {pieces - 2} more pieces are not shown (--full) ..."
    assert f"--- piece {pieces} of {pieces}" in shown(text, 20, style=Style(max_tokens=None))


def test_split_chats_notes_and_errors_are_shown():
    turns = [{"role": role, "content": "own funds"} for role in ("user", "assistant", "user", "assistant")]
    lines = shown({"messages": turns}, tokenizer=family_tokenizer("qwen3"))
    assert "--- sequence 1 of 2" in lines and "--- sequence 2 of 2" in lines
    assert lines[-1].startswith("counted in the report: chats split by answer")
    assert show_outcome(Outcome(error="bad \x1b"), TOKENIZER, False, 9, "drop") == ["REFUSED: bad ⟨U+001B⟩"]
    assert show_outcome(Outcome(notes=("weightless",)), TOKENIZER, True, 9, "drop") == [
        "LEFT OUT: nothing of it carries loss",
        "counted in the report: examples in which all that would carry loss has weight 0",
    ]
