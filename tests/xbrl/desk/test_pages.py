"""The page of a report and the overview: their content, hostile texts, and the same bytes in each run."""

import csv
import functools
import hashlib
import io
import json
import re
from dataclasses import replace

import pytest

from tests.xbrl.desk.reports import CLIENT, LCR, read
from xbrl.desk import analysis, output
from xbrl.desk.analysis import key_of, versions
from xbrl.desk.output import _cell, finish, folder_name, write_overview
from xbrl.desk.record import Case, Form, Reply, make_record
from xbrl.read.filed_report import Note
from xbrl.read.render import Addressee

HOSTILE = '=<script>alert("1")</script> | `x` [link](javascript:x) & "quoted" <img src=x onerror=y>'
ANSWER = f"""Note:
"{HOSTILE[HOSTILE.index("[link]") :]}" | waiver | applies | - | - | -
"<b>not in the note</b>" | own_shares | applies | EUR 5 | {HOSTILE[:10]} | -
Violations:
LCR_MIN | C 76.00.a r0030 c0010 | 93.00% | min 100% | CRR Art. 412(1); Delegated Reg. (EU) 2015/61 Art. 4(2)
Directive:
To {HOSTILE}: the LCR is 94%."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report whose bank, note and answer are hostile, written twice: (output, folder, record, [files of each time])."""
    out = tmp_path_factory.mktemp("pages")
    report = replace(read(out / "files", {LCR: "0.93", CLIENT: "0.27"}), notes=(Note(HOSTILE),))
    bank = Addressee("E", HOSTILE, "DE", "bank")
    case, contents = Case(report, bank, (), (), Reply("full", (), ANSWER), depends={"key": "k"}), []
    for _ in range(2):
        record = finish(case, out, Form(), True, {})
        folder = out / folder_name(record["entity"], record["period"])
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    return out, folder, record, contents


def test_same_bytes_except_time_of_audit(written):
    first, second = ({name: content for name, content in files.items() if name != "audit.json"} for files in written[3])
    assert set(first) == {"report.json", "report.html", "letter-DRAFT.txt"} and first == second
    audits = [json.loads(files["audit.json"]) for files in written[3]]
    assert audits[0].pop("time") <= audits[1].pop("time") and audits[0] == audits[1]
    assert audits[0]["outputs"] == {name: hashlib.sha256(content).hexdigest() for name, content in first.items()}
    assert audits[0]["question"]["answer"] == ANSWER and audits[0]["question"]["profile"] == "full"


def test_hostile_texts_are_escaped(written):
    html = written[3][1]["report.html"].decode()
    assert "<script" not in html and "<img" not in html and "<b>not" not in html
    assert html.count("=&lt;script") >= 4  # the title, the heading, the note and the draft
    assert "default-src 'none'" in html and "http" not in html.partition("</style>")[2]
    assert "prefers-color-scheme: dark" in html and "size: A4" in html


def test_marks_that_hide_or_reorder_text_are_shown(tmp_path):
    report = replace(read(tmp_path, {LCR: "0.93"}), currency="\u202eRUE")
    letter = "You need \u200bnot \u2066pay\u2069. \u202eNothing is due."
    reply = Reply("full", (), f"Violations:\nnone\nDirective:\n{letter}")
    html = output.page(make_record(Case(report, Addressee("E", "A\u202eB", "DE", "bank"), reply=reply)), "en")
    assert not re.search("[\u200b\u202a-\u202e\u2066-\u2069]", html) and "A\ufffdB" in html and "\ufffdRUE" in html
    assert "You need \ufffdnot \ufffdpay\ufffd. \ufffdNothing is due." in html


def test_the_page_says_what_was_decided_by_whom(written):
    html = written[3][1]["report.html"].decode()
    names = ("rule", "cell", "value", "limit", "article")
    row = '">{}</span></td>' + "</td>".join(f'<td data-name="{name}">{{}}' for name in names)
    lcr = ("confirmed", "LCR_MIN", "C 76.00.a r0030 c0010", "93.00%", "min 100%", "CRR Art. 412(1); ")
    assert row.format(*lcr) in html
    assert row.format("missed", "LE_LIMIT", "C 28.00 A12 c350", "27.00%", "max 25%", "CRR Art. 395(1)<") in html
    assert "violated if C 76.00.a r0030 c0010 &lt; 1" in html
    letter, draft = html.partition("Decision letter")[2].split("Draft of the model")
    assert "not ready" in letter and "nobody has decided on note" in letter and "The model wrote none of it." in letter
    assert letter.startswith(': <a href="#letter"') and '<div class="letter" lang="en"><p>NOT READY' in letter
    assert "figures checked, sentences not" in draft and "the figure 94%" in draft and "the LCR is 94%." in draft
    assert "To decide, copy into a file for --findings" in html and ",LCR_MIN,lifted," in html and ",,benign," in html
    assert "The words of these facts stand in no note of the report" in html
    text = (written[1] / "letter-DRAFT.txt").read_text()
    assert text.startswith("- nobody has decided on note ") and "94%" not in text
    assert "\nNOT READY: not to be sent\n" in text


