"""From a small DPM 2.0 database to documents for continual pre-training, and tables held out of them."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest

import scripts.make_cpt_corpus as script
from common.errors import UserError
from data.regulator.dpm_corpus import (
    PART,
    Document,
    Header,
    TableText,
    definition_documents,
    meaning_documents,
    read_table_texts,
    table_documents,
)
from data.regulator.dpm_corpus_rules import rule_documents
from data.regulator.dpm_corpus_split import group_tables, masked, place_documents, said, share_seen, split_tables
from eval.general_text import held_out_texts, training_texts

RELEASE = 5

SCHEMA = """
create table Release (Code, Status, ReleaseID); insert into Release values ('3.4', 'released', 1), ('4.2', 'released', 5);
create table Framework (FrameworkID, Name); insert into Framework values (1, 'Liquidity');
create table Module (ModuleID, FrameworkID); insert into Module values (1, 1);
create table ModuleVersion (ModuleVID, ModuleID, Code, StartReleaseID, EndReleaseID);
insert into ModuleVersion values (1, 1, 'LCR_OLD', 1, 5), (2, 1, 'LCR', 5, null);
create table ModuleVersionComposition (ModuleVID, TableVID);
create table "Table" (TableID, IsAbstract);
create table TableVersion (TableVID, TableID, Code, Name, ContextID, StartReleaseID, EndReleaseID);
create table TableVersionHeader (TableVID, HeaderID, ParentHeaderID, HeaderVID, "Order", IsAbstract);
create table Header (HeaderID, Direction, IsKey);
create table HeaderVersion (HeaderVID, Code, Label, ContextID);
create table TableVersionCell (TableVID, CellCode, VariableVID);
create table VariableVersion (VariableVID, PropertyID);
insert into VariableVersion values (1, 1), (2, 2), (3, 3);
create table Property (PropertyID, DataTypeID); insert into Property values (1, 1), (2, 2), (3, 3);
create table DataType (DataTypeID, Code); insert into DataType values (1, 'm'), (2, 'p'), (3, 's');
create table ContextComposition (ContextID, PropertyID, ItemID); insert into ContextComposition values (7, 20, 21), (7, 22, 23), (8, 20, 24);
create table Item (ItemID, Name, Description);
insert into Item values (20, 'Accounting items', null), (21, 'Assets', 'What the institution owns or is owed.'),
  (22, 'Currency', null), (23, 'Euro', 'euro'), (24, 'Liabilities', 'What the institution owes
   to others than its owners.'), (25, 'Later', 'A term that comes with a later release.');
create table Category (CategoryID, Name); insert into Category values (1, 'Accounting terms');
create table ItemCategory (ItemID, CategoryID, StartReleaseID, Signature);
insert into ItemCategory values (21, 1, 1, 'eba_AT:x1'), (23, 1, 1, 'eba_AT:x2'), (24, 1, 5, 'eba_AT:x3'), (25, 1, 9, null);
create table Operation (OperationID, Code, Type);
create table OperationVersion (OperationVID, OperationID, Expression, Description, StartReleaseID, EndReleaseID);
create table OperationScope (OperationVID, IsActive, Severity);
"""


class Maker:
    """Fills a database with tables and rules."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path)
        self.database.executescript(SCHEMA)
        self.number = 100

    def insert(self, table: str, *values: object) -> None:
        self.database.execute(f'insert into "{table}" values ({",".join("?" * len(values))})', values)

    def table(self, code: str, name: str, headers: list[tuple], cells: dict[str, int], context=None, release=5) -> None:
        """headers: (axis, code, label, parent's index or None, heading, key, context). cells: cell code -> variable."""
        self.number += 1
        table = self.number
        self.insert("Table", table, 0)
        self.insert("TableVersion", table, table, code, name, context, release, None if release == 5 else 5)
        self.insert("ModuleVersionComposition", 2 if release == 5 else 1, table)
        for order, (axis, number, label, parent, heading, key, meaning) in enumerate(headers):
            header = table * 100 + order
            parent = None if parent is None else table * 100 + parent
            self.insert("TableVersionHeader", table, header, parent, header, order, heading)
            self.insert("Header", header, axis, key)
            self.insert("HeaderVersion", header, number, label, meaning)
        for cell, variable in cells.items():
            self.insert("TableVersionCell", table, "{" + f"{code}, {cell}" + "}", variable)

    def rule(
        self, code: str, expression: str, description: str = "", severity: str = "error", release: int = 5
    ) -> None:
        self.number += 1
        self.insert("Operation", self.number, code, "validation")
        end = None if release >= 5 else 5
        self.insert("OperationVersion", self.number, self.number, expression, description, release, end)
        self.insert("OperationScope", self.number, 1, severity)
        self.insert("OperationScope", self.number, 0, "inactive")


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> sqlite3.Connection:
    """A closed table with a heading and a grey cell, an open one, and rules on them; older versions of both."""
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


def test_a_table_is_written_as_its_template_shows_it(tables) -> None:
    assert list(tables) == ["L_01.00.a", "L_02.00"]  # of the release, with cells
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


def test_rows_and_columns_are_said_in_the_words_of_their_dimensions(tables) -> None:
    (document,) = meaning_documents(tables["L_01.00.a"])
    assert document.text.splitlines() == [
        "What is reported in L 01.00.a Liquidity coverage",
        "Accounting items: Liabilities",
        "r0010 Level 1 assets in total = Accounting items: Assets; Currency: Euro",
        "r0030 Deposits of households = Accounting items: Liabilities",
    ]
    assert list(meaning_documents(tables["L_02.00"])) == []


def test_a_rule_stands_with_its_words_and_the_cells_it_reads(database, tables) -> None:
    dropped = {}
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
        "[Level 1 assets in total] >= [Cash] * 2",
        "L 01.00.a r0010 c0010 Level 1 assets in total, Amount",
        "L 01.00.a r0020 c0010 Cash, Amount",
    ]
    # A span of rows has no words of its own; a grey cell is not read; a term of the expression is explained.
    assert rules[1].text.splitlines()[2:] == [
        "{tL_01.00.a, r0010-0030, c0020} <= [eba_AT:x3]",
        "L 01.00.a r0010 c0020 Level 1 assets in total, Ratio",
        "L 01.00.a r0030 c0020 Deposits of households, Ratio",
        "eba_AT:x3 Liabilities",
    ]
    assert rules[2].tables == ("L_01.00.a", "L_02.00")
    assert rules[2].text.splitlines()[3:] == [
        "{tL_01.00.a, r0010, c0010} > {tL_02.00, c0010}",
        "[Level 1 assets in total, Amount] > [Amount deposited]",
        "L 01.00.a r0010 c0010 Level 1 assets in total, Amount",
        "L 02.00 c0010 Amount deposited",
    ]


