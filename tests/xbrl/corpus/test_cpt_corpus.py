"""The corpus for continual pre-training: its documents, splits, files and data card, and the command that writes it."""

import json
import sqlite3
from collections import Counter
from contextlib import closing
from itertools import product
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from common.errors import UserError
from eval.general_text import held_out_texts, training_texts
from tests.processes import run_python
from tests.xbrl.read.dpm_database import Maker
from xbrl.corpus.cpt_corpus import (
    MAX_CHARACTERS,
    SPLITS,
    Document,
    Header,
    TableText,
    assign_documents,
    definition_documents,
    distinctive_lines,
    group_tables,
    make_corpus,
    mask_codes,
    meaning_documents,
    read_table_texts,
    rule_documents,
    split_tables,
    table_documents,
)
from xbrl.read.dpm_database import open_dpm_database


@pytest.fixture(scope="module")
def database_file(tmp_path_factory) -> Path:
    """30 tables of nine rows with different words, their meanings, and rules about one and about two tables."""
    path = tmp_path_factory.mktemp("dpm") / "dpm.sqlite"
    maker = Maker(path)
    for i in range(30):
        word = "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(8))
        rows = [
            ("Y", f"{j}0", f"{word} {'abcdefghij'[j] * 3} held for the {word}", None, 0, 0, 7) for j in range(1, 10)
        ]
        columns = [("X", "0010", f"Amount of {word}", None, 0, 0, None)]
        maker.table(f"T_{i:02}.00", f"Report on {word}", columns + rows, {f"r{j}0, c0010": 1 for j in range(1, 10)})
        maker.rule(f"v{i}_m", f"{{tT_{i:02}.00, r10, c0010}} >= {{tT_{i:02}.00, r20, c0010}}")
        maker.rule(f"w{i}_m", f"{{tT_{i:02}.00, r10, c0010}} >= {{tT_{(i + 1) % 30:02}.00, r20, c0010}}")
    maker.database.commit()
    maker.database.close()
    return path


def run(*arguments: object) -> CompletedProcess:
    return run_python("xbrl/scripts/regulator.py", "cpt", *arguments)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_corpus_has_disjoint_splits_and_cites_its_source(tmp_path, database_file) -> None:
    for name, seed in (("a", 0), ("c", 1)):
        with open_dpm_database(database_file) as database:
            card = make_corpus(database, tmp_path / name, held_out=0.1, seed=seed)
        assert json.loads((tmp_path / name / "dataset.json").read_text()) == card
    done = run("--out", tmp_path / "b", "--database", database_file, "--held-out", "0.1")
    assert done.returncode == 0, done.stderr
    names = [f"{name}.jsonl" for name in (*SPLITS, "general", "general_held_out")]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*names, "left"]
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in (*names, "dataset.json")] for folder in "abc")
    assert a == b and a[0] != c[0]
    card = json.loads(a[-1])
    parts = {split: read(tmp_path / "a" / f"{split}.jsonl") for split in SPLITS}
    for split, rows in parts.items():
        entry = card["files"][f"{split}.jsonl"]
        assert entry["documents"] == len(rows) > 2
        assert all(row["source"] == "European Banking Authority, DPM 4.2" and row["text"] for row in rows)
        assert "European Banking Authority, DPM 2.0 database, release 4.2" in entry["source"]
    split_of = {code: split for split in SPLITS for code in card["tables"][split]}
    for split, rows in parts.items():  # a rule about several tables is in the strictest split
        assert all(
            max((split_of[code] for code in row["tables"]), key=SPLITS.index, default=split) == split for row in rows
        )
    held_out = {code for split in ("validation", "test") for code in card["tables"][split]}
    assert len(held_out) == 6 and not held_out & {code for row in parts["train"] for code in row["tables"]}
    # General texts for training are not the general texts for evaluation.
    mixed_in, evaluated = (read(tmp_path / "a" / name) for name in names[3:])
    assert [row["text"] for row in mixed_in] == training_texts() and len(mixed_in) > 50
    assert [row["text"] for row in evaluated] == held_out_texts()
    (source,) = {row["source"] for row in mixed_in + evaluated}
    assert card["files"]["general.jsonl"]["source"] == source and source.startswith("pydoc_data.topics of Python")
    # No distinctive line about a held-out table is in training.
    known = {line for row in parts["train"] for line in distinctive_lines(row["text"])}
    own = [row for row in parts["test"] if set(row["tables"]) <= set(card["tables"]["test"])]
    assert len(own) >= 9 and {row["kind"] for row in own} == {"table", "meaning", "rule"}
    assert not any(line in known for row in own for line in distinctive_lines(row["text"]) if "filed in" not in line)


