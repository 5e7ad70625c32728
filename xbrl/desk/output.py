"""Write the results: a folder for each report, which is complete or absent, and the overview of all reports.

The pages are made from the templates of `pages/`: self-contained, light and dark, printable on A4. Every text is escaped.
"""

import csv
import datetime
import functools
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from common.durable_files import new_directory, write_durably
from common.sha256 import sha256
from xbrl.desk.letters import group_thousands
from xbrl.desk.record import BLOCKED, READY, Case, Form, make_record
from xbrl.desk.verdicts import VERDICTS

PAGES = Path(__file__).with_name("pages")
RECORD_FILE, AUDIT_FILE = "report.json", "audit.json"
STATES = {READY: "ready to be signed", BLOCKED: BLOCKED}  # state of a letter -> printed text
COLUMNS = ("entity", "bank", "period", "verdict", "rule", "cell", "value", "limit", "legal", "reason", "letter", "page")
NEGATIVE = re.compile(r"-[\d.]+(?:%| \w+)?")  # a figure: `-22729 thousand`
INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
# Verdict or state -> class of its tag in style.css; "bad" for all others.
COLOURS = {"confirmed": "good", READY: "good", "not decidable by rule": "open", "found by rule": ""}


def finish(case: Case, out: Path, form: Form, draft: bool, audit: dict) -> dict:
    """Analyse one report, write its folder below `out`, and return its record.

    With `draft`, a letter that is not ready is written too. `audit` has the entries that all audit records share; the entries of
    this case are in `case.depends`.
    """
    record = make_record(case, form)
    letter, reply = record["letter"], case.reply
    with new_directory(out / folder_name(record["entity"], record["period"])) as folder:
        _write(folder / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        _write(folder / "report.html", page(record, form.language))
        if letter["state"] == READY:
            _write(folder / "letter.txt", letter["text"] + "\n")
        elif draft:
            reasons = "".join(f"- {reason}\n" for reason in letter["reasons"])
            _write(folder / "letter-DRAFT.txt", f"{reasons}\n{letter['text']}\n")
        audited = {
            "entity": record["entity"],
            "period": record["period"],
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **case.depends,
            **audit,
            "question": reply
            and {
                "profile": reply.profile,
                "prompt": list(reply.prompt),
                "answer": reply.text,
                "cut_short": reply.cut_short,
                "problem": reply.problem,
            },
            "outputs": {path.name: sha256(path) for path in sorted(folder.iterdir())},
        }
        _write(folder / AUDIT_FILE, json.dumps(audited, indent=1, ensure_ascii=False) + "\n")
    return record


def folder_name(entity: str, period: str) -> str:
    """Return the name of a report's folder. A file may give any text as its entity, so only plain characters are kept."""
    name = f"{entity}_{period}"
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:120].lstrip(".")
    if safe != name:
        safe += "-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return safe


def page(record: dict, language: str) -> str:
    """Return the HTML page of one record (`record.make_record`). `language` is the letter's language, for screen readers."""
    return _environment().get_template("report.html.jinja").render(**record, language=language)


def write_overview(out: Path, records: Sequence[dict], refused: Sequence[str]) -> None:
    """Write index.html, and findings.csv with one line per finding, ordered by bank and date."""
    ordered = sorted(records, key=lambda record: (record["entity"], record["period"]))
    for record in ordered:
        record["page"] = f"{folder_name(record['entity'], record['period'])}/report.html"
    used = [verdict for verdict in VERDICTS if any(verdict in record["counts"] for record in records)]
    fields = {"records": ordered, "refused": refused, "used": used, "totals": totals(records)}
    write_durably(out / "index.html", _environment().get_template("index.html.jinja").render(**fields))
    write_durably(out / "findings.csv", _findings(ordered))


def totals(records: Sequence[dict]) -> str:
    """Return the numbers of reports, findings and letters in one line."""
    verdicts, letters = Counter(), Counter()
    for record in records:
        verdicts.update(record["counts"])
        letters[STATES[record["letter"]["state"]]] += 1
    findings = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict]) or "no findings"
    states = ", ".join(f"{number} {state}" for state, number in sorted(letters.items())) or "none"
    return f"{len(records)} report{'' if len(records) == 1 else 's'}: {findings}; letters: {states}"


def _findings(records: Sequence[dict]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        about = [{**finding, "verdict": "about the report"} for finding in record["about_the_report"]]
        for finding in (*record["findings"], *about):
            fields = {**finding, **{key: record[key] for key in ("entity", "bank", "period", "page")}}
            fields["letter"] = record["letter"]["state"]
            writer.writerow([_cell(str(fields[column])) for column in COLUMNS])
    return text.getvalue()


def _cell(text: str) -> str:
    """Quote a field so that no spreadsheet takes it, or its part after a semicolon, for a formula.

    In some countries spreadsheets split fields at semicolons.
    """
    text = re.sub(r"([;\r\n\t])(?=\s*[=+@-])", r"\1'", text.encode("utf-8", "replace").decode())
    is_formula = text[:1] in ("=", "+", "@", "\t", "\r") or (text[:1] == "-" and not NEGATIVE.fullmatch(text))
    return f"'{text}" if is_formula else text


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_visible,
    )
    style = Markup((PAGES / "style.css").read_text(encoding="utf-8"))  # noqa: S704 (our own file)
    environment.globals |= {"style": style, "states": STATES, "colours": COLOURS}
    environment.filters |= {"url": quote, "group_thousands": group_thousands}
    return environment


def _visible(value: object) -> object:
    """Replace invisible characters, and characters that change the direction of the text after them, by a visible mark."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", value)


def _write(path: Path, text: str) -> None:
    """Write UTF-8. Half of a surrogate pair, which a hostile file may contain, is written as `?`."""
    path.write_bytes(text.encode("utf-8", "replace"))