def test_definitions_are_of_the_release_and_say_more_than_their_name(database) -> None:
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


def test_a_long_table_becomes_parts_without_losing_a_line() -> None:
    table = table_of("L_05.00", [f"Deposits of kind {i} without any maturity" for i in range(200)])
    parts = list(table_documents(table))
    assert len(parts) > 3 and all(len(part.text) <= PART + 200 for part in parts)
    assert [part.text.splitlines()[0] for part in parts[1:]] == [f"{table.title} (continued)"] * (len(parts) - 1)
    rows = [line for part in parts for line in part.text.splitlines() if line.startswith("r")]
    assert rows == [f"{one.code} {one.label}" for one in table.headers["r"]]


def forty_tables() -> dict[str, TableText]:
    """40 templates, each of two parts; the last one is a copy of the first under another code."""
    tables = {}
    for i in range(40):
        for part in "ab":
            labels = [
                f"Item {part} number {j} of the kind {chr(97 + i % 26) * (2 + i // 26)}" for j in range(4 + i % 3)
            ]
            tables[f"T_{i:02}.00.{part}"] = table_of(f"T_{i:02}.00.{part}", labels)
    return tables | {"U_00.00": table_of("U_00.00", [one.label for one in tables["T_00.00.a"].headers["r"]])}


def test_tables_that_resemble_each_other_stay_together() -> None:
    tables = forty_tables()
    groups = group_tables(tables)
    assert groups["U_00.00"] == groups["T_00.00.a"] == groups["T_00.00.b"]
    assert len(set(groups.values())) == 40
    sizes = {code: 100 for code in tables}
    for seed in range(5):
        splits = split_tables(groups, sizes, 0.1, seed, keep=("T_00.00.b",))
        assert all(len({splits[code] for code in groups if groups[code] == group}) == 1 for group in groups.values())
        assert splits["U_00.00"] == "train"  # by what it resembles
        for held_out in ("validation", "test"):
            assert 8 <= sum(split == held_out for split in splits.values()) <= 10  # a tenth of 81, whole groups
        assert splits == split_tables(groups, sizes, 0.1, seed, keep=("T_00.00.b",))
    assert splits != split_tables(groups, sizes, 0.1, 0, keep=("T_00.00.b",))
    large = split_tables(groups, sizes | {"T_07.00.a": 2000}, 0.1, 0)
    assert large["T_07.00.a"] == "train"  # alone it would be the whole test


