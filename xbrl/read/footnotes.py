"""Footnotes of XML reports: `link:footnoteLink` in xBRL-XML, `ix:footnote` in inline XBRL.

A footnote is attached to facts by their ids. Its text is taken as filed, without markup; `report_notes.make_notes` cleans it.

Sources: XBRL 2.1, section 4.11; Inline XBRL 1.0 and 1.1, Part 1, on ix:footnote, ix:relationship and ix:continuation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from common.errors import UserError
from xbrl.read.assemble import ParsedFile
from xbrl.read.report_notes import BLOCKS, FACT_FOOTNOTE, MAX_FILED_CHARACTERS

INLINE = ("http://www.xbrl.org/2013/inlineXBRL", "http://www.xbrl.org/2008/inlineXBRL")
EXCLUDED = tuple(f"{{{namespace}}}exclude" for namespace in INLINE)
LINK = "{http://www.xbrl.org/2003/linkbase}"
XLINK = "{http://www.w3.org/1999/xlink}"
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
MAX_LINKS = 100_000


@dataclass
class Footnotes:
    """The footnotes of a report."""

    texts: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (text, language)
    attached: dict[str, list[str]] = field(default_factory=dict)  # id of a fact -> names of its footnotes
    links: int = 0

    def link(self, facts: Sequence[str], notes: Sequence[str]) -> None:
        """Attach every note to every fact. Raises `UserError` if the report has too many links."""
        self.links += len(facts) * len(notes)
        if self.links > MAX_LINKS:
            raise UserError(f"more than {MAX_LINKS} links between facts and footnotes; refused")
        for fact in facts:
            self.attached.setdefault(fact, []).extend(notes)


def add_footnotes(parsed: ParsedFile, roots: Sequence) -> ParsedFile:
    """The parsed file with the footnotes of its documents. `roots` are the lxml root elements of these documents.

    A footnote on something that is not a fact of the report gives a warning. Raises `UserError` for too many links.
    """
    try:
        found = _linkbase_footnotes(roots[0]) if parsed.format == "xBRL-XML" else _inline_footnotes(roots)
    except UserError as error:
        raise UserError(f"{parsed.path}: {error}") from error
    facts = tuple(replace(one, notes=tuple(found.attached.get(one.id, ())) if one.id else ()) for one in parsed.facts)
    unknown = sorted(found.attached.keys() - {fact.id for fact in facts if fact.id})
    warnings = [f"a footnote is attached to {name[:80]!r}, which is not a fact of the report" for name in unknown[:10]]
    if unknown[10:]:
        warnings.append(f"{len(unknown[10:])} more footnotes are attached to something that is not a fact")
    return replace(parsed, facts=facts, notes=found.texts, warnings=(*parsed.warnings, *warnings))


def _linkbase_footnotes(root) -> Footnotes:  # noqa: ANN001 (an lxml element)
    """Footnotes of an xBRL-XML instance. Within one extended link, arcs connect the labels of locators and footnotes."""
    found = Footnotes()
    for extended in root.iter(f"{LINK}footnoteLink"):
        facts: dict[str, list[str]] = {}
        notes: dict[str, list[str]] = {}
        for locator in extended.iterchildren(f"{LINK}loc"):
            fact = (locator.get(f"{XLINK}href") or "").rpartition("#")[2]
            facts.setdefault(locator.get(f"{XLINK}label"), []).append(fact)
        for footnote in extended.iterchildren(f"{LINK}footnote"):
            name = f"footnote {len(found.texts) + 1}"
            found.texts[name] = (_text(footnote), _language(footnote))
            notes.setdefault(footnote.get(f"{XLINK}label"), []).append(name)
        for arc in extended.iterchildren(f"{LINK}footnoteArc"):
            if arc.get("use") != "prohibited":
                found.link(facts.get(arc.get(f"{XLINK}from"), ()), notes.get(arc.get(f"{XLINK}to"), ()))
    return found


def _inline_footnotes(roots: Sequence) -> Footnotes:
    """Footnotes of an inline report. In 1.1 `ix:relationship` links them; in 1.0 a fact names them in `footnoteRefs`."""
    found = Footnotes()
    continuations = {element.get("id"): element for element in _inline_elements(roots, "continuation")}
    for footnote in _inline_elements(roots, "footnote"):
        text, part, seen = _text(footnote), footnote, set()
        while (after := part.get("continuedAt")) in continuations and after not in seen:
            seen.add(after)
            part = continuations[after]
            text += _text(part, MAX_FILED_CHARACTERS - len(text))
        name = footnote.get("id") or footnote.get("footnoteID") or f"footnote {len(found.texts) + 1}"
        found.texts[name] = (text, _language(footnote))
    for relationship in _inline_elements(roots, "relationship"):
        if relationship.get("arcrole", FACT_FOOTNOTE) == FACT_FOOTNOTE:
            found.link((relationship.get("fromRefs") or "").split(), (relationship.get("toRefs") or "").split())
    for fact in (element for root in roots for element in root.iter("*")):
        if "footnoteRefs" in fact.attrib and "id" in fact.attrib:
            found.link([fact.get("id")], fact.get("footnoteRefs").split())
    return found


def _inline_elements(roots: Sequence, name: str) -> Iterator:
    return (element for root in roots for element in root.iter(*(f"{{{namespace}}}{name}" for namespace in INLINE)))


def _language(element) -> str:  # noqa: ANN001
    return next((e.get(LANGUAGE) for e in (element, *element.iterancestors()) if e.get(LANGUAGE)), "")


def _text(element, limit: int = MAX_FILED_CHARACTERS) -> str:  # noqa: ANN001
    """At most `limit` characters of the displayed text of an element, with a space around blocks."""
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
        if isinstance(child.tag, str) and child.tag not in EXCLUDED:  # neither a comment nor an instruction
            space = " " if child.tag.rpartition("}")[2] in BLOCKS else ""
            yield space
            yield from _parts(child)
            yield space
        yield child.tail or ""
