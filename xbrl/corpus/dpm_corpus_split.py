"""Split the DPM corpus into training, validation and test so that evaluation text has not been trained on.

Whole tables are held out. Many tables overlap: parts of one template, copies per currency, disclosures that mirror a
return. Tables that share most of their labels therefore go to the same split. A rule about tables of several splits
goes to the strictest one (test, then validation, then training), so training never sees a rule about a held-out table.
"""

import hashlib
import random
import re
from collections.abc import Collection, Mapping, Sequence

from xbrl.corpus.dpm_corpus import Document, TableText, template_of

SPLITS = ("train", "validation", "test")
MIN_OVERLAP = 0.5  # Jaccard similarity of labels at or above which two tables go to the same split
MAX_SEEN = 0.5  # held-out documents with a larger fraction of lines seen in training are dropped
MIN_WORDS = 4  # shorter lines ("Total assets") are too common to count as seen


def group_tables(tables: Mapping[str, TableText]) -> dict[str, str]:
    """Table code -> first code of its group.

    A group joins the parts of a template and, transitively, overlapping tables.
    """
    parent = {code: code for code in tables}

    def root(code: str) -> str:
        while parent[code] != code:
            code = parent[code]
        return code

    def join(a: str, b: str) -> None:
        first, second = sorted((root(a), root(b)))
        parent[second] = first

    first_of: dict[str, str] = {}
    labels = {}
    for code, table in tables.items():
        join(code, first_of.setdefault(template_of(code), code))
        labels[code] = {header.label.casefold() for axis in "rc" for header in table.headers[axis]}
    codes = list(tables)
    for i, a in enumerate(codes):
        for b in codes[:i]:
            common = len(labels[a] & labels[b])
            if common >= 3 and common >= MIN_OVERLAP * len(labels[a] | labels[b]):
                join(a, b)
    return {code: root(code) for code in tables}


def split_tables(
    groups: Mapping[str, str], sizes: Mapping[str, int], held_out: float, seed: int, keep: Collection[str] = ()
) -> dict[str, str]:
    """Table code -> split. Validation and test each get about the fraction `held_out` of the total size.

    Groups with a table in `keep` go to training. So do groups larger than half of a held-out split, because a single
    group would dominate it.
    """
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


def assign_documents(
    documents: Sequence[Document], tables: Mapping[str, str], held_out: float, seed: int
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """(split -> documents, number of dropped documents by reason). `tables` maps table codes to splits.

    Definitions belong to no table and are assigned at random. Drops duplicates: rules are compared without their own
    code, other documents without any codes or numbers. Drops held-out documents with more than the fraction `MAX_SEEN`
    of their lines in training.
    """
    parts: dict[str, list[Document]] = {name: [] for name in SPLITS}
    seen: set[bytes] = set()
    left_out = {"duplicates": 0, "mostly seen in training": 0}
    for document in documents:
        body = document.text.partition("\n")[2] or document.text
        key = digest(document.kind, body if document.kind == "rule" else mask_codes(body))
        if key in seen:
            left_out["duplicates"] += 1
            continue
        seen.add(key)
        strictest = max((SPLITS.index(tables[code]) for code in document.tables), default=None)
        if strictest is None:
            chance = random.Random(f"definitions {seed} {document.text}").random()
            strictest = 2 if chance < held_out else 1 if chance < 2 * held_out else 0
        parts[SPLITS[strictest]].append(document)
    known = {line for document in parts["train"] for line in distinctive_lines(document.text)}
    for name in ("validation", "test"):
        fresh = [document for document in parts[name] if fraction_seen(document.text, known) <= MAX_SEEN]
        left_out["mostly seen in training"] += len(parts[name]) - len(fresh)
        parts[name] = fresh
    return parts, left_out


def digest(*texts: str) -> bytes:
    """SHA-256 of several texts."""
    return hashlib.sha256("\0".join(texts).encode()).digest()


def mask_codes(text: str) -> str:
    """The text in lower case without table codes, cell codes and numbers."""
    text = re.sub(r"\b[A-Z]{1,2}[ _]\d+(\.\d+)*(\.[a-z]+)?\b|\b[rcs]\d{2,4}\b|\bv\d+_\w\b|\d+", " ", text)
    return "\n".join(" ".join(line.split()) for line in text.casefold().splitlines())


def distinctive_lines(text: str) -> list[str]:
    """The mask_codes lines of a text that have at least `MIN_WORDS` words."""
    return [line for line in mask_codes(text).splitlines() if len(re.findall(r"[a-z]{2,}", line)) >= MIN_WORDS]


def fraction_seen(text: str, known: Collection[str]) -> float:
    """Fraction of the distinctive lines of a text that are in `known`."""
    lines = distinctive_lines(text)
    return sum(line in known for line in lines) / len(lines) if lines else 0.0
