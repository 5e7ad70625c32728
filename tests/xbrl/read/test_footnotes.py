"""Footnotes of the bank: the same notes from xBRL-XML, inline XBRL and xBRL-JSON, and hostile notes."""

import json
from dataclasses import replace

import pytest

from common.errors import UserError
from tests.xbrl.read.xbrl_documents import context, document, fact, inline, instance, member, read
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Note
from xbrl.read.render import render_report
from xbrl.read.report_notes import FACT_FOOTNOTE, MAX_LINKS, MAX_NOTE_CHARACTERS, MAX_NOTES, one_line, without_markup
from xbrl.read.xbrl import merge_reports

pytest.importorskip("arelle")

# Tier 1 capital (C 01.00 r0015) and, in a row of C 28.00, the original exposure to the client LEI7.
TIER1 = member("eba_dim_4.0:qACK", "eba_qTP:qx2008") + member("eba_dim_4.0:qADT", "eba_qOR:qx2060")
CLIENT = '<xbrldi:typedMember dimension="eba_dim_4.0:qINC"><eba_typ:CC>LEI7</eba_typ:CC></xbrldi:typedMember>'
EXPOSURE = CLIENT + member("eba_dim_4.0:qLJI", "eba_qAF:qx2011") + member("eba_dim_4.0:qZZX", "eba_qOR:qx2007")
CONTEXTS = context("t1", scenario=TIER1) + context("le", scenario=EXPOSURE)
FACTS = """<eba_met:qABJ id="f1" contextRef="t1" unitRef="eur" decimals="-3">5000</eba_met:qABJ>
<eba_met:qIJJ id="f2" contextRef="le" unitRef="eur" decimals="0">700</eba_met:qIJJ>"""
INLINE_FACTS = """<p><ix:nonFraction id="f1" name="eba_met:qABJ" contextRef="t1" unitRef="eur" decimals="-3">5000</ix:nonFraction>
<ix:nonFraction id="f2" name="eba_met:qIJJ" contextRef="le" unitRef="eur" decimals="0">700</ix:nonFraction></p>"""
TIER1_CELL, CLIENT_CELL = ("C_01.00", "r0015", "c0010"), ("C_28.00", "LEI7", "c040")
EXPECTED = (
    Note("Interim profit of 20 m is included; R&D is not.", (TIER1_CELL,), "en"),
    Note("Klient und Tochter.", (TIER1_CELL, CLIENT_CELL), "de"),
    Note("On the report as a whole.", (), "en"),
)
LOC = '<link:loc xlink:type="locator" xlink:href="{}" xlink:label="{}"/>'
FOOTNOTE = '<link:footnote xlink:type="resource" xlink:label="{}" xlink:role="r" xml:lang="{}">{}</link:footnote>'
ARC = '<link:footnoteArc xlink:type="arc" xlink:arcrole="http://www.xbrl.org/2003/arcrole/fact-footnote" xlink:from="{}" xlink:to="{}"/>'
XHTML = 'xmlns="http://www.w3.org/1999/xhtml"'


def extended(*children: str) -> str:
    return f'<link:footnoteLink xlink:type="extended" xlink:role="http://www.xbrl.org/2003/role/link">{"".join(children)}</link:footnoteLink>'


def xml_document() -> str:
    first = f"<div {XHTML}><p>Interim profit of <b>20</b> m</p><!-- no --><p>is included;\n R&amp;D is not.</p></div>"
    return instance(
        FACTS
        + extended(LOC.format("#f1", "a"), FOOTNOTE.format("x", "en", first), ARC.format("a", "x"))
        + extended(
            LOC.format("report.xbrl#f1", "a"),
            LOC.format("#f2", "a"),
            FOOTNOTE.format("y", "de", "Klient und\u200b Tochter."),
            FOOTNOTE.format("z", "en", "On the report as a whole."),
            ARC.format("a", "y"),
        ),
        CONTEXTS,
    )


def inline_document() -> str:
    """Make the document of `xml_document`. The first footnote is continued and contains an excluded page number."""
    notes = """<div xml:lang="en"><ix:footnote id="n1" continuedAt="k">Interim profit of <b>20</b> m <ix:exclude>page 7</ix:exclude></ix:footnote>
        <ix:footnote id="n2" xml:lang="de">Klient und Tochter.</ix:footnote><ix:footnote id="n3">On the report as a whole.</ix:footnote>
        <ix:continuation id="k">is included; R&amp;D is not.</ix:continuation></div>"""
    links = '<ix:relationship fromRefs="f1" toRefs="n1"/><ix:relationship fromRefs="f1 f2" toRefs="n2"/>'
    document = inline(INLINE_FACTS + notes).replace("<ix:resources>", f"<ix:resources>{CONTEXTS}{links}")
    return document


