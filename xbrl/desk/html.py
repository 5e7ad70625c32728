"""The pages as HTML: self-contained, light and dark, and printable on A4. Every text is escaped."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from xbrl.desk.letter import BLOCKED, DRAFT, DRAFT_LINE, NONE, READY
from xbrl.desk.markdown import LETTER_STATES

STYLE = Path(__file__).with_name("style.css")
COLOURS = {"confirmed": "good", "found by rule": "good", READY: "good"}
COLOURS |= dict.fromkeys(("refuted", "missed", "not covered", BLOCKED, NONE), "bad")
COLOURS |= dict.fromkeys(("not decidable by rule", DRAFT), "open")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no script, no network


def page(title: str, body: Iterable[str]) -> str:
    """A whole page. `body` are pieces of HTML."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def html_page(record: dict) -> str:
    """The page of one record (`record.make_record`)."""
    return page(f"{record['bank']}, {record['period']}", _body(record))


def tag(text: str, key: str = "") -> str:
    """A coloured word: a verdict, or the state of a letter (`key`)."""
    return f'<span class="tag {COLOURS.get(key or text, "")}">{escape(text)}</span>'


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    """A table of rows that are HTML."""
    heads = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _body(record: dict) -> Iterator[str]:
    yield f"<h1>{escape(record['bank'])}, {escape(record['period'])}</h1>"
    facts = f"{record['entity']} · {record['format']} · {record['facts']} facts · {record['currency'] or 'no single currency'}"
    yield f'<p class="head">{escape(facts)} · by {escape(record["by"])}</p>'
    yield f'<p class="head">{escape(", ".join(record["files"]))}</p>'
    if record["earlier"]:
        yield f'<p class="head">earlier reports: {escape(", ".join(record["earlier"]))}</p>'
    yield "<h2>Findings</h2>"
    yield _findings(record["findings"])
    yield from _results("About the report itself", record["about_the_report"])
    yield from _results("Duties that the figures trigger", record["duties"])
    yield from _letter(record["letter"])
    yield from _list("Notes of the bank", record["notes"])
    decisions = [f"{one['rule']} {one['cell']}: {one['state']} ({one['where']})" for one in record["decisions"]]
    yield from _list("Decisions of the desk", decisions)
    yield from _results("Rules that are not decided", record["undecided"])
    yield from _list("Warnings of the reader", record["warnings"])
    skipped = [f"{one['rule']}: {one['reason']}" for one in record["skipped"]]
    yield from _list("Rules that do not apply", skipped, folded=True)
    yield from _list("Rules that are met", record["met"], folded=True)


def _findings(findings: list[dict]) -> str:
    if not findings:
        return "<p>None.</p>"
    rows = []
    for one in findings:
        cells = [tag(one["verdict"]), escape(one["rule"])]
        cells += [escape(one[key]) for key in ("cell", "value", "limit", "legal")]
        rows.append(_row(cells))
        written = f"the model wrote: {one['line']}" if one["line"] else ""
        details = filter(None, (one["title"], one["reason"], one["formula"], *one["inputs"], written))
        rows.append(f'<tr class="detail"><td></td><td colspan="5">{"<br>".join(map(escape, details))}</td></tr>')
    return table(("verdict", "rule", "cell", "value", "limit", "article"), rows)


def _results(title: str, results: list[dict]) -> Iterator[str]:
    if results:
        yield f"<h2>{escape(title)}</h2>"
        keys = ("rule", "cell", "value", "limit", "legal")
        rows = (_row([*(escape(one[key]) for key in keys), escape(one["reason"] or one["title"])]) for one in results)
        yield table(("rule", "cell", "value", "limit", "article", "reason"), rows)


def _letter(letter: dict) -> Iterator[str]:
    yield f"<h2>Letter {tag(LETTER_STATES[letter['state']], letter['state'])}</h2>"
    if letter["reasons"]:
        yield f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in letter['reasons'])}</ul>"
    if letter["text"]:
        yield f'<div class="letter">{_marked(letter["text"], letter["statements"])}</div>'
    if letter["statements"]:
        rows = (
            _row(
                [
                    escape(one["text"]),
                    escape(one["kind"]),
                    escape(one["source"]) or f"{tag('unsupported', BLOCKED)} {escape(one['problem'])}",
                ]
            )
            for one in letter["statements"]
        )
        yield f"<details><summary>Statements of the letter</summary>{table(('statement', 'kind', 'supported by'), rows)}</details>"


def _marked(text: str, statements: list[dict]) -> str:
    """The text with a mark on each statement, in their order."""
    parts, place = [], 0
    for one in statements:
        start = text.find(one["text"], place)
        if start < 0:
            continue
        colour = "good" if one["source"] else "bad"
        hint = escape(one["source"] or one["problem"], quote=True)
        parts.append(f'{escape(text[place:start])}<mark class="{colour}" title="{hint}">{escape(one["text"])}</mark>')
        place = start + len(one["text"])
    body = "".join(parts) + escape(text[place:])
    return body.replace(DRAFT_LINE, f"<strong>{DRAFT_LINE}</strong>")


def _list(title: str, items: Sequence[str], folded: bool = False) -> Iterator[str]:
    if items:
        body = f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        head = f"{escape(title)} ({len(items)})"
        yield f"<details><summary>{head}</summary>{body}</details>" if folded else f"<h2>{escape(title)}</h2>{body}"


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
