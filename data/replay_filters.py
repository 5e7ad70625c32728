"""What of a text is worth replaying: filters for documents that a model wrote itself, and for what evaluation must not see.

All of it counts shingles: runs of SHINGLE characters of a text without its layout and case. Characters, since they need
neither spaces between words nor a tokenizer.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHINGLE = 24  # characters
EVALUATED = 50  # characters in a row that a text may not have in common with what is evaluated
KEPT = 4  # a fourth of the shingles, chosen by hash, stands for a text where texts are compared


@dataclass(frozen=True)
class Filters:
    """When a document is left out."""

    min_characters: int = 100
    repeated: float = 0.3  # more than this share of its shingles stood in it before: it goes round in circles
    alike: float = 0.5  # Jaccard similarity of the shingles with a document before it


def filtered(texts: Sequence[str], filters: Filters, evaluated: "Evaluated") -> tuple[list[int], dict[str, int]]:
    """(the numbers of the texts that are kept, how many were left out by reason). The first of texts that are alike stays."""
    kept, left_out = [], dict.fromkeys(("too short", "repetitive", "duplicate", "near duplicate", "evaluated"), 0)
    seen: set[str] = set()
    holders: dict[int, list[int]] = {}  # shingle -> the kept texts that have it
    sizes: dict[int, int] = {}
    for number, text in enumerate(texts):
        plain = normalised(text)
        marks = sketch(plain)
        if len(plain) < filters.min_characters:
            reason = "too short"
        elif repetition(plain) > filters.repeated:
            reason = "repetitive"
        elif plain in seen:
            reason = "duplicate"
        elif _most_alike(marks, holders, sizes) > filters.alike:
            reason = "near duplicate"
        elif evaluated.overlaps(plain):
            reason = "evaluated"
        else:
            seen.add(plain)
            kept.append(number)
            sizes[number] = len(marks)
            for mark in marks:
                holders.setdefault(mark, []).append(number)
            continue
        left_out[reason] += 1
    return kept, left_out


class Evaluated:
    """Texts that evaluation uses: a set of their shingles, and short ones as a whole."""

    def __init__(self, texts: Iterable[str]) -> None:
        plain = [normalised(text) for text in texts]
        self.shingles = {shingle for text in plain for shingle in shingles(text, EVALUATED)}
        self.short = [text for text in plain if 0 < len(text) < EVALUATED]

    def overlaps(self, plain: str) -> bool:
        """Whether a normalised text has EVALUATED characters in a row, or a whole short text, in common with them."""
        if any(shingle in self.shingles for shingle in shingles(plain, EVALUATED)):
            return True
        return any(text in plain and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain) for text in self.short)


def normalised(text: str) -> str:
    """Without layout and case: one space for any white space."""
    return " ".join(text.split()).casefold()


def shingles(plain: str, size: int = SHINGLE) -> Iterable[str]:
    """All runs of `size` characters, in order; none of a shorter text."""
    return (plain[i : i + size] for i in range(len(plain) - size + 1))


def repetition(plain: str) -> float:
    """The share of shingles that stood in the text before: 0 for most prose, near 1 for a loop."""
    total = len(plain) - SHINGLE + 1
    return 1 - len(set(shingles(plain))) / total if total > 0 else 0.0


def sketch(plain: str) -> set[int]:
    """The shingles that stand for a text: those with a hash divisible by KEPT. The same ones are chosen in every text."""
    return {mark for mark in (zlib.crc32(shingle.encode()) for shingle in shingles(plain)) if mark % KEPT == 0}


def _most_alike(marks: set[int], holders: dict[int, list[int]], sizes: dict[int, int]) -> float:
    """The largest Jaccard similarity with a kept text."""
    common: dict[int, int] = {}
    for mark in marks:
        for number in holders.get(mark, ()):
            common[number] = common.get(number, 0) + 1
    return max((n / (len(marks) + sizes[number] - n) for number, n in common.items()), default=0.0)


def ended(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence or line; empty if there is none.

    Behind it stands EOS in training: within a sentence that would be learned as an end.
    """
    ends = [match.end() for match in re.finditer(r"[.!?…。！？][\"'”’)\]]*(?=\s|$)|(?<=[。！？])|\n", text)]
    return text[: ends[-1]].rstrip() if ends else ""
