"""Replies that arrive beside the reports become their notes."""

import json
import shutil
from pathlib import Path

import pytest

from common.errors import UserError
from tests.xbrl.desk.reports import BANK, PERIOD, SMALL, write
from xbrl.read.folder import join_modules, passed_over, read_files, report_files
from xbrl.read.replies import add_replies, read_replies

ENTITY, LCR_CELL = f"{BANK.entity}.{BANK.scope}", "C 76.00.a r0030 c0010"
TEXT = "Bonds are pledged."


def read(folder: Path):
    files, ignored = report_files(folder)
    reports, unknown = add_replies(join_modules(*read_files(files, 1)), files)
    return reports, unknown, ignored


def as_csv(*rows: str) -> str:
    return "\n".join(["entity,period,query,cell,text", *rows]) + "\n"


def as_lines(*rows: dict) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n\n"


@pytest.mark.parametrize("entity", [ENTITY, BANK.entity])
def test_both_forms_give_the_same_notes(tmp_path, entity):
    write(tmp_path, figures=SMALL)
    row = {"entity": entity, "period": PERIOD, "cell": f"{LCR_CELL}; C 28.00 A 12 c350", "text": TEXT}
    notes = []
    for name, text in (
        ("replies.csv", as_csv(f"{entity},{PERIOD},Q-7,{row['cell']},{TEXT}")),
        ("replies.jsonl", as_lines(row)),
    ):
        (tmp_path / name).write_text(text)
        (report,), unknown, ignored = read(tmp_path)
        assert (unknown, ignored, report.breaches) == ([], [], ())
        notes += report.notes
        (tmp_path / name).unlink()
    assert notes[0] == notes[1] and notes[0].text == TEXT
    assert notes[0].cells == (("C_76.00.a", "r0030", "c0010"), ("C_28.00", "A 12", "c350"))


def test_text_beside_a_report_is_its_note(tmp_path):
    file = write(tmp_path, figures=SMALL)[0]
    file.with_suffix(".txt").write_bytes(b"\xef\xbb\xbf  Two lines,\n one note \xff.")
    (tmp_path / "unrelated.txt").write_text("no report has this name")
    (report,), unknown, ignored = read(tmp_path)
    assert [note.text for note in report.notes] == ["Two lines, one note \ufffd."]
    assert ignored == [tmp_path / "unrelated.txt"] and unknown == []
    assert "unrelated.txt" in passed_over(ignored)


def test_reply_without_report_is_named(tmp_path):
    files = write(tmp_path, figures=SMALL)
    (tmp_path / "replies.csv").write_text(
        as_csv(f"NOBODY,{PERIOD},,,a", f"{ENTITY},2025-12-31,,,b", f"{ENTITY},{PERIOD},,,c")
    )
    (report,), unknown, _ = read(tmp_path)
    assert [note.text for note in report.notes] == ["c"]
    assert len(unknown) == 2 and unknown[0].startswith(
        f"{tmp_path / 'replies.csv'}, line 2: a reply of NOBODY as of {PERIOD}"
    )
    # A reply on a file of the folder that the user did not name is no mistake.
    shutil.copy(files[0], tmp_path / f"NOBODY_{PERIOD}.json")
    reports, _ = read_files(files, 1)
    assert len(add_replies(join_modules(reports, {}), files)[1]) == 1


def test_bank_with_two_scopes_must_be_named_exactly(tmp_path):
    for number, scope in enumerate(("CON", "IND")):
        for file in write(tmp_path / str(number), figures=SMALL):
            text = file.read_text().replace(f"{BANK.entity}.IND", f"{BANK.entity}.{scope}")
            (tmp_path / file.name.replace(".IND", f".{scope}")).write_text(text)
        shutil.rmtree(tmp_path / str(number))
    (tmp_path / "replies.csv").write_text(as_csv(f"{BANK.entity},{PERIOD},,,a", f"{BANK.entity}.CON,{PERIOD},,,b"))
    reports, unknown, _ = read(tmp_path)
    assert {report.entity[-3:]: [note.text for note in report.notes] for report in reports} == {"CON": ["b"], "IND": []}
    assert len(unknown) == 1 and unknown[0].endswith("several reports as of that date; add the scope, as in LEI.CON")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("replies.csv", "entity,period\n", "the column 'text' is missing"),
        ("replies.csv", as_csv(f",{PERIOD},,,a"), "line 2, column entity: it is empty"),
        ("replies.csv", as_csv("X,31.3.2026,,,a"), "line 2, column period: '31.3.2026' is not a date"),
        ("replies.csv", as_csv(f"X,{PERIOD},,,"), "line 2, column text: it is empty"),
        ("replies.csv", as_csv(f"X,{PERIOD},,LCR,a"), "line 2, column cell: 'LCR' is no cell such as C 76.00.a"),
        ("replies.csv", b"\xff\xfe", "is not valid UTF-8"),
        ("replies.jsonl", b"\xff\xfe", "is not valid UTF-8"),
        ("replies.jsonl", "{", "line 1: not valid JSON"),
        ("replies.jsonl", "[1]", "line 1: expected a JSON object with the texts entity, period, text"),
        (
            "replies.jsonl",
            as_lines({"entity": "X", "period": PERIOD, "text": "a", "Cell": ""}),
            "the key 'Cell' is unknown",
        ),
    ],
)
def test_mistake_in_replies_is_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        list(read_replies(path))
    assert message in str(raised.value) and str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_replies_behind_a_link_are_not_opened(tmp_path):
    folder = tmp_path / "reports"
    file = write(folder, figures=SMALL)[0]
    (tmp_path / "secret").write_text(as_csv(f"{ENTITY},{PERIOD},,,secret"))
    file.with_suffix(".txt").symlink_to(tmp_path / "secret")
    assert [report.notes for report in read(folder)[0]] == [()]
    (folder / "replies.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link that points outside its folder"):
        read(folder)