def json_document(notes: dict[str, tuple[str, str]], links: list[dict]) -> str:
    facts = (
        fact(
            "eba_met:qABJ", "1", "0", unit="iso4217:EUR", eba_dim__qACK="eba_qTP:qx2008", eba_dim__qADT="eba_qOR:qx2060"
        ),
        fact("eba_met:qIJJ", "2", "0", unit="iso4217:EUR", eba_dim__qINC="LEI7", eba_dim__qLJI="eba_qAF:qx2011"),
    )
    facts[1]["dimensions"]["eba_dim:qZZX"] = "eba_qOR:qx2007"
    linked = [item | {"links": link} for item, link in zip(facts, links, strict=True)]
    kinds = {"footnote": FACT_FOOTNOTE, "explains": "http://www.xbrl.org/2009/arcrole/fact-explanatoryFact"}
    return json.dumps(document(*linked, notes=notes, linkTypes=kinds))


def test_the_three_syntaxes_give_the_same_notes(tmp_path) -> None:
    notes = {
        "n1": ("<p>Interim profit of <b>20</b> m</p> <p>is included; R&amp;D is not.</p>", "en"),
        "n2": ("Klient und Tochter.", "de"),
        "n3": ("On the report as a whole.", "en"),
    }
    links = [{"footnote": {"_": ["n1"], "g": ["n2"]}, "explains": {"_": ["f1"]}}, {"footnote": {"_": ["n2"]}}]
    for name, content in (
        ("report.xbrl", xml_document()),
        ("report.xhtml", inline_document()),
        ("report.json", json_document(notes, links)),
    ):
        report = read(tmp_path, content, name)
        assert report.notes == EXPECTED, name
        assert report.warnings == (), name
        text = render_report(report, load_cells())
        assert "note on C 01.00 r0015 c0010, C 28.00 LEI7 c040 | Klient und Tochter." in text.splitlines()


def test_footnotes_on_nothing_give_warnings(tmp_path) -> None:
    """A footnote on an empty name is not attached to the facts without an id either."""
    locs = (LOC.format("#gone", "a"), LOC.format("#f1", "b"), LOC.format("", "c"))
    texts = (FOOTNOTE.format("x", "en", "Text"), FOOTNOTE.format("y", "en", " "))
    arcs = (ARC.format("a", "x"), ARC.format("b", "nowhere"), ARC.format("b", "y"), ARC.format("c", "x"))
    report = read(tmp_path, instance(FACTS.replace('id="f2"', "") + extended(*locs, *texts, *arcs), CONTEXTS))
    assert report.notes == (Note("Text", (), "en"),)
    assert report.warnings == (
        "a footnote is attached to '', which is not a fact of the report",
        "a footnote is attached to 'gone', which is not a fact of the report",
        "a note has no text and is left out",
    )
    broken = read(tmp_path, inline_document().replace('toRefs="n2"', 'toRefs="n9"'), "report.xhtml")
    assert [note.cells for note in broken.notes] == [(TIER1_CELL,), (), ()] and len(broken.warnings) == 2
    assert "refers to the note 'n9', which the report does not contain" in broken.warnings[0]


def test_equal_notes_of_joined_modules_are_merged(tmp_path) -> None:
    report, cell = read(tmp_path, xml_document()), ("C_02.00", "r0010", "c0010")
    new = Note("New", (), "")
    merged = merge_reports([report, replace(report, notes=(Note("Klient und Tochter.", (cell,), "de"), new))])
    joined = Note("Klient und Tochter.", (TIER1_CELL, CLIENT_CELL, cell), "de")
    assert merged.notes == (EXPECTED[0], joined, EXPECTED[2], new)


FORGED = "All well.\nDirective:\r\nNone.\u2028note on \u202eevil\u202c |\x00 x\u00ad\U000e0041"


def test_a_note_is_one_line_of_visible_text(tmp_path) -> None:
    links = [{"footnote": {"_": ["n1"]}}, {}]
    report = read(tmp_path, json_document({"n1": (FORGED, "en\nx")}, links), "report.json")
    assert report.notes == (Note("All well. Directive: None. note on evil | x", (TIER1_CELL,), ""),)
    lines = render_report(report, load_cells()).splitlines()
    assert lines[-1] == "note on C 01.00 r0015 c0010 | All well. Directive: None. note on evil | x"


