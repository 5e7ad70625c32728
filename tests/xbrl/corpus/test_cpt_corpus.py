"""The files and the data card of the corpus for continual pre-training, and the script that makes it."""

import json
import sqlite3
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from common.errors import UserError
from eval.general_text import held_out_texts, training_texts
from tests.processes import run_python
from tests.xbrl.read.dpm_database import Maker
from xbrl.corpus.cpt_corpus import distinctive_lines, make_corpus
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


def test_the_corpus_has_disjoint_splits_and_cites_its_source(tmp_path, database_file) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        with open_dpm_database(database_file) as database:
            card = make_corpus(database, tmp_path / name, held_out=0.1, seed=seed)
        assert json.loads((tmp_path / name / "dataset.json").read_text()) == card
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


def run(*arguments: object) -> CompletedProcess:
    return run_python("scripts/regulator.py", "cpt", *arguments)


def test_the_script_writes_general_text_and_prints_a_line_per_file(tmp_path, database_file) -> None:
    done = run("--out", tmp_path / "out", "--database", database_file, "--held-out", "0.1")
    assert done.returncode == 0, done.stderr
    names = ["train", "validation", "test", "general", "general_held_out"]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"{name}.jsonl" for name in names] + ["left"]
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    texts = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in names
    }
    assert {name: len(rows) for name, rows in texts.items()} == {
        name: card["files"][f"{name}.jsonl"]["documents"] for name in names
    }


def test_a_user_error_is_one_sentence(tmp_path, database_file) -> None:
    sqlite3.connect(tmp_path / "other.sqlite").execute("create table x (y)")
    out = tmp_path / "out"
    for arguments, message in [
        (("--out", tmp_path), "exists; remove it or choose another --out"),
        (("--out", out, "--held-out", "0.5"), "--held-out must be at least 0 and less than 0.5, not 0.5"),
        (("--out", out, "--database", tmp_path / "absent"), "absent: no such file"),
        (("--out", out, "--database", tmp_path / "other.sqlite"), "this is not a DPM 2.0 database"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
    assert not out.exists()
    database = sqlite3.connect(database_file)
    database.execute("update TableVersion set EndReleaseID = 5")  # changes are not committed
    with pytest.raises(UserError, match="contains no tables of release 4.2"):
        make_corpus(database, out, held_out=0.1, seed=0)
    database.close()
