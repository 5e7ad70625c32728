"""The corpus for continual pre-training: its documents and splits, its files and data card, and the script that makes it."""

import json
import sqlite3
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from common.errors import UserError
from eval.general_text import held_out_texts, training_texts
from tests.processes import run_python
from tests.xbrl.read.dpm_database import Maker
from xbrl.corpus.cpt_corpus import (
    MAX_CHARACTERS,
    Document,
    Header,
    TableText,
    assign_documents,
    definition_documents,
    distinctive_lines,
    fraction_seen,
    group_tables,
    make_corpus,
    mask_codes,
    meaning_documents,
    read_table_texts,
    rule_documents,
    split_tables,
    table_documents,
)
from xbrl.read.dpm_distil import open_dpm_database


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
    return run_python("scripts/regulator.py", "cpt", *arguments)


def test_the_corpus_has_disjoint_splits_and_cites_its_source(tmp_path, database_file) -> None:
    for name, seed in (("a", 0), ("c", 1)):
        with open_dpm_database(database_file) as database:
            card = make_corpus(database, tmp_path / name, held_out=0.1, seed=seed)
        assert json.loads((tmp_path / name / "dataset.json").read_text()) == card
    done = run("--out", tmp_path / "b", "--database", database_file, "--held-out", "0.1")
    assert done.returncode == 0, done.stderr
    names = [f"{name}.jsonl" for name in ("train", "validation", "test", "general", "general_held_out")]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*names, "left"]
    files = ["train.jsonl", "validation.jsonl", "test.jsonl", "dataset.json", "general.jsonl", "general_held_out.jsonl"]
    a, b, c = ([(tmp_path / folder / name).read_bytes() for name in files] for folder in "abc")
    assert a == b and a[0] != c[0]
    lines = {
        name: [json.loads(line) for line in (tmp_path / "a" / name).read_text().splitlines()] for name in files[:3]
    }
    card = json.loads(a[3])
    for split in ("train", "validation", "test"):
        rows = lines[f"{split}.jsonl"]
        assert card["files"][f"{split}.jsonl"]["documents"] == len(rows) > 2
        assert all(row["source"] == "European Banking Authority, DPM 4.2" and row["text"] for row in rows)
        assert "European Banking Authority, DPM 2.0 database, release 4.2" in card["files"][f"{split}.jsonl"]["source"]
    held_out = {code for split in ("validation", "test") for code in card["tables"][split]}
    assert len(held_out) == 6 and not held_out & {code for row in lines["train.jsonl"] for code in row["tables"]}
    # General texts for training are separate from those that evaluation uses.
    mixed_in, evaluated = ([json.loads(line) for line in part.decode().splitlines()] for part in a[4:])
    assert [row["text"] for row in mixed_in] == training_texts() and len(mixed_in) > 50
    assert [row["text"] for row in evaluated] == held_out_texts()
    assert {row["source"] for row in mixed_in + evaluated} == {card["files"]["general.jsonl"]["source"]}
    assert card["files"]["general.jsonl"]["source"].startswith("pydoc_data.topics of Python")
    # No distinctive line about a held-out table is in training.
    known = {line for row in lines["train.jsonl"] for line in distinctive_lines(row["text"])}
    own = [row for row in lines["test.jsonl"] if set(row["tables"]) <= set(card["tables"]["test"])]
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
    assert not out.exists()
    database = sqlite3.connect(database_file)
    database.execute("update TableVersion set EndReleaseID = 5")  # changes are not committed
    with pytest.raises(UserError, match="contains no tables of release 4.2"):
        make_corpus(database, out, held_out=0.1, seed=0)
    database.close()


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


@pytest.fixture(scope="module")
def tables(database) -> dict[str, TableText]:
    return read_table_texts(database, RELEASE)


def test_a_table_document_follows_the_template(tables) -> None:
    assert list(tables) == ["L_01.00.a", "L_02.00"]  # tables of the release that have cells
    (document,) = table_documents(tables["L_01.00.a"])
    assert document == Document(
        "table",
        """\
L 01.00.a Liquidity coverage
Filed in Liquidity, module LCR
Columns:
c0010 Amount | monetary
c0020 Ratio | percentage
Rows:
LIQUID ASSETS
  r0010 Level 1 assets in total
    r0020 Cash | c0010
r0030 Deposits of households""",
        ("L_01.00.a",),
    )
    (document,) = table_documents(tables["L_02.00"])
    assert document.text.splitlines()[2:] == [
        "Columns:",
        "c0005 Depositor | key, string",
        "c0010 Amount deposited | monetary",
        "Open rows, one for each Depositor",
    ]


