"""Hostile and malformed files are rejected with one sentence. Nothing is fetched, expanded or repaired."""

import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from xbrl.read import xbrl
from xbrl.read.dpm import load_cells
from xbrl.read.xbrl import read_report

pytest.importorskip("lxml")

BODY = """<xbrli:xbrl xmlns:xbrli="http://www.xbrl.org/2003/instance" xmlns:t="http://example.org/t"><xbrli:context id="c">
<xbrli:entity><xbrli:identifier scheme="s">E</xbrli:identifier></xbrli:entity><xbrli:period><xbrli:instant>2026-03-31
</xbrli:instant></xbrli:period></xbrli:context><t:A contextRef="c">{}</t:A></xbrli:xbrl>"""
LAUGHS = "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 9))


def rejection(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_report(file, load_cells())
    sentence = str(caught.value)
    assert str(file) in sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"<!DOCTYPE x [<!ENTITY v 'harmless'>]>{BODY.format('&v;')}", "declares entities"),
        (f"<!DOCTYPE x [<!ENTITY v 'unused'>]>{BODY.format('')}", "declares entities"),
        (f"<!DOCTYPE x [<!ENTITY v SYSTEM 'file:///etc/hostname'>]>{BODY.format('&v;')}", "declares entities"),
        (f"<!DOCTYPE x [<!ENTITY % p SYSTEM 'http://127.0.0.1:1/x.dtd'> %p;]>{BODY.format('')}", "declares entities"),
        (f"<!DOCTYPE x [<!ENTITY l0 'lol'>{LAUGHS}]>{BODY.format('&l8;')}", "ntit"),
        (f"<!DOCTYPE x SYSTEM 'http://127.0.0.1:1/x.dtd'>{BODY.format('&nbsp;')}", "uses an entity"),
        (BODY.format("&nbsp;"), "not well-formed"),
        (BODY.format("x")[:-20], "not well-formed"),
        (BODY.format("<u:B/>"), "not well-formed"),
        ("<?xml version='1.0' encoding='UTF-8'?>" + BODY.format("x"), "not well-formed"),
        (BODY.format("x" * 10_000_001), "not well-formed"),
        ("", "is empty"),
        ("%PDF-1.7", "not well-formed"),
        ("<html><body>no tags here</body></html>", "neither an XBRL instance nor inline XBRL"),
    ],
)
def test_hostile_and_malformed_xml(tmp_path, content, reason):
    file = tmp_path / "report.xbrl"
    data = content.encode("latin-1" if content.startswith("<?xml") else "utf-8")
    if content.startswith("<?xml"):
        data = data.replace(b">x<", b">\xa9<")  # invalid UTF-8 in a file that declares UTF-8
    file.write_bytes(data)
    assert reason in rejection(file)


def test_files_that_are_not_reports(tmp_path, monkeypatch):
    assert "No such file" in rejection(tmp_path / "absent.xbrl")
    (tmp_path / "c_01.00.csv").write_text("datapoint,factValue\n")
    assert "pass its package" in rejection(tmp_path / "c_01.00.csv")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and nothing more")
    assert "not a readable zip" in rejection(tmp_path / "broken.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "contains no XBRL report" in rejection(tmp_path / "other.zip")
    pytest.importorskip("arelle")
    (tmp_path / "report.xbrl").write_text("<xbrl xmlns='http://www.xbrl.org/2003/instance'/>")
    assert "contains no facts" in rejection(tmp_path / "report.xbrl")
    monkeypatch.setattr(xbrl, "MAX_MEMBER_BYTES", 100)
    (tmp_path / "report.xbrl").write_text(BODY.format("x"))
    assert "over the limit of 100" in rejection(tmp_path / "report.xbrl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_json_in_utf16_is_named(tmp_path, encoding):
    (tmp_path / "report.json").write_bytes(' \n{"documentInfo": {}}'.encode(encoding))
    assert "this JSON is in UTF-16, but JSON must be in UTF-8" in rejection(tmp_path / "report.json")


def test_hostile_packages(tmp_path):
    path = tmp_path / "bank.zip"
    declared = f"<!DOCTYPE x [<!ENTITY v SYSTEM 'file:///etc/hostname'>]>{BODY.format('&v;')}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bank/reports/bank.xhtml", declared)
    assert "bank.zip: bank/reports/bank.xhtml: the file declares entities" in rejection(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bank/reports/report.json", "{}")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # set the encryption flag in the central directory
    path.write_bytes(content)
    assert "encrypted" in rejection(path)
    link = zipfile.ZipInfo("bank/reports/report.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/hostname")
    assert "outside the package" in rejection(path)