def test_a_user_error_is_one_sentence(tmp_path, database_file) -> None:
    sqlite3.connect(tmp_path / "other.sqlite").execute("create table x (y)")
    out = tmp_path / "out"
    for arguments, message in [
        (("--out", tmp_path), "exists; remove it or choose another --out"),
        (("--out", out, "--held-out", "0.5"), "--held-out must be at least 0 and less than 0.5, not 0.5"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
    for name, message in (("absent", "absent: no such file"), ("other.sqlite", "this is not a DPM 2.0 database")):
        with pytest.raises(UserError, match=message), open_dpm_database(tmp_path / name) as database:
            make_corpus(database, out, held_out=0.1, seed=0)
    with closing(sqlite3.connect(database_file)) as database:
        database.execute("update TableVersion set EndReleaseID = 5")  # changes are not committed
        with pytest.raises(UserError, match="contains no tables of release 4.2"):
            make_corpus(database, out, held_out=0.1, seed=0)
    assert not out.exists()


RELEASE = 5


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> sqlite3.Connection:
    """A closed table with a heading and a greyed-out cell, an open table, and rules; also older and later versions."""
    maker = Maker(tmp_path_factory.mktemp("dpm") / "dpm.sqlite")
    closed = [
        ("X", "0010", "Amount", None, 0, 0, None),
        ("X", "0020", "Ratio", None, 0, 0, None),
        ("Y", "", "LIQUID\n  ASSETS", None, 1, 0, None),
        ("Y", "0010", "Level 1 assets in total", 2, 0, 0, 7),
        ("Y", "0020", "Cash", 3, 0, 0, None),
        ("Y", "0030", "Deposits of households", None, 0, 0, 8),
    ]
    cells = {"r0010, c0010": 1, "r0010, c0020": 2, "r0020, c0010": 1, "r0030, c0010": 1, "r0030, c0020": 2}
    maker.table("L_01.00.a", "Liquidity coverage .a", closed, cells, context=8)
    maker.table("L_01.00.a", "Liquidity coverage before", closed[:1], {"r0010, c0010": 1}, release=1)
    maker.table(
        "L_02.00",
        "Large depositors",
        [("X", "0005", "Depositor", None, 0, 1, None), ("X", "0010", "Amount deposited", None, 0, 0, None)],
        {"r*, c0005": 3, "r*, c0010": 1},
    )
    maker.table("L_03.00", "Without a cell", closed, {})
    maker.rule(
        "v1_m",
        "with {tL_01.00.a, c0010, default: 0}:\n {r0010} >= {r0020} * 2",
        "Level 1 assets exceed twice the cash.",
        "warning",
    )
    maker.rule("v2_m", "{tL_01.00.a, r0010-0030, c0020} <= [eba_AT:x3]")
    maker.rule("v3_m", "{tL_01.00.a, r0010, c0010} > {tL_02.00, c0010}", "default: 0 and no words of its own here")
    maker.rule("v4_m", "{tL_09.00, r0010, c0010} > 0")
    maker.rule("v5_m", "1 > 0")
    maker.rule("v6_m", "{tL_01.00.a, r0010, c0010} > 1", release=1)
    maker.rule("v7_m", "{tL_01.00.a, r0010, c0010} > 1", release=9)
    maker.database.commit()
    return maker.database


TABLE = """\
L 01.00.a Liquidity coverage
Filed in Liquidity, module LCR
Columns:
c0010 Amount | monetary
c0020 Ratio | percentage
Rows:
LIQUID ASSETS
  r0010 Level 1 assets in total
    r0020 Cash | c0010
r0030 Deposits of households"""
OPEN_TABLE = """\
L 02.00 Large depositors
Filed in Liquidity, module LCR
Columns:
c0005 Depositor | key, string
c0010 Amount deposited | monetary
Open rows, one for each Depositor"""
MEANING = """\
What is reported in L 01.00.a Liquidity coverage
Accounting items: Liabilities
r0010 Level 1 assets in total = Accounting items: Assets; Currency: Euro
r0030 Deposits of households = Accounting items: Liabilities"""
# Greyed-out cells are omitted, and members are explained.
RULES = [
    """\
Rule v1_m (warning)
L 01.00.a Liquidity coverage
with {tL_01.00.a, c0010, default: 0}: {r0010} >= {r0020} * 2
Level 1 assets exceed twice the cash.
L 01.00.a r0010 c0010 Level 1 assets in total, Amount
L 01.00.a r0020 c0010 Cash, Amount""",
    """\
Rule v2_m (error)
L 01.00.a Liquidity coverage
{tL_01.00.a, r0010-0030, c0020} <= [eba_AT:x3]
L 01.00.a r0010 c0020 Level 1 assets in total, Ratio
L 01.00.a r0030 c0020 Deposits of households, Ratio
eba_AT:x3 Liabilities""",
    """\
Rule v3_m (error)
L 01.00.a Liquidity coverage
L 02.00 Large depositors
{tL_01.00.a, r0010, c0010} > {tL_02.00, c0010}
L 01.00.a r0010 c0010 Level 1 assets in total, Amount
L 02.00 c0010 Amount deposited""",
]
TERMS = """\
Terms: Accounting terms
Assets: What the institution owns or is owed.
Liabilities: What the institution owes to others than its owners."""


def test_the_documents_of_tables_meanings_rules_and_definitions(database) -> None:
    tables = read_table_texts(database, RELEASE)
    first, second = tables.values()  # the tables of the release that have cells
    assert list(table_documents(first)) == [Document("table", TABLE, ("L_01.00.a",))]
    assert [document.text for document in table_documents(second)] == [OPEN_TABLE]
    assert [document.text for document in meaning_documents(first)] == [MEANING] and list(
        meaning_documents(second)
    ) == []
    dropped = Counter()
    rules = list(rule_documents(database, RELEASE, tables, dropped))
    assert [rule.text for rule in rules] == RULES and rules[2].tables == ("L_01.00.a", "L_02.00")
    assert dropped == {"rules on tables that are not filed in the release": 1, "rules that name no table": 1}
    # Only definitions of the release that say more than the name.
    assert list(definition_documents(database, RELEASE)) == [Document("definition", TERMS, ())]


def table_of(code: str, labels: list[str]) -> TableText:
    rows = [Header(f"r{10 * i:04}", label, 0, False, False, "") for i, label in enumerate(labels, 1)]
    table = TableText(code, f"Table of {labels[0]}", "Liquidity, module LCR", "")
    table.headers["r"].extend(rows)
    table.headers["c"].append(Header("c0010", "Amount", 0, False, False, ""))
    table.cells.update({(row.code, "c0010"): "monetary" for row in rows})
    return table


def test_long_table_is_split_without_losing_lines() -> None:
    table = table_of("L_05.00", [f"Deposits of kind {i} without any maturity" for i in range(200)])
    parts = list(table_documents(table))
    assert len(parts) > 3 and all(len(part.text) <= MAX_CHARACTERS + 200 for part in parts)
    assert [part.text.splitlines()[0] for part in parts[1:]] == [f"{table.title} (continued)"] * (len(parts) - 1)
    rows = [line for part in parts for line in part.text.splitlines() if line.startswith("r")]
    assert rows == [f"{header.code} {header.label}" for header in table.headers["r"]]


def test_similar_tables_go_to_the_same_split() -> None:
    """40 templates of two parts each, and a copy of the very first table under another code."""
    tables = {}
    for i, part in product(range(40), "ab"):
        labels = [f"Item {part} number {j} of the kind {chr(97 + i % 26) * (2 + i // 26)}" for j in range(4 + i % 3)]
        tables[f"T_{i:02}.00.{part}"] = table_of(f"T_{i:02}.00.{part}", labels)
    tables["U_00.00"] = table_of("U_00.00", [header.label for header in tables["T_00.00.a"].headers["r"]])
    groups = group_tables(tables)
    assert groups["U_00.00"] == groups["T_00.00.a"] == groups["T_00.00.b"] and len(set(groups.values())) == 40
    sizes = {code: 100 for code in tables}
    drawn = [split_tables(groups, sizes, 0.1, seed, keep=("T_00.00.b",)) for seed in (*range(5), 0)]
    assert drawn[0] == drawn[-1] != drawn[1]
    for splits in drawn:
        assert len({(group, splits[code]) for code, group in groups.items()}) == 40  # whole groups
        assert splits["U_00.00"] == "train"  # because it resembles a table in `keep`
        counts = Counter(splits.values())
        assert 8 <= counts["validation"] <= 10 and 8 <= counts["test"] <= 10  # a tenth of 81 tables
    large = split_tables(groups, sizes | {"T_07.00.a": 2000}, 0.1, 0)
    assert large["T_07.00.a"] == "train"  # it would fill a held-out split by itself


def test_held_out_documents_seen_in_training_are_dropped() -> None:
    seen = [f"r00{i}0 Cash and reserves held at central bank number {i}" for i in range(1, 5)]
    fresh = [f"r00{i}0 Deposits {'abcdefgh'[i]} of small households and firms" for i in range(1, 5)]
    documents = [
        Document("table", "\n".join([title, *lines]), (f"{title[0]}_01.00",))
        for title, lines in (
            ("A 01.00 Own assets", seen),
            ("C 01.00 Other title of it", seen),  # a duplicate except for its codes
            ("C 02.00 A longer title", seen + fresh[:3]),
            ("C 03.00 A longer title", seen + fresh),  # half of its lines are in training
        )
    ]
    left_out = Counter()
    parts = assign_documents(documents, {"A_01.00": "train", "C_01.00": "test"}, 0.1, 0, left_out)
    assert [d.text[:7] for d in parts["test"]] == ["C 03.00"]
    assert left_out == {"duplicates": 1, "mostly seen in training": 1}
    # Lines that differ only in codes and numbers are equal, and short lines are ignored.
    assert mask_codes("r0010 Level 1 assets, C 76.00.a") == mask_codes("r0990 Level 2 assets, C 77.00.b")
    assert distinctive_lines("Total assets\nr0010 All of the assets of a bank") == ["all of the assets of a bank"]


def test_definition_split_depends_only_on_its_text() -> None:
    documents = [Document("definition", f"Terms: {i}\nTerm {'x' * i}: what it means", ()) for i in range(300)]
    parts = assign_documents(documents, {}, 0.1, 0, Counter())
    assert all(15 <= len(parts[name]) <= 45 for name in ("validation", "test"))
    backwards = assign_documents(documents[::-1], {}, 0.1, 0, Counter())
    assert all(set(parts[name]) == set(backwards[name]) for name in parts)