def test_a_meaning_document_describes_rows_by_their_dimensions(tables) -> None:
    (document,) = meaning_documents(tables["L_01.00.a"])
    assert document.text.splitlines() == [
        "What is reported in L 01.00.a Liquidity coverage",
        "Accounting items: Liabilities",
        "r0010 Level 1 assets in total = Accounting items: Assets; Currency: Euro",
        "r0030 Deposits of households = Accounting items: Liabilities",
    ]
    assert list(meaning_documents(tables["L_02.00"])) == []


def test_a_rule_document_has_labels_for_its_cells(database, tables) -> None:
    dropped = Counter()
    rules = list(rule_documents(database, RELEASE, tables, dropped))
    assert [document.text.splitlines()[0] for document in rules] == [
        "Rule v1_m (warning)",
        "Rule v2_m (error)",
        "Rule v3_m (error)",
    ]
    assert dropped == {"rules on tables that are not filed in the release": 1, "rules that name no table": 1}
    assert rules[0].text.splitlines()[1:] == [
        "L 01.00.a Liquidity coverage",
        "with {tL_01.00.a, c0010, default: 0}: {r0010} >= {r0020} * 2",
        "Level 1 assets exceed twice the cash.",
        "L 01.00.a r0010 c0010 Level 1 assets in total, Amount",
        "L 01.00.a r0020 c0010 Cash, Amount",
    ]
    # Greyed-out cells are omitted, and members are explained.
    assert rules[1].text.splitlines()[2:] == [
        "{tL_01.00.a, r0010-0030, c0020} <= [eba_AT:x3]",
        "L 01.00.a r0010 c0020 Level 1 assets in total, Ratio",
        "L 01.00.a r0030 c0020 Deposits of households, Ratio",
        "eba_AT:x3 Liabilities",
    ]
    assert rules[2].tables == ("L_01.00.a", "L_02.00")
    assert rules[2].text.splitlines()[3:] == [
        "{tL_01.00.a, r0010, c0010} > {tL_02.00, c0010}",
        "L 01.00.a r0010 c0010 Level 1 assets in total, Amount",
        "L 02.00 c0010 Amount deposited",
    ]


def test_definitions_are_of_the_release_and_add_to_the_name(database) -> None:
    (document,) = definition_documents(database, RELEASE)
    assert document.tables == ()
    assert document.text.splitlines() == [
        "Terms: Accounting terms",
        "Assets: What the institution owns or is owed.",
        "Liabilities: What the institution owes to others than its owners.",
    ]


def table_of(code: str, labels: list[str]) -> TableText:
    rows = [Header(f"r{10 * i:04}", label, 0, False, False, "") for i, label in enumerate(labels, 1)]
    table = TableText(code, f"Table of {labels[0]}", "Liquidity, module LCR", "")
    table.headers["r"].extend(rows)
    table.headers["c"].append(Header("c0010", "Amount", 0, False, False, ""))
    table.cells.update({(row.code, "c0010"): "monetary" for row in rows})
    return table


def test_a_long_table_is_split_without_losing_a_line() -> None:
    table = table_of("L_05.00", [f"Deposits of kind {i} without any maturity" for i in range(200)])
    parts = list(table_documents(table))
    assert len(parts) > 3 and all(len(part.text) <= MAX_CHARACTERS + 200 for part in parts)
    assert [part.text.splitlines()[0] for part in parts[1:]] == [f"{table.title} (continued)"] * (len(parts) - 1)
    rows = [line for part in parts for line in part.text.splitlines() if line.startswith("r")]
    assert rows == [f"{header.code} {header.label}" for header in table.headers["r"]]


def forty_tables() -> dict[str, TableText]:
    """40 templates of two parts each, and a copy of the very first table under another code."""
    tables = {}
    for i in range(40):
        for part in "ab":
            labels = [
                f"Item {part} number {j} of the kind {chr(97 + i % 26) * (2 + i // 26)}" for j in range(4 + i % 3)
            ]
            tables[f"T_{i:02}.00.{part}"] = table_of(f"T_{i:02}.00.{part}", labels)
    return tables | {"U_00.00": table_of("U_00.00", [header.label for header in tables["T_00.00.a"].headers["r"]])}


