"""The pages of a report and of a folder: what they say, hostile texts, and the same bytes each time."""

import csv
import io
import json
from dataclasses import replace

import pytest

from tests.xbrl.desk.reports import CLIENT, LCR, read
from xbrl.desk import output
from xbrl.desk.output import Job, finish, folder_name
from xbrl.desk.overview import write_overview
from xbrl.desk.record import Case, Reply
from xbrl.read.render import Addressee
from xbrl.read.report import Note

HOSTILE = '=<script>alert("1")</script> | `x` [link](javascript:x) & "quoted" <img src=x onerror=y>'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report whose bank, note and answer are hostile, written twice: (folder, record, bytes of both times)."""
    out = tmp_path_factory.mktemp("pages")
    report = replace(read(out / "files", {LCR: "0.93", CLIENT: "0.27"}), notes=(Note(HOSTILE),))
    bank = Addressee("E", HOSTILE, "DE", "bank")
    answer = f"Checks:\nLCR 93% < 100%: LCR_MIN, CRR Art. 412(1)\nDirective:\nTo {HOSTILE}: the LCR is 94%."
    job = Job(Case(report, bank, (), (), Reply("laptop", (), answer)), out, True, {"key": "k"})
    written = []
    for _ in range(2):
        record = finish(job)
        folder = out / folder_name(record["entity"], record["period"])
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    return out, folder, record, written


def test_the_same_bytes_each_time_but_for_the_time_of_the_audit(made):
    one, two = made[3]
    assert set(one) == {"report.json", "report.md", "report.html", "letter-DRAFT.txt", "audit.json"}
    audits = [json.loads(files.pop("audit.json")) for files in (one, two)]
    assert one == two
    assert audits[0].pop("time") <= audits[1].pop("time") and audits[0] == audits[1]
    assert b"2026-11" not in b"".join(one.values())


def test_hostile_texts_are_escaped(made):
    html, markdown = (made[3][1][name].decode() for name in ("report.html", "report.md"))
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;alert(&quot;1&quot;)" in html
    assert html.count("=&lt;script") >= 4  # the title, the heading, the note and the letter
    assert "default-src 'none'" in html and "http" not in html.partition("</style>")[2].partition("<h2>Letter")[0]
    assert (
        "<script" not in markdown
        and "| `x`" not in markdown
        and markdown.count("[link]") == markdown.count("\\[link]") > 0
    )
    assert "prefers-color-scheme: dark" in html and "size: A4" in html


def test_the_page_shows_the_finding_with_its_figures_and_marks_the_draft(made):
    html, markdown = (made[3][1][name].decode() for name in ("report.html", "report.md"))
    assert "| **confirmed** | LCR_MIN | C 76.00.a r0030 c0010 | 93.00% | min 100% | CRR Art. 412(1)" in markdown
    assert "| **missed** | LE_LIMIT | C 28.00 A12 c350 | 27.00% | max 25% | CRR Art. 395(1) |" in markdown
    assert "| 94% | figure | **unsupported**: neither the report nor a rule has this figure |" in markdown
    assert '<mark class="bad" title="neither the report nor a rule has this figure">94%</mark>' in html
    assert "violated if C 76.00.a r0030 c0010 &lt; 1" in html and "blocked, written as a draft" in html


def test_the_overview_and_the_csv(made, tmp_path):
    record = made[2]
    write_overview(tmp_path, [record], ["<b>x</b>.zip: damaged"])
    index = (tmp_path / "index.html").read_text()
    assert "<script" not in index and "<b>" not in index and "&lt;b&gt;x&lt;/b&gt;.zip: damaged" in index
    assert f'href="{made[1].name}/report.html"' in index
    rows = list(csv.DictReader(io.StringIO((tmp_path / "findings.csv").read_text())))
    findings = [row for row in rows if row["verdict"] != "about the report"]
    assert [(row["verdict"], row["rule"], row["value"], row["letter"]) for row in findings] == [
        ("confirmed", "LCR_MIN", "93.00%", "draft"),
        ("missed", "LE_LIMIT", "27.00%", "draft"),
    ]
    assert all(row["bank"].startswith("'=<script>") for row in rows)  # no formula of a spreadsheet


def test_the_audit_has_the_hashes_of_the_pages_and_the_raw_answer(made):
    audit = json.loads((made[1] / "audit.json").read_text())
    assert audit["outputs"] == {
        path.name: output.hash_of_file(path) for path in made[1].iterdir() if path.name != "audit.json"
    }
    assert audit["question"]["answer"].startswith("Checks:\nLCR 93%") and audit["question"]["profile"] == "laptop"
    assert {"rule": "OF_SUM", "reason": "C 01.00 has no filing indicator"} in audit["skipped"]
    assert {one["rule"] for one in audit["undecided"]} >= {"OCR_TC", "LCR_CALC"}


def test_an_interrupted_report_leaves_nothing_behind(made, tmp_path, monkeypatch):
    def interrupted(record):
        raise KeyboardInterrupt

    report = read(tmp_path / "files")
    monkeypatch.setattr(output, "html_page", interrupted)
    job = Job(Case(report, Addressee("E", "E", "", "")), tmp_path / "out", False, {})
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        finish(job)
    assert [path.name for path in (tmp_path / "out").glob("*/*") if ".tmp" not in path.parent.name] == []
    monkeypatch.undo()
    finish(job)
    assert len(list((tmp_path / "out").glob("*/audit.json"))) == 1 and not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("entity", ["../../etc", "a/b", ".hidden", "x" * 500, "LEI\n", "Ä"])
def test_no_entity_is_used_as_a_path(entity):
    name = folder_name(entity, "2026-03-31")
    assert "/" not in name and not name.startswith(".") and len(name) < 140 and name.isprintable() and name.isascii()
    assert name != folder_name(entity + " ", "2026-03-31")


def test_a_plain_entity_is_its_own_folder():
    assert folder_name("LEI1.CON", "2026-03-31") == "LEI1.CON_2026-03-31"


def test_the_key_depends_on_what_changes_the_result_and_not_on_places():
    from xbrl.desk.audit import key_of, versions

    known = versions()
    assert set(known) == {"project", "code", "rules", "note_rules", "cells", "python", "libraries"}
    assert all(len(known[name]) == 64 for name in ("code", "rules", "note_rules", "cells"))
    one = key_of(known | {"model": {"path": "a", "fingerprint": "f"}}, {"draft": False})
    assert one == key_of(known | {"model": {"path": "b", "fingerprint": "f"}}, {"draft": False})
    others = [known | {"model": {"path": "a", "fingerprint": "g"}}, replace_rules(known)]
    assert len({one, *(key_of(other, {"draft": False}) for other in others), key_of(known, {"draft": True})}) == 4


def replace_rules(known):
    return known | {"model": {"path": "a", "fingerprint": "f"}, "rules": "0" * 64}
