"""General English text that lies on every machine: the language reference in the standard library's pydoc_data.topics.

A fixed part of its topics is held out to measure what the model forgets; the rest is free for replay or for EWC's Fisher.
The text differs a little between Python versions, so perplexities compare only under one of them.
"""

import hashlib
import platform
import re
from pydoc_data.topics import topics

HELD_OUT_SHARE = 0.12  # of the topics: about 35 kB, some 9,000 tokens
PIECE_BYTES = 1500  # some 375 tokens
SOURCE = f"pydoc_data.topics of Python {platform.python_version()}"


def held_out_texts() -> list[str]:
    """The topics that training never sees, in order of name; one that stands inside another only once."""
    texts = [topics[name].strip() for name in sorted(topics) if _is_held_out(name)]
    return _without(texts, seen=set())


def training_texts() -> list[str]:
    """The other topics, without the paragraphs that they share with a held-out one (topics quote each other)."""
    held_out = {_key(paragraph) for text in held_out_texts() for paragraph in _paragraphs(text)}
    return _without([topics[name].strip() for name in sorted(topics) if not _is_held_out(name)], held_out)


def pieces(texts: list[str], most: int = PIECE_BYTES) -> list[str]:
    """The texts in pieces of at most `most` bytes (UTF-8), cut between paragraphs, else lines, else words, else characters.

    Nothing but white space at the cuts is lost. The pieces are the same for every tokenizer and for every model's window.
    """
    found = []
    for text in texts:
        parts = [text]
        for separator in ("\n\n", "\n", " ", ""):
            parts = [part for one in parts for part in _cut(one, separator, most)]
        found += [part for part in parts if part.strip()]
    return found


def _cut(text: str, separator: str, most: int) -> list[str]:
    """The text itself where it is short enough, else cut at some of the separators."""
    if len(text.encode()) <= most:
        return [text]
    parts = [""]
    for part in text.split(separator) if separator else text:
        longer = separator.join((parts[-1], part)) if parts[-1] else part
        if parts[-1] and len(longer.encode()) > most:
            parts.append(part)
        else:
            parts[-1] = longer
    return parts


def _is_held_out(name: str) -> bool:
    """By a hash of the topic's name: the same on every machine, whatever other topics there are."""
    return hashlib.sha256(name.encode()).digest()[0] < HELD_OUT_SHARE * 256


def _without(texts: list[str], seen: set[str]) -> list[str]:
    """The texts without paragraphs that are in `seen` or came before; texts that become empty are left out."""
    seen, kept = set(seen), []
    for text in texts:
        fresh = []
        for paragraph in _paragraphs(text):
            if _key(paragraph) not in seen:
                seen.add(_key(paragraph))
                fresh.append(paragraph)
        if fresh:
            kept.append("\n\n".join(fresh))
    return kept


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _key(paragraph: str) -> str:
    """A paragraph without its layout: topics indent and wrap what they quote in other ways."""
    return " ".join(paragraph.split())