def test_similar_tables_go_to_the_same_split() -> None:
    tables = forty_tables()
    groups = group_tables(tables)
    assert groups["U_00.00"] == groups["T_00.00.a"] == groups["T_00.00.b"]
    assert len(set(groups.values())) == 40
    sizes = {code: 100 for code in tables}
    for seed in range(5):
        splits = split_tables(groups, sizes, 0.1, seed, keep=("T_00.00.b",))
        assert all(len({splits[code] for code in groups if groups[code] == group}) == 1 for group in groups.values())
        assert splits["U_00.00"] == "train"  # because it resembles a table in `keep`
        for held_out in ("validation", "test"):
            found = sum(split == held_out for split in splits.values())
            assert 8 <= found <= 10  # a tenth of 81 tables, in whole groups
        assert splits == split_tables(groups, sizes, 0.1, seed, keep=("T_00.00.b",))
    assert splits != split_tables(groups, sizes, 0.1, 0, keep=("T_00.00.b",))
    large = split_tables(groups, sizes | {"T_07.00.a": 2000}, 0.1, 0)
    assert large["T_07.00.a"] == "train"  # it would fill a held-out split by itself


def test_rules_about_a_held_out_table_are_not_in_training() -> None:
    tables = {"A_01.00": "train", "B_01.00": "validation", "C_01.00": "test"}
    documents = [
        Document("rule", "Rule v1\nthe sum of all own funds exceeds its parts", ("A_01.00",)),
        Document("rule", "Rule v2\nown funds exceed the buffer of the parent bank", ("A_01.00", "B_01.00")),
        Document("rule", "Rule v3\nall liquid assets exceed the net outflows again", ("A_01.00", "B_01.00", "C_01.00")),
    ]
    left_out = Counter()
    parts = assign_documents(documents, tables, 0.1, 0, left_out)
    assert {name: [d.text[:7] for d in part] for name, part in parts.items()} == {
        "train": ["Rule v1"],
        "validation": ["Rule v2"],
        "test": ["Rule v3"],
    }
    assert left_out == {"duplicates": 0, "mostly seen in training": 0}


def test_held_out_documents_mostly_seen_in_training_are_dropped() -> None:
    seen = [f"r00{i}0 Cash and reserves held at central bank number {i}" for i in range(1, 5)]
    fresh = [f"r00{i}0 Deposits {'abcdefgh'[i]} of small households and firms" for i in range(1, 7)]
    documents = [
        Document("table", "\n".join(["A 01.00 Own assets", *seen]), ("A_01.00",)),
        Document(
            "table", "\n".join(["C 01.00 Other title of it", *seen]), ("C_01.00",)
        ),  # a duplicate except for its codes
        Document("table", "\n".join(["C 02.00 A longer title", *seen, *fresh[:3]]), ("C_01.00",)),
        Document("table", "\n".join(["C 03.00 A longer title", *seen, *fresh]), ("C_01.00",)),
    ]
    left_out = Counter()
    parts = assign_documents(documents, {"A_01.00": "train", "C_01.00": "test"}, 0.1, 0, left_out)
    assert [d.text[:7] for d in parts["test"]] == ["C 03.00"]
    assert left_out == {"duplicates": 1, "mostly seen in training": 1}
    # Lines that differ only in codes and numbers are equal, and short lines are ignored.
    assert mask_codes("r0010 Level 1 assets, C 76.00.a") == mask_codes("r0990 Level 2 assets, C 77.00.b")
    assert distinctive_lines("Total assets\nr0010 All of the assets of a bank") == ["all of the assets of a bank"]
    assert fraction_seen("\n".join(seen + fresh[:4]), set(distinctive_lines("\n".join(seen)))) == 0.5


def test_the_split_of_a_definition_depends_only_on_its_text() -> None:
    documents = [Document("definition", f"Terms: {i}\nTerm {'x' * i}: what it means", ()) for i in range(300)]
    parts = assign_documents(documents, {}, 0.1, 0, Counter())
    assert all(15 <= len(parts[name]) <= 45 for name in ("validation", "test"))
    backwards = assign_documents(documents[::-1], {}, 0.1, 0, Counter())
    assert all(set(parts[name]) == set(backwards[name]) for name in parts)
