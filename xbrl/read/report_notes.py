"""Read the notes of a report from the footnotes that a bank has filed. Their text is not trusted.

In XML a footnote is attached to facts by their ids: `link:footnoteLink` in xBRL-XML, `ix:footnote` in inline XBRL.

Sources: XBRL 2.1, section 4.11; Inline XBRL 1.0 and 1.1, Part 1, on ix:footnote, ix:relationship and ix:continuation.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from common.errors import UserError
from xbrl.read.filed_report import CellKey, Note

if TYPE_CHECKING:
    from xbrl.read.assemble import ParsedFile

FACT_FOOTNOTE = "http://www.xbrl.org/2003/arcrole/fact-footnote"  # the arcrole of a footnote on a fact
MAX_NOTE_CHARACTERS = 4_000
MAX_NOTES = 1_000
MAX_FILED_CHARACTERS = 8 * MAX_NOTE_CHARACTERS  # markup and white space included; the rest of a longer text is not read
EMPTY_NOTE = "a note has no text and is left out"
MARKUP = re.compile(r"</?[A-Za-z][^<>]{0,200}>|&(#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z]{2,8});")
BLOCKS = {"br", "dd", "div", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "p", "table", "td", "th", "tr"}  # of XHTML
LANGUAGE_CODE = re.compile(r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,4}", re.ASCII)
INLINE = ("http://www.xbrl.org/2013/inlineXBRL", "http://www.xbrl.org/2008/inlineXBRL")
EXCLUDED = tuple(f"{{{namespace}}}exclude" for namespace in INLINE)
LINK = "{http://www.xbrl.org/2003/linkbase}"
XLINK = "{http://www.w3.org/1999/xlink}"
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
MAX_LINKS = 100_000
Texts = dict[str, tuple[str, str]]  # name of a footnote -> (text, language)
Links = tuple[Sequence[str], Sequence[str]]  # (ids of facts, names of footnotes): each fact has each footnote


def make_notes(footnotes: Iterable[Note]) -> tuple[tuple[Note, ...], list[str]]:
    """Return (notes of a report, warnings). Each note is one line of visible text.

    A text is cut after `MAX_NOTE_CHARACTERS`. Empty notes, and notes after the first `MAX_NOTES`, are left out. Each gives a
    warning.
    """
    notes, warnings = [], []
    for note in footnotes:
        text = one_line(note.text)
        if len(text) > MAX_NOTE_CHARACTERS:
            warnings.append(f"a note is cut to {MAX_NOTE_CHARACTERS} characters: {text[:60]!r} ...")
            text = text[:MAX_NOTE_CHARACTERS].rstrip()
        if text:
            notes.append(Note(text, note.cells, note.language if LANGUAGE_CODE.fullmatch(note.language) else ""))
        else:
            warnings.append(EMPTY_NOTE)
    joined = join_notes(notes)
    if len(joined) > MAX_NOTES:
        warnings.append(f"the report has {len(joined)} notes; those after the first {MAX_NOTES} are left out")
    return joined[:MAX_NOTES], warnings


def join_notes(notes: Iterable[Note]) -> tuple[Note, ...]:
    """Merge notes of equal text and language into one note that has the cells of all."""
    cells: dict[tuple[str, str], dict[CellKey, None]] = {}
    for note in notes:
        cells.setdefault((note.text, note.language), {}).update(dict.fromkeys(note.cells))
    return tuple(Note(text, tuple(places), language) for (text, language), places in cells.items())


def one_line(text: str) -> str:
    """Remove line breaks, control characters and invisible characters (Unicode categories C*, Zl, Zp) from a text.

    Filed text can then neither begin a line of its own in the text of a report, nor hide or reorder parts of the report.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(" " if (kind := unicodedata.category(c)) == "Cc" else "" if kind[0] == "C" else c for c in text)
    return " ".join(text.split())


def without_markup(text: str) -> str:
    """Return the text of an XHTML fragment, such as the value of an xBRL-JSON note. A text without markup stays unchanged."""
    if not MARKUP.search(text):
        return text
    parser = _FragmentText()
    parser.feed(text[:MAX_FILED_CHARACTERS])
    parser.close()
    return "".join(parser.parts)


