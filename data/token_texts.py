"""The text of single tokens, for people to read: what is invisible is shown, and no control character reaches a terminal.

Control characters, such as the escape that begins a terminal's commands, and characters that are invisible or change the
direction of writing are replaced by their code: ⟨U+001B⟩. Tokens that are only a part of a character are replaced by their
bytes: ⟨E2 82⟩.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")  # categories of Unicode; a plain space is excepted
MARKS = "⟦⟧⟨⟩"  # have a meaning in what is shown, so those of the data are replaced
NEWLINE, TAB = "⏎", "⇥"
MAX_TOKENS = 8  # that make up one character; it has at most 4 bytes in UTF-8
FIRST_BYTE = 0xDC00  # lone surrogates stand for bytes, as in PEP 383; a text that was read from a file has none
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of the names of byte-level BPE tokens


def visible(text: str) -> str:
    """The text with signs for newlines and tabs, and codes for other characters that are invisible or not harmless.

    The sign for a newline is followed by a line break, the only control character of the result.
    """
    return re.sub("[\udc00-\udcff]+|.", lambda match: _visible_part(match[0]), text, flags=re.DOTALL)


def one_line(text: str) -> str:
    """`visible` without line breaks."""
    return visible(text).replace("\n", "")


def _visible_part(part: str) -> str:
    """A single character, or a run of bytes."""
    code = ord(part[0]) - FIRST_BYTE
    if 0 <= code < 256:
        return f"⟨{' '.join(f'{ord(character) - FIRST_BYTE:02X}' for character in part)}⟩"
    if part == "\n":
        return NEWLINE + "\n"
    if part == "\t":
        return TAB
    if part in MARKS or (part != " " and unicodedata.category(part) in INVISIBLE):
        return f"⟨U+{ord(part):04X}⟩"
    return part


def run_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int) -> str:
    """The text of the tokens `start` to `end` (exclusive) of a sequence, for `visible`."""
    texts, first = [], start
    while first < end:
        # The shortest group of tokens that makes up whole characters.
        for last in range(first + 1, min(end, first + MAX_TOKENS) + 1):
            text = _group_text(tokenizer, ids, first, last)
            if "\ufffd" not in text:
                break
        else:
            text, last = _bytes_of(tokenizer, ids[first]), first + 1
        texts.append(text)
        first = last
    return "".join(texts)


def _group_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int) -> str:
    """Decode a group together with what is before it, because decoders trim the first space of a text."""
    for first in range(start - 1, max(-1, start - 1 - MAX_TOKENS), -1):
        before, whole = _decode(tokenizer, ids[first:start]), _decode(tokenizer, ids[first:end])
        if "\ufffd" not in before and whole.startswith(before):
            return whole[len(before) :]
    return _decode(tokenizer, ids[start:end])


def _bytes_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token that is a part of a character. If its bytes cannot be told from its name, what it decodes to."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    if fallback:
        return _as_text([int(fallback[1], 16)])
    if all(character in _BYTES for character in name):
        return _as_text(_BYTES[character] for character in name)
    return _decode(tokenizer, [token])


def _as_text(values: Iterable[int]) -> str:
    return "".join(chr(FIRST_BYTE + value) for value in values)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
