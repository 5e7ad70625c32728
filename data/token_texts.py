"""The text of single tokens, for people to read: what is invisible is shown, and no control character reaches a terminal.

Control characters, such as the escape that begins a terminal's commands, and characters that are invisible or change the
direction of writing are replaced by their code: ⟨U+001B⟩. A part of a character is shown as �.
"""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")  # categories of Unicode; a plain space is excepted
MARKS = "⟦⟧⟨⟩"  # have a meaning in what is shown, so those of the data are replaced
SIGNS = {"\n": "⏎\n", "\t": "⇥", " ": " "}
BEFORE = 8  # tokens before a run that are decoded with it


def visible(text: str) -> str:
    """The text with signs for newlines and tabs, and codes for other characters that are invisible or not harmless.

    The sign for a newline is followed by a line break, the only control character of the result.
    """
    return "".join(SIGNS.get(character) or _shown(character) for character in text)


def _shown(character: str) -> str:
    is_hidden = character in MARKS or unicodedata.category(character) in INVISIBLE
    return f"⟨U+{ord(character):04X}⟩" if is_hidden else character


def one_line(text: str) -> str:
    """`visible` without line breaks."""
    return visible(text).replace("\n", "")


def run_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int) -> str:
    """The text of the tokens `start` to `end` (exclusive) of a sequence, for `visible`.

    It is decoded together with what is before it, because decoders trim the first space of a text.
    """
    for first in range(start - 1, max(-1, start - 1 - BEFORE), -1):
        before, whole = _decode(tokenizer, ids[first:start]), _decode(tokenizer, ids[first:end])
        if "\ufffd" not in before and whole.startswith(before):
            return whole[len(before) :]
    return _decode(tokenizer, ids[start:end])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