class _FragmentText(HTMLParser):
    """A parser that collects the text of a fragment, with a space around blocks. lxml loses text below 256 nested elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in BLOCKS:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, [])


def add_footnotes(parsed: "ParsedFile", roots: Sequence) -> "ParsedFile":
    """Return the parsed file with the footnotes of its documents, whose lxml root elements are `roots`.

    A footnote that is attached to no fact of the report gives a warning. Raise `UserError` for too many links.
    """
    texts: Texts = {}
    attached: dict[str, list[str]] = {}  # id of a fact -> names of its footnotes
    links = 0
    groups = (
        _linkbase_footnotes(roots[0], texts)
        if parsed.format == "xBRL-XML"
        else _inline_footnotes(roots, texts, str(parsed.path))
    )
    for names, notes in groups:
        links += len(names) * len(notes)
        if links > MAX_LINKS:
            raise UserError(f"{parsed.path}: more than {MAX_LINKS} links between facts and footnotes; refused")
        for name in names:
            attached.setdefault(name, []).extend(notes)
    facts = tuple(replace(fact, notes=tuple(attached.get(fact.id, ())) if fact.id else ()) for fact in parsed.facts)
    unknown = sorted(attached.keys() - {fact.id for fact in facts if fact.id})
    warnings = [f"a footnote is attached to {name[:80]!r}, which is not a fact of the report" for name in unknown[:10]]
    if unknown[10:]:
        warnings.append(f"{len(unknown[10:])} more footnotes are attached to something that is not a fact")
    return replace(parsed, facts=facts, notes=texts, warnings=(*parsed.warnings, *warnings))


def _linkbase_footnotes(root, texts: Texts) -> Iterator[Links]:  # noqa: ANN001 (an lxml element)
    """Read the footnotes of an xBRL-XML instance into `texts` and yield their links to facts.

    Within one extended link, arcs connect the labels of locators and footnotes.
    """
    for extended in root.iter(f"{LINK}footnoteLink"):
        facts: dict[str, list[str]] = {}
        notes: dict[str, list[str]] = {}
        for locator in extended.iterchildren(f"{LINK}loc"):
            fact = (locator.get(f"{XLINK}href") or "").rpartition("#")[2]
            facts.setdefault(locator.get(f"{XLINK}label"), []).append(fact)
        for footnote in extended.iterchildren(f"{LINK}footnote"):
            name = f"footnote {len(texts) + 1}"
            texts[name] = (_text(footnote), _language(footnote))
            notes.setdefault(footnote.get(f"{XLINK}label"), []).append(name)
        for arc in extended.iterchildren(f"{LINK}footnoteArc"):
            if arc.get("use") != "prohibited":
                yield facts.get(arc.get(f"{XLINK}from"), []), notes.get(arc.get(f"{XLINK}to"), [])


def _inline_footnotes(roots: Sequence, texts: Texts, where: str) -> Iterator[Links]:
    """Read the footnotes of an inline report into `texts` and yield their links to facts.

    In inline XBRL 1.1 `ix:relationship` links footnotes to facts; in 1.0 a fact names its footnotes in `footnoteRefs`. Raise
    `UserError`, whose message starts with `where`, for too many continuations: many footnotes may share one long chain.
    """
    steps, continuations = 0, {element.get("id"): element for element in _inline_elements(roots, "continuation")}
    for footnote in _inline_elements(roots, "footnote"):
        text, part, seen = _text(footnote), footnote, set()
        while (after := part.get("continuedAt")) in continuations and after not in seen:
            seen.add(after)
            steps += 1
            if steps > MAX_LINKS:
                raise UserError(f"{where}: more than {MAX_LINKS} continuations of footnotes; refused")
            part = continuations[after]
            text += _text(part, MAX_FILED_CHARACTERS - len(text))
        name = footnote.get("id") or footnote.get("footnoteID") or f"footnote {len(texts) + 1}"
        texts[name] = (text, _language(footnote))
    for relationship in _inline_elements(roots, "relationship"):
        if relationship.get("arcrole", FACT_FOOTNOTE) == FACT_FOOTNOTE:
            yield (relationship.get("fromRefs") or "").split(), (relationship.get("toRefs") or "").split()
    for fact in (element for root in roots for element in root.iter("*")):
        if "footnoteRefs" in fact.attrib and "id" in fact.attrib:
            yield [fact.get("id")], fact.get("footnoteRefs").split()


def _inline_elements(roots: Sequence, name: str) -> Iterator:
    return (element for root in roots for element in root.iter(*(f"{{{namespace}}}{name}" for namespace in INLINE)))


def _language(element) -> str:  # noqa: ANN001
    return next((e.get(LANGUAGE) for e in (element, *element.iterancestors()) if e.get(LANGUAGE)), "")


def _text(element, limit: int = MAX_FILED_CHARACTERS) -> str:  # noqa: ANN001
    """Return at most `limit` characters of the displayed text of an element, with a space around blocks."""
    parts, length = [], 0
    for part in _parts(element):
        parts.append(part)
        length += len(part)
        if length > limit:
            break
    return "".join(parts)[:limit]


def _parts(element) -> Iterator[str]:  # noqa: ANN001
    yield element.text or ""
    for child in element:
        # Comments and processing instructions have no tag of type str.
        if isinstance(child.tag, str) and child.tag not in EXCLUDED:
            space = " " if child.tag.rpartition("}")[2] in BLOCKS else ""
            yield space
            yield from _parts(child)
            yield space
        yield child.tail or ""
