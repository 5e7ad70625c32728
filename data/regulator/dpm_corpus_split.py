"""Which tables are held out of the corpus, so that what is measured on them has not been trained on.

Tables repeat each other: the parts of one template, a currency's copy of it, the disclosure that mirrors a return. Those
that share most of their labels stay together. A rule on tables of several splits goes to the strictest (test before
validation before training): training never sees a rule that speaks of a held-out table.
"""

import hashlib
import random
import re
from collections.abc import Collection, Mapping, Sequence

from data.regulator.dpm_corpus import Document, TableText, template_of

SPLITS = ("train", "validation", "test")
ALIKE = 0.5  # share of labels in common (Jaccard) from which two tables stay together
MAX_SEEN = 0.5  # a held-out document of which more lines stand in training is left out
MIN_WORDS = 4  # a line with fewer words beside its codes ("Total assets") says nothing about having been seen


def group_tables(tables: Mapping[str, TableText]) -> dict[str, str]:
    """code -> the first code of its group: parts of one template, and tables that are alike, directly or through others."""
    parent = {code: code for code in tables}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    def join(one: str, other: str) -> None:
        first, second = sorted((root(one), root(other)))
        parent[second] = first

    first_of: dict[str, str] = {}
    labels = {}
    for code, table in tables.items():
        join(code, first_of.setdefault(template_of(code), code))
        labels[code] = {one.label.casefold() for axis in "rc" for one in table.headers[axis]}
    codes = list(tables)
    for i, one in enumerate(codes):
        for other in codes[:i]:
            common = len(labels[one] & labels[other])
            if common >= 3 and common >= ALIKE * len(labels[one] | labels[other]):
                join(one, other)
    return {code: root(code) for code in tables}


def split_tables(
    groups: Mapping[str, str], sizes: Mapping[str, int], held_out: float, seed: int, keep: Collection[str] = ()
) -> dict[str, str]:
    """code -> split. `held_out`: share of the sizes that validation gets, and test as well. Groups with a table of `keep`
    are for training, and so are those larger than half of that share: one table would be the whole test."""
    total = sum(sizes.values())
    members: dict[str, list[str]] = {}
    for code, group in groups.items():
        members.setdefault(group, []).append(code)
    weight = {group: sum(sizes[code] for code in codes) for group, codes in members.items()}
    order = [
        group
        for group, codes in sorted(members.items())
        if not set(codes) & set(keep) and weight[group] <= held_out * total / 2
    ]
    random.Random(f"tables {seed}").shuffle(order)
    split = dict.fromkeys(members, "train")
    for name in ("validation", "test"):
        filled = 0
        while order and filled < held_out * total:
            group = order.pop()
            split[group] = name
            filled += weight[group]
    return {code: split[group] for code, group in groups.items()}


def place_documents(
    documents: Sequence[Document], tables: Mapping[str, str], held_out: float, seed: int
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """(split -> documents, what was left out and why). `tables`: code -> split; definitions are dealt out by chance.

    Left out are a document that repeats another (a rule but for its own code, the others but for all codes and numbers), and
    a held-out one of which more than `MAX_SEEN` of the lines stand in training.
    """
    parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    seen: set[bytes] = set()
    left_out = {"duplicates": 0, "mostly seen in training": 0}
    for document in documents:
        body = document.text.partition("\n")[2] or document.text
        key = hash_of(document.kind, body if document.kind == "rule" else masked(body))
        if key in seen:
            left_out["duplicates"] += 1
            continue
        seen.add(key)
        strictest = max((SPLITS.index(tables[code]) for code in document.tables), default=None)
        if strictest is None:
            chance = random.Random(f"definitions {seed} {document.text}").random()
            strictest = 2 if chance < held_out else 1 if chance < 2 * held_out else 0
        parts[SPLITS[strictest]].append(document)
    known = {line for document in parts["train"] for line in said(document.text)}
    for name in ("validation", "test"):
        fresh = [document for document in parts[name] if share_seen(document.text, known) <= MAX_SEEN]
        left_out["mostly seen in training"] += len(parts[name]) - len(fresh)
        parts[name] = fresh
    return parts, left_out


def hash_of(*texts: str) -> bytes:
    """What stands for texts in a set."""
    return hashlib.sha256("\0".join(texts).encode()).digest()


def masked(text: str) -> str:
    """A text without its codes of tables and cells, nor numbers, in small letters."""
    text = re.sub(r"\b[A-Z]{1,2}[ _]\d+(\.\d+)*(\.[a-z]+)?\b|\b[rcs]\d{2,4}\b|\bv\d+_\w\b|\d+", " ", text)
    return "\n".join(" ".join(line.split()) for line in text.casefold().splitlines())


def said(text: str) -> list[str]:
    """The masked lines of a text that are long enough to tell."""
    return [line for line in masked(text).splitlines() if len(re.findall(r"[a-z]{2,}", line)) >= MIN_WORDS]


def share_seen(text: str, known: Collection[str]) -> float:
    """The share of the lines of a text that are in `known`."""
    lines = said(text)
    return sum(line in known for line in lines) / len(lines) if lines else 0.0