def test_table_of_duties_has_column_for_thresholds(written):
    without = output.page(written[2], "de")
    assert '<div class="letter" lang="de">' in without and '<th scope="col">threshold' not in without
    names = ("rule", "cell", "value", "limit", "legal", "reason", "title")
    duty = dict(zip(names, ("LE_DEF", "C", "297630 thousand", "max 9000 thousand", "CRR", "", "t"), strict=True))
    page = output.page(written[2] | {"duties": [duty], "findings": [written[2]["findings"][0] | duty]}, "en")
    # Thousands are separated as in letters.
    figures = ('"value">297,630 thousand<', '"threshold">9,000 thousand<', '"limit">max 9,000 thousand<')
    assert all(f"<td data-name={figure}/td>" in page for figure in figures)


def test_overview_and_csv_are_complete_and_well_formed(written, tmp_path):
    write_overview(tmp_path, [written[2]], ["<b>x</b>.zip: damaged"])
    index = (tmp_path / "index.html").read_text()
    for text in (written[3][1]["report.html"].decode(), index):
        stack = []
        for closing, name in re.findall(r"<(/?)(\w+)[^>]*>", text.replace("<!doctype html>", "")):
            if closing:
                assert stack.pop() == name
            elif name not in ("meta", "br"):
                stack.append(name)
        assert stack == [] and "{{" not in text and "{%" not in text
    assert "<script" not in index and "<b>" not in index and "&lt;b&gt;x&lt;/b&gt;.zip: damaged" in index
    assert f'href="{written[1].name}/report.html"' in index and index.index("</table>") < index.index(
        "Refused files (1)"
    )
    rows = list(csv.DictReader(io.StringIO((tmp_path / "findings.csv").read_text())))
    about = [row for row in rows if row["verdict"] == "about the report"]
    assert [(row["rule"], row["cell"], row["value"]) for row in about] == [
        ("MANDATORY", f"C {number}.00", "") for number in ("01", "02", "04")
    ]
    findings = [row for row in rows if row not in about]
    assert [(row["verdict"], row["rule"], row["value"], row["letter"]) for row in findings] == [
        ("confirmed", "LCR_MIN", "93.00%", "not ready"),
        ("missed", "LE_LIMIT", "27.00%", "not ready"),
    ]
    assert all(row["bank"].startswith("'=<script>") for row in rows)  # no spreadsheet takes it for a formula
    assert list(map(_cell, ("-22729 thousand", "-3.5%", "-2+3|x"))) == ["-22729 thousand", "-3.5%", "'-2+3|x"]
    assert list(map(_cell, ("C 28.00 a; =1+1;b", "a\n=1", "CRR Art. 1; CRD Art. 2"))) == [
        "C 28.00 a;' =1+1;b",
        "a\n'=1",
        "CRR Art. 1; CRD Art. 2",
    ]


def test_an_interrupted_report_leaves_nothing_behind(written, tmp_path, monkeypatch):
    def interrupted(record, language):
        raise KeyboardInterrupt

    report = read(tmp_path / "files")
    monkeypatch.setattr(output, "page", interrupted)
    write = functools.partial(finish, Case(report, Addressee("E", "E", "", "")), tmp_path / "out", Form(), False, {})
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in (tmp_path / "out").glob("*/*") if ".tmp" not in path.parent.name] == []
    monkeypatch.undo()
    write()
    assert len(list((tmp_path / "out").glob("*/audit.json"))) == 1 and not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("entity", ["../../etc", ".hidden", "x" * 500, "LEI\n", "Ä"])
def test_no_entity_is_used_as_a_path(entity):
    name = folder_name(entity, "2026-03-31")
    assert "/" not in name and not name.startswith(".") and len(name) < 140 and name.isprintable() and name.isascii()
    assert name != folder_name(entity + " ", "2026-03-31")
    assert folder_name("LEI1.CON", "2026-03-31") == "LEI1.CON_2026-03-31"


def test_key_depends_on_inputs_and_not_on_paths(tmp_path, monkeypatch):
    known = versions()
    assert set(known) == {"project", "code", "rules", "note_rules", "cells", "python", "libraries"}
    key = key_of(known | {"model": {"path": "a", "fingerprint": "f"}}, {"draft": False})
    assert key == key_of(known | {"model": {"path": "b", "fingerprint": "f"}}, {"draft": False})
    changed = [known | {"model": {"path": "a", "fingerprint": "g"}}, known | {"rules": "0" * 64}]
    assert len({key, *(key_of(inputs, {"draft": False}) for inputs in changed), key_of(known, {"draft": True})}) == 4
    block = tmp_path / "xbrl" / "measures.toml"
    block.parent.mkdir()
    monkeypatch.setattr(analysis, "ROOT", tmp_path)
    hashes = [analysis.hash_of_code() for text in ("a = 1", "a = 2") if block.write_text(text)]
    assert hashes[0] != hashes[1]  # an edited block invalidates every earlier analysis
