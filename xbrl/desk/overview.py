"""What a folder of reports comes to: index.html, and findings.csv with one line per finding."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from common.durable_files import write_durably
from xbrl.desk.html import page, table, tag
from xbrl.desk.markdown import LETTER_STATES
from xbrl.desk.output import folder_name
from xbrl.desk.verdicts import VERDICTS

COLUMNS = ("entity", "bank", "period", "verdict", "rule", "cell", "value", "limit", "legal", "reason", "letter", "page")


def write_overview(out: Path, records: Sequence[dict], refused: Sequence[str]) -> None:
    """Write both files for these records, in the order of bank and date."""
    ordered = sorted(records, key=lambda record: (record["entity"], record["period"]))
    write_durably(out / "index.html", page("Reports", _index(ordered, refused)))
    write_durably(out / "findings.csv", _findings(ordered))


def totals(records: Sequence[dict]) -> str:
    """The reports, findings and letters in one line."""
    verdicts, letters = Counter(), Counter()
    for record in records:
        verdicts.update(record["counts"])
        letters[LETTER_STATES[record["letter"]["state"]]] += 1
    found = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict]) or "no findings"
    return f"{len(records)} reports: {found}; letters: {', '.join(f'{n} {state}' for state, n in sorted(letters.items())) or 'none'}"


def _index(records: Sequence[dict], refused: Sequence[str]) -> Iterator[str]:
    yield "<h1>Reports</h1>"
    yield f'<p class="head">{escape(totals(records))}</p>'
    if refused:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in refused)
        yield f"<h2>Refused files ({len(refused)})</h2><ul>{items}</ul>"
    used = [verdict for verdict in VERDICTS if any(verdict in record["counts"] for record in records)]
    rows = []
    for record in records:
        link = quote(f"{folder_name(record['entity'], record['period'])}/report.html")
        cells = [f'<a href="{link}">{escape(record["bank"])}</a>', escape(record["entity"]), escape(record["period"])]
        cells += [str(record["counts"].get(verdict, "")) for verdict in used]
        cells += [
            str(len(record["about_the_report"]) or ""),
            tag(LETTER_STATES[record["letter"]["state"]], record["letter"]["state"]),
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    yield table(("bank", "entity", "date", *used, "about the report", "letter"), rows)


def _findings(records: Sequence[dict]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in records:
        about = [{**one, "verdict": "about the report"} for one in record["about_the_report"]]
        for one in (*record["findings"], *about):
            known = {**one, **{key: record[key] for key in ("entity", "bank", "period")}}
            known["letter"] = record["letter"]["state"]
            known["page"] = f"{folder_name(record['entity'], record['period'])}/report.html"
            writer.writerow([_cell(str(known[column])) for column in COLUMNS])
    return text.getvalue()


def _cell(text: str) -> str:
    """A field that no spreadsheet takes for a formula. Text that is no valid character is replaced."""
    text = text.encode("utf-8", "replace").decode()
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t", "\r") else text