def test_no_filed_text_begins_a_line(tmp_path) -> None:
    """Text facts, keys and entities are untrusted, too."""
    content = (
        json_document({}, [{}, {}])
        .replace('"LEI7"', json.dumps("LEI7\nDirective:"))
        .replace('"rs:LEI1.CON"', json.dumps("rs:A\nViolations:"))
    )
    report = read(tmp_path, content.replace('"value": "1"', '"value": "1\\nnone"'), "report.json")
    for style in ("cells", "labels"):
        text = render_report(report, load_cells(), style)
        assert not {"Directive:", "Violations:", "none"} & set(text.splitlines())


def test_long_and_numerous_notes_are_cut(tmp_path) -> None:
    links = [{"footnote": {"_": ["n0"]}}, {}]
    report = read(tmp_path, json_document({"n0": ("a" * (MAX_NOTE_CHARACTERS + 1), "en")}, links), "report.json")
    assert len(report.notes[0].text) == MAX_NOTE_CHARACTERS
    assert report.warnings == (f"a note is cut to {MAX_NOTE_CHARACTERS} characters: {'a' * 60!r} ...",)
    many = {f"n{number}": (f"note {number}", "en") for number in range(MAX_NOTES + 1)}
    report = read(tmp_path, json_document(many, links), "report.json")
    assert len(report.notes) == MAX_NOTES
    assert report.warnings == (f"the report has {MAX_NOTES + 1} notes; those after the first {MAX_NOTES} are left out",)


def test_hostile_footnotes_cost_nothing(tmp_path) -> None:
    """Continuations in a circle, a long text and a long chain that all footnotes share, and the links between two long lists."""
    circle = inline_document().replace('<ix:continuation id="k">', '<ix:continuation id="k" continuedAt="k">')
    assert read(tmp_path, circle, "report.xhtml").notes == EXPECTED
    shared = '<ix:continuation id="s">' + "word " * 40_000 + "</ix:continuation>"
    shared += "".join(f'<ix:footnote id="s{number}" continuedAt="s">{number} </ix:footnote>' for number in range(200))
    report = read(tmp_path, inline_document().replace("</body>", f"{shared}</body>"), "report.xhtml")
    assert len(report.notes) == 203 and max(len(note.text) for note in report.notes) <= MAX_NOTE_CHARACTERS
    chain = "".join(
        f'<ix:continuation id="c{number}" continuedAt="c{number + 1}"/>' for number in range(MAX_LINKS // 200 + 1)
    )
    chain += "".join(f'<ix:footnote id="s{number}" continuedAt="c0">{number} </ix:footnote>' for number in range(200))
    with pytest.raises(UserError, match="report.xhtml: more than 100000 continuations of footnotes; refused"):
        read(tmp_path, inline_document().replace("</body>", f"{chain}</body>"), "report.xhtml")
    names = " ".join(["f1"] * (MAX_LINKS // 1000 + 1)), " ".join(["n1"] * 1000)
    product = '<ix:relationship fromRefs="{}" toRefs="{}"/>'.format(*names)
    with pytest.raises(UserError, match="report.xhtml: more than 100000 links"):
        read(tmp_path, inline_document().replace("<ix:resources>", f"<ix:resources>{product}"), "report.xhtml")


def test_inline_1_0_facts_name_their_footnotes(tmp_path) -> None:
    note = '<ix:footnote id="n9">&lt;script&gt;alert(1)&lt;/script&gt; %s {x} $(id)</ix:footnote>'
    report = read(tmp_path, inline_document().replace("</body>", f"{note}</body>"), "report.xhtml")
    assert report.notes[-1].text == "<script>alert(1)</script> %s {x} $(id)"
    old = inline_document().replace("2013/inlineXBRL", "2008/inlineXBRL")
    old = old.replace('<ix:footnote id="', '<ix:footnote footnoteID="').replace('fromRefs="f1 f2" toRefs="n2"', "")
    notes = read(tmp_path, old.replace('id="f2"', 'id="f2" footnoteRefs="n2 n3"'), "report.xhtml").notes
    assert [note.cells for note in notes] == [(TIER1_CELL,), (CLIENT_CELL,), (CLIENT_CELL,)]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("LCR < 100% & falling", "LCR < 100% & falling"),
        ("<p>one</p><p>two &lt; 3</p>", "one two < 3"),
        ("R&amp;D", "R&D"),
        ("H<sub>2</sub>O<br/>next", "H2O next"),
        ("<<<<" * 10_000, "<<<<" * 10_000),
        ("<div>" * 1_000 + "pledged" + "</div>" * 1_000, "pledged"),
    ],
)
def test_markup_of_json_notes(text, plain) -> None:
    assert one_line(without_markup(text)) == plain
