"""The page of a report as Markdown."""

from collections.abc import Iterator

from xbrl.desk.letter import BLOCKED, DRAFT, NONE, READY

LETTER_STATES = {
    READY: "ready to be signed",
    BLOCKED: "blocked",
    DRAFT: "blocked, written as a draft",
    NONE: "none",
}


def markdown_page(record: dict) -> str:
    """The page of one record (`record.make_record`)."""
    return "\n".join(_lines(record)) + "\n"


def summary_line(record: dict) -> str:
    """One line for the terminal: bank, date, findings, letter."""
    counts = ", ".join(f"{number} {verdict}" for verdict, number in record["counts"].items()) or "no findings"
    about = len(record["about_the_report"])
    more = f", {about} about the report itself" if about else ""
    return f"{record['entity']} {record['period']}: {counts}{more}; letter {LETTER_STATES[record['letter']['state']]}"


def _lines(record: dict) -> Iterator[str]:
    yield f"# {_text(record['bank'])}, {record['period']}"
    yield ""
    yield (
        f"{_text(record['entity'])} · {record['format']} · {record['facts']} facts · {record['currency'] or 'no single currency'} · "
        f"by {record['by']}"
    )
    yield f"Files: {_text(', '.join(record['files']))}"
    if record["earlier"]:
        yield f"Earlier reports: {', '.join(record['earlier'])}"
    yield from _findings(record["findings"])
    yield from _section("About the report itself", [_about(one) for one in record["about_the_report"]])
    yield from _section("Duties that the figures trigger", [_about(one) for one in record["duties"]])
    yield from _letter(record["letter"])
    yield from _section("Notes of the bank", [_text(note) for note in record["notes"]])
    decisions = [f"{one['rule']} {one['cell']}: {one['state']} ({one['where']})" for one in record["decisions"]]
    yield from _section("Decisions of the desk", map(_text, decisions))
    yield from _section("Rules that are not decided", [_about(one) for one in record["undecided"]])
    skipped = [f"{one['rule']}: {_text(one['reason'])}" for one in record["skipped"]]
    yield from _section("Rules that do not apply", skipped)
    yield from _section("Rules that are met", [", ".join(record["met"])] if record["met"] else [])
    yield from _section("Warnings of the reader", map(_text, record["warnings"]))


def _findings(findings: list[dict]) -> Iterator[str]:
    yield ""
    yield "## Findings"
    yield ""
    if not findings:
        yield "None."
        return
    yield "| verdict | rule | cell | value | limit | article |"
    yield "|---|---|---|---|---|---|"
    for one in findings:
        cells = (f"**{one['verdict']}**", one["rule"], one["cell"], one["value"], one["limit"], one["legal"])
        yield f"| {' | '.join(_text(cell) for cell in cells)} |"
    for one in findings:
        yield ""
        yield f"**{one['rule']}** {_text(one['title'])}".rstrip()
        details = [one["reason"], one["formula"], *one["inputs"]]
        details += [f"the model wrote: {one['line']}"] if one["line"] else []
        yield from (f"- {_text(detail)}" for detail in details if detail)


def _letter(letter: dict) -> Iterator[str]:
    yield ""
    yield f"## Letter: {LETTER_STATES[letter['state']]}"
    if letter["reasons"]:
        yield ""
        yield from (f"- {_text(reason)}" for reason in letter["reasons"])
    if letter["text"]:
        yield ""
        yield from (f"> {_text(line)}".rstrip() for line in letter["text"].splitlines())
    if letter["statements"]:
        yield ""
        yield "| statement | of the kind | supported by |"
        yield "|---|---|---|"
        for one in letter["statements"]:
            source = one["source"] or f"**unsupported**: {one['problem']}"
            yield f"| {_text(one['text'])} | {one['kind']} | {_text(source)} |"


def _section(title: str, items) -> Iterator[str]:  # noqa: ANN001 (any iterable of texts)
    items = list(items)
    if items:
        yield ""
        yield f"## {title}"
        yield ""
        yield from (f"- {item}" for item in items)


def _about(one: dict) -> str:
    figures = ", ".join(filter(None, (one["value"], one["limit"])))
    parts = [one["rule"], _text(one["cell"]), figures, _text(one["legal"]), _text(one["reason"] or one["title"])]
    return ": ".join(filter(None, parts))


def _text(text: str) -> str:
    """A text of a report or a model inside Markdown: it can begin no row, heading or tag of its own."""
    for character, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("[", "\\["), ("\n", " ")):
        text = text.replace(character, escaped)
    return text
