"""Make the notes of a report from the footnotes that a bank has filed, whose text is not trusted."""

import re
import unicodedata
from collections.abc import Iterable
from html.parser import HTMLParser

from xbrl.read.report import CellKey, Note

FACT_FOOTNOTE = "http://www.xbrl.org/2003/arcrole/fact-footnote"  # the arcrole of a footnote on a fact
MAX_NOTE_CHARACTERS = 4_000
MAX_NOTES = 1_000
MAX_FILED_CHARACTERS = 8 * MAX_NOTE_CHARACTERS  # with markup and white space; the rest of a longer text is not read
MARKUP = re.compile(r"</?[A-Za-z][^<>]{0,200}>|&(#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z]{2,8});")
BLOCKS = {"br", "dd", "div", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "li", "p", "table", "td", "th", "tr"}  # of XHTML
LANGUAGE = re.compile(r"[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8}){0,4}", re.ASCII)


def make_notes(footnotes: Iterable[Note]) -> tuple[tuple[Note, ...], list[str]]:
    """(notes of a report, warnings). Each note is one line of visible text.

    A text is cut after `MAX_NOTE_CHARACTERS`, an empty one is left out, and so is what exceeds `MAX_NOTES`; each gives a
    warning.
    """
    notes, warnings = [], []
    for note in footnotes:
        text = one_line(note.text)
        if len(text) > MAX_NOTE_CHARACTERS:
            warnings.append(f"a note is cut to {MAX_NOTE_CHARACTERS} characters: {text[:60]!r} ...")
            text = text[:MAX_NOTE_CHARACTERS].rstrip()
        if text:
            notes.append(Note(text, note.cells, note.language if LANGUAGE.fullmatch(note.language) else ""))
        else:
            warnings.append("a note has no text and is left out")
    joined = join_notes(notes)
    if len(joined) > MAX_NOTES:
        warnings.append(f"the report has {len(joined)} notes; those after the first {MAX_NOTES} are left out")
    return joined[:MAX_NOTES], warnings


def join_notes(notes: Iterable[Note]) -> tuple[Note, ...]:
    """Notes of equal text and language become one, on the cells of all."""
    cells: dict[tuple[str, str], dict[CellKey, None]] = {}
    for note in notes:
        cells.setdefault((note.text, note.language), {}).update(dict.fromkeys(note.cells))
    return tuple(Note(text, tuple(places), language) for (text, language), places in cells.items())


def one_line(text: str) -> str:
    """A text without line breaks, control characters and invisible characters (Unicode categories C*, Zl, Zp).

    What a bank has filed can then neither begin a line of its own in the text of a report, nor hide or reorder a part.
    """
    if not (text.isascii() and text.isprintable()):
        text = "".join(" " if (kind := unicodedata.category(c)) == "Cc" else "" if kind[0] == "C" else c for c in text)
    return " ".join(text.split())


def without_markup(text: str) -> str:
    """The text of an XHTML fragment, which the value of an xBRL-JSON note may be. A text without markup is returned as it is."""
    if not MARKUP.search(text):
        return text
    parser = _FragmentText()
    parser.feed(text[:MAX_FILED_CHARACTERS])
    parser.close()
    return "".join(parser.parts)


class _FragmentText(HTMLParser):
    """Collects the text of a fragment, with a space around blocks."""

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
