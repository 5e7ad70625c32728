"""General English text that is available on every machine: Python's language reference (module pydoc_data.topics).

A fixed part of its topics is held out to measure forgetting. The rest may be used for replay or for EWC's Fisher
diagonal. The text differs slightly between Python versions, so perplexities are comparable only under the same version.
"""

import hashlib
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from common.errors import UserError
from data.formats import read_files

HELD_OUT_SHARE = 0.12  # of the topics: about 35 kB or 9,000 tokens
PIECE_BYTES = 1500  # about 375 tokens
# Texts written for a budget of forgetting (training/budget.py), three kinds in each file. The first chooses, the second judges.
SELECTION, CERTIFICATE = (Path(__file__).with_name("texts") / f"{name}.jsonl" for name in ("selection", "certificate"))
SOURCE = f"pydoc_data.topics of Python {platform.python_version()}"


def held_out_texts() -> list[str]:
    """Return the topics that training never sees, sorted by name, without repeated paragraphs (topics quote each other)."""
    texts = [topics[name].strip() for name in sorted(topics) if _is_held_out(name)]
    return _without(texts, seen=set())


def training_texts() -> list[str]:
    """Return the other topics, without repeated paragraphs and without those that also occur in a held-out topic."""
    held_out = {_key(paragraph) for text in held_out_texts() for paragraph in _paragraphs(text)}
    return _without([topics[name].strip() for name in sorted(topics) if not _is_held_out(name)], held_out)


def evaluation_texts(paths: Sequence[Path] | None, max_bytes: int) -> list[str]:
    """Return pieces of general text for an evaluation, from the files at `paths` or by default from the held-out topics.

    The pieces are spread evenly over the text and have about `max_bytes` bytes in total. Raises UserError if a file contains
    a chat, or if there is no text.
    """
    texts = [text for path in paths for text in read_texts(path)] if paths else held_out_texts()
    texts = sample_evenly(split_into_pieces(texts), max_bytes)
    if not texts:
        raise UserError(f"there is no text in {', '.join(map(str, paths or ()))}")
    return texts


def read_texts(path: Path) -> list[str]:
    """Return the texts of a data file (data/formats.py). Raises UserError if it contains a chat."""
    texts = []
    for where, example in read_files([path]):
        if "text" not in example:
            raise UserError(f"{where} has no `text`; this evaluation needs plain text")
        texts.append(example["text"])
    return texts


def split_into_pieces(texts: list[str], max_bytes: int = PIECE_BYTES) -> list[str]:
    """Split texts into pieces of at most `max_bytes` UTF-8 bytes, between paragraphs, lines, words or characters.

    Only white space at the splits is lost. The pieces are the same for every tokenizer and every context window.
    """
    pieces = []
    for text in texts:
        parts = [text]
        for separator in ("\n\n", "\n", " ", ""):
            parts = [smaller for part in parts for smaller in _split(part, separator, max_bytes)]
        pieces += [part for part in parts if part.strip()]
    return pieces


def sample_evenly(texts: list[str], max_bytes: int) -> list[str]:
    """Return every k-th text, so that they have about `max_bytes` UTF-8 bytes in total; all texts if they have fewer."""
    return texts[:: max(1, -(-sum(len(text.encode()) for text in texts) // max_bytes))]


def _split(text: str, separator: str, max_bytes: int) -> list[str]:
    """Split a text at some of its separators into parts of at most `max_bytes`, unless a part has no separator."""
    if len(text.encode()) <= max_bytes:
        return [text]
    parts = [""]
    for part in text.split(separator) if separator else text:
        longer = separator.join((parts[-1], part)) if parts[-1] else part
        if parts[-1] and len(longer.encode()) > max_bytes:
            parts.append(part)
        else:
            parts[-1] = longer
    return parts


def _is_held_out(name: str) -> bool:
    """Decide by a hash of the topic's name, so the answer is the same on every machine and ignores the other topics."""
    return hashlib.sha256(name.encode()).digest()[0] < HELD_OUT_SHARE * 256


def _without(texts: list[str], seen: set[str]) -> list[str]:
    """Remove paragraphs that are in `seen` or in an earlier text. Texts that become empty are dropped."""
    seen, kept = set(seen), []
    for text in texts:
        new = []
        for paragraph in _paragraphs(text):
            if _key(paragraph) not in seen:
                seen.add(_key(paragraph))
                new.append(paragraph)
        if new:
            kept.append("\n\n".join(new))
    return kept


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _key(paragraph: str) -> str:
    """Return a paragraph with its white space normalized, because topics indent and wrap their quotations differently."""
    return " ".join(paragraph.split())