def test_training_never_speaks_of_a_held_out_table() -> None:
    tables = {"A_01.00": "train", "B_01.00": "validation", "C_01.00": "test"}
    documents = [
        Document("rule", "Rule v1\nthe sum of all own funds exceeds its parts", ("A_01.00",)),
        Document("rule", "Rule v2\nown funds exceed the buffer of the parent bank", ("A_01.00", "B_01.00")),
        Document("rule", "Rule v3\nall liquid assets exceed the net outflows again", ("A_01.00", "B_01.00", "C_01.00")),
    ]
    parts, left_out = place_documents(documents, tables, 0.1, 0)
    assert {name: [d.text[:7] for d in part] for name, part in parts.items()} == {
        "train": ["Rule v1"],
        "validation": ["Rule v2"],
        "test": ["Rule v3"],
    }
    assert left_out == {"duplicates": 0, "mostly seen in training": 0}


def test_what_training_has_seen_is_left_out_of_the_held_out_text() -> None:
    seen = [f"r00{i}0 Cash and reserves held at central bank number {i}" for i in range(1, 5)]
    fresh = [f"r00{i}0 Deposits {'abcdefgh'[i]} of small households and firms" for i in range(1, 7)]
    documents = [
        Document("table", "\n".join(["A 01.00 Own assets", *seen]), ("A_01.00",)),
        Document("table", "\n".join(["C 01.00 Other title of it", *seen]), ("C_01.00",)),  # the same but for its codes
        Document("table", "\n".join(["C 02.00 A longer title", *seen, *fresh[:3]]), ("C_01.00",)),
        Document("table", "\n".join(["C 03.00 A longer title", *seen, *fresh]), ("C_01.00",)),
    ]
    parts, left_out = place_documents(documents, {"A_01.00": "train", "C_01.00": "test"}, 0.1, 0)
    assert [d.text[:7] for d in parts["test"]] == ["C 03.00"]
    assert left_out == {"duplicates": 1, "mostly seen in training": 1}
    # Codes and numbers do not make a line another, short lines say nothing.
    assert masked("r0010 Level 1 assets, C 76.00.a") == masked("r0990 Level 2 assets, C 77.00.b")
    assert said("Total assets\nr0010 All of the assets of a bank") == ["all of the assets of a bank"]
    assert share_seen("\n".join(seen + fresh[:4]), set(said("\n".join(seen)))) == 0.5


def test_definitions_are_dealt_out_by_their_text() -> None:
    documents = [Document("definition", f"Terms: {i}\nTerm {'x' * i}: what it means", ()) for i in range(300)]
    parts, _ = place_documents(documents, {}, 0.1, 0)
    assert all(15 <= len(parts[name]) <= 45 for name in ("validation", "test"))
    backwards, _ = place_documents(documents[::-1], {}, 0.1, 0)
    assert all(set(parts[name]) == set(backwards[name]) for name in parts)


def run_script(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_cpt_corpus.py", *arguments])
    script.main()


@pytest.fixture(scope="module")
def database_file(tmp_path_factory) -> Path:
    """30 tables of ten rows that differ in their words, with meanings and rules, also on two tables."""
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


def test_the_script_writes_splits_that_share_no_table_and_cites_its_source(
    tmp_path, monkeypatch, database_file
) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = str(tmp_path / name)
        run_script(monkeypatch, "--out", out, "--database", str(database_file), "--held-out", "0.1", "--seed", seed)
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
    # General text to mix in, and apart from it what evaluation measures.
    general, evaluated = ([json.loads(line) for line in part.decode().splitlines()] for part in a[4:])
    assert [row["text"] for row in general] == training_texts() and [
        row["text"] for row in evaluated
    ] == held_out_texts()
    assert (
        general[0]["source"].startswith("pydoc_data.topics of Python")
        and card["files"]["general.jsonl"]["documents"] > 50
    )
    # Nothing that says something about a held-out table stands in training.
    known = {line for row in lines["train.jsonl"] for line in said(row["text"])}
    own = [row for row in lines["test.jsonl"] if set(row["tables"]) <= set(card["tables"]["test"])]
    assert len(own) >= 9 and {row["kind"] for row in own} == {"table", "meaning", "rule"}
    assert not any(line in known for row in own for line in said(row["text"]) if "filed in" not in line)


def test_a_mistake_of_the_script_is_one_sentence(tmp_path, monkeypatch, database_file) -> None:
    sqlite3.connect(tmp_path / "other.sqlite").execute("create table x (y)")
    out = str(tmp_path / "out")
    for arguments, words in [
        (("--out", str(tmp_path)), "exists; remove it or choose another --out"),
        (("--out", out, "--held-out", "0.5"), "--held-out must lie in 0 to 0.5, not 0.5"),
        (("--out", out, "--database", str(tmp_path / "absent")), "absent: no such file"),
        (("--out", out, "--database", str(tmp_path / "other.sqlite")), "this is not a DPM 2.0 database"),
        (("--out", out, "--tokenizer", str(tmp_path)), "there is no tokenizer.json in it"),
    ]:
        with pytest.raises(UserError, match=words):
            run_script(monkeypatch, *arguments)
    assert not (tmp_path / "out").exists()
