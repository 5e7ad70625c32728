"""Write what was found about one report: a folder with its pages, its letter and its audit record, complete or absent."""

import datetime
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import new_directory
from xbrl.desk.audit import AUDIT_FILE, hash_of_file
from xbrl.desk.html import html_page
from xbrl.desk.letter import DRAFT, READY
from xbrl.desk.markdown import markdown_page
from xbrl.desk.record import Case, make_record

RECORD_FILE = "report.json"


@dataclass(frozen=True)
class Job:
    """One report to be finished by a worker process. `audit` is what its audit record has beside the result."""

    case: Case
    out: Path
    draft: bool
    audit: dict


def finish(job: Job) -> dict:
    """Analyse one report, write its folder, and return its record."""
    record = make_record(job.case, job.draft)
    letter = record["letter"]
    with new_directory(job.out / folder_name(record["entity"], record["period"])) as folder:
        _write(folder / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        _write(folder / "report.md", markdown_page(record))
        _write(folder / "report.html", html_page(record))
        if letter["state"] in (READY, DRAFT):
            name = "letter.txt" if letter["state"] == READY else "letter-DRAFT.txt"
            _write(folder / name, letter["text"] + "\n")
        outputs = {path.name: hash_of_file(path) for path in sorted(folder.iterdir())}
        audit = _audit_record(job, record, outputs)
        _write(folder / AUDIT_FILE, json.dumps(audit, indent=1, ensure_ascii=False) + "\n")
    return record


def folder_name(entity: str, period: str) -> str:
    """The folder of a report. An entity is any text of a file, so what is no plain character is replaced."""
    name = f"{entity}_{period}"
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:120].lstrip(".")
    if safe != name:
        safe += "-" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return safe


def _audit_record(job: Job, record: dict, outputs: dict[str, str]) -> dict:
    reply = job.case.reply
    return {
        "entity": record["entity"],
        "period": record["period"],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **job.audit,
        "incomplete": list(job.case.report.incomplete),
        "warnings": record["warnings"],
        "undecided": [{"rule": one["rule"], "reason": one["reason"]} for one in record["undecided"]],
        "skipped": record["skipped"],
        "question": None
        if reply is None
        else {
            "profile": reply.profile,
            "prompt": list(reply.prompt),
            "answer": reply.text,
            "cut_short": reply.cut_short,
            "problem": reply.problem,
        },
        "outputs": outputs,
    }


def _write(path: Path, text: str) -> None:
    """UTF-8. Half of a surrogate pair, which a hostile file may contain, is written as `?`."""
    path.write_bytes(text.encode("utf-8", "replace"))
