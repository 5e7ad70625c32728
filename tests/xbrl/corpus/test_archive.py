"""A supervisor's archive: match letters to reports, list files without a match, and make examples from the pairs."""

import json
import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from tests.processes import run_python
from xbrl.answers.profiles import FULL
from xbrl.corpus.archive import find_letters, make_archive_corpus, match_letters, read_pairs, read_reports, split_banks
from xbrl.corpus.filing import write_reports
from xbrl.corpus.population import make_filings
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import is_named_after
from xbrl.read.folder import find_reports
from xbrl.read.register import write_register

A, B = "SYNB00AAAAAAAAAAAA11", "SYNB00BBBBBBBBBBBB22"
CASES = [(A, "2026-03-31"), (A, "2026-06-30"), (B, "2026-03-31")]
NAMES = {A: "Nordhaven Bank", B: "Nordhaven Bank of Commerce"}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (f"{A}_2026-03-31.txt", "x", 0),
        (f"{A.lower()} 20260630.txt", "x", 1),
        ("scan17.txt", f"To {A}\nReport of 31 March 2026", 0),
        ("scan17.txt", f"An {A}\nMeldung zum 31. März 2026", 0),
        ("scan17.txt", f"To {A}\nReference date 30.06.2026, our letter of 1 August 2026", 1),
        ("scan17.txt", f"To {A}\nReport for Q2 2026", 1),
        ("nordhaven-bank_2026Q1.txt", "x", 0),
        ("scan17.txt", "The Board of Nordhaven Bank of Commerce\nJune 30, 2026 we received that of March 31, 2026", 2),
        ("scan17.txt", "Dear Sirs", "mentions none of the banks"),
        (f"{A}.txt", "Dear Sirs", "no reference date"),
        (f"{A}_2025-12-31.txt", "x", "no reference date"),
        (f"{A}.txt", "of 31 March 2026 and 30 June 2026", "several reference dates"),
        (f"{A}_{B}_2026-03-31.txt", "x", "mentions none of the banks"),
    ],
)
def test_letter_matches_its_report_or_gives_the_reason(name, text, expected):
    matched, rejected = match_letters({Path(name): text}, CASES, NAMES)
    if isinstance(expected, int):
        assert rejected == [] and list(matched) == [CASES[expected]]
    else:
        assert matched == {} and len(rejected) == 1 and expected in rejected[0]
    again = match_letters({Path(f"{A}_2026-03-31.txt"): "x", Path(f"again_{A}_2026-03-31.txt"): "x"}, CASES, NAMES)[1]
    assert len(again) == 1 and "already the letter for the same" in again[0]


@pytest.mark.parametrize(
    ("name", "entity", "matches"),
    [
        (f"{A}.CON_DE_COREP040200_COREPLR_2026-03-31_1.zip", f"{A}.CON", True),
        (f"{A}.CON_DE_COREP040200_COREPLR_2026-03-31_1.zip", A, True),
        (f"{A}.CON_DE_COREP040200_COREPLR_2026-03-31_1.zip", f"{A}.IND", False),
        (f"{A}_2026-03-31.zip", f"{A}.IND", True),
        (f"{A}7.CON_2026-03-31.zip", f"{A}.CON", False),
        (f"{A}.CON_2026-06-30.zip", f"{A}.CON", False),
    ],
)
def test_file_name_tells_bank_and_date(name, entity, matches):
    assert is_named_after(Path("in", name), entity, "2026-03-31") is matches


def test_only_nonempty_text_files_are_letters(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffTo the board\r\nDo it.\r\n".encode())
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    (tmp_path / "c.md").write_bytes("é".encode("latin-1"))
    (tmp_path / "d.txt").write_text("  \n")
    letters, rejected = find_letters(tmp_path)
    assert list(letters.values()) == ["To the board\nDo it."]
    assert [line.rpartition(": ")[2][:10] for line in rejected] == ["not a text", "not valid ", "the letter"]


def test_banks_are_split_at_random_and_once():
    banks = [f"B{number}" for number in range(20)]
    split = split_banks(banks, (0.8, 0.1, 0.1), seed=4)
    assert [list(split.values()).count(name) for name in ("train", "validation", "test")] == [16, 2, 2]
    assert split == split_banks(banks, (0.8, 0.1, 0.1), seed=4) != split_banks(banks, (0.8, 0.1, 0.1), seed=5)
    for count, shares, message in (
        (20, (0.8, 0.1, 0.2), "add up to 1"),
        (2, (0.8, 0.1, 0.1), "too few"),
        (20, (float("nan"), 0, 1), "none negative"),
    ):
        with pytest.raises(UserError, match=message):
            split_banks(banks[:count], shares, seed=4)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """8 banks with 2 reports each in both syntaxes, letters for all reports but the first, and some unrelated files."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "reports" / "old").mkdir(parents=True)
    (folder / "letters").mkdir()
    cells = load_cells()
    filings = [filing for index in range(8) for filing in make_filings(8, index, 2, FULL)]
    for number, filing in enumerate(filings):
        place = folder / "reports" / ("old" if number % 4 == 0 else "")
        write_reports(place, filing.bank, filing.period, filing.figures, cells, (), ("csv", "json")[number // 2 % 2])
        text = f"To {filing.bank.name}\nReport of {filing.period}\nNo {number % 7} of our letters orders word {'ab' * number}."
        if number:
            (folder / "letters" / f"letter {number}.txt").write_text(text)
    (folder / "reports" / "broken.json").write_text("{")
    (folder / "reports" / "old" / "list.xlsx").write_text("")
    (folder / "letters" / "notes.txt").write_text("About no bank.")
    write_register(folder / "register.csv", [filing.bank.addressee for filing in filings[::2]])
    return folder, filings


def make(folder, out, **more) -> list[dict]:
    """Make the examples of the archive in this process, all of them for training."""
    places = {"reports": folder / "reports", "letters": folder / "letters", "register": folder / "register.csv"}
    make_archive_corpus({**places, "pairs": None, "findings": None, **more}, out, (1, 0, 0), 0, 1, {})
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def test_an_archive_becomes_examples(archive, tmp_path):
    (folder, filings), out = archive, tmp_path / "out"
    places = ("--reports", folder / "reports", "--letters", folder / "letters", "--register", folder / "register.csv")
    command = ("xbrl/scripts/regulator.py", "examples", *places, "--out", out, "--processes", "1")
    done = run_python(*command, "--splits", "0.6", "0.2", "0.2")
    assert done.returncode == 0, done.stderr
    examples = {
        row["id"]: row for path in out.glob("*.jsonl") for row in map(json.loads, path.read_text().splitlines())
    }
    assert set(examples) == {f"{filing.bank.entity}-{filing.period}" for filing in filings[1:]}
    for number, filing in enumerate(filings[1:], start=1):
        question, answer = (
            message["content"] for message in examples[f"{filing.bank.entity}-{filing.period}"]["messages"]
        )
        assert answer.endswith(f"word {'ab' * number}.")
        assert ("Earlier reports" in question) == (number % 2 == 1)
    unmatched = (out / "unmatched.txt").read_text().splitlines()
    no_letter = f"{filings[0].bank.entity} {filings[0].period}: no letter"
    for line, part in zip(unmatched, ("list.xlsx", "broken.json", "notes.txt", no_letter), strict=True):
        assert part in line and line in done.stderr
    card = json.loads((out / "dataset.json").read_text())
    assert sum(counts["examples"] for counts in card["splits"].values()) == 15
    assert run_python(*command).returncode == 2


def test_findings_change_labels_and_contradicting_letters_are_listed(archive, tmp_path, capsys):
    folder, filings = archive
    before = {example["id"]: example["violations"] for example in make(folder, tmp_path / "plain")}
    breached, sound = (next(id for id in before if bool(before[id]) is violated) for violated in (True, False))
    lifted, unread = before[breached][0], filings[0].bank.entity
    scope = next(filing.bank.scope for filing in filings if filing.bank.entity == breached[:20])
    lines = [
        f"{breached[:20]}.{scope},{breached[21:]},{lifted},lifted,,,,CRR Art. 8,waiver,{16 * '0'}",
        f"{sound[:20]},{sound[21:]},LCR_PLEDGED,violated,C 76.00.a r0030 c0010,0.95,1,,pledged,{16 * '0'}",
        f"{sound[:20]},{sound[21:]},LR_MIN,lifted,,,,,,",
        f"{unread},{filings[0].period},LCR_MIN,lifted,,,,,,",
        f"{sound[:20]}.SUB,{sound[21:]},LCR_PLEDGED,lifted,,,,CRR Art. 8,waiver,{16 * '0'}",
    ]
    table = tmp_path / "findings.csv"
    table.write_text("entity,period,rule,state,cell,value,limit,legal,kind,note\n" + "\n".join(lines) + "\n")
    capsys.readouterr()
    examples = {example["id"]: example for example in make(folder, tmp_path / "out", findings=table)}
    printed = capsys.readouterr().err
    after = {name: example["violations"] for name, example in examples.items()}
    changed = {breached: [rule for rule in before[breached] if rule != lifted], sound: ["LCR_PLEDGED"]}
    assert {name: rules for name, rules in after.items() if rules != before[name]} == changed
    assert "LCR_PLEDGED | C 76.00.a r0030 c0010 | 95" in examples[sound]["messages"][-1]["content"]
    unmatched = [line for line in (tmp_path / "out" / "unmatched.txt").read_text().splitlines() if "findings" in line]
    assert unmatched == [
        f"findings that change nothing: {table}, line 5: no report of {unread} {filings[0].period} has a letter",
        f"findings that change nothing: {table}, line 6: no report of {sound[:20]}.SUB {sound[21:]} has a letter",
        f"findings that change nothing: {table}, line 4: LR_MIN is lifted, but the rules do not find it in the report",
    ]
    disagreements = (tmp_path / "out" / "disagreements.txt").read_text().splitlines()
    (missing,) = [line for line in disagreements if "LCR_PLEDGED" in line and "does not object to" in line]
    assert missing.startswith(f"{sound[:20]} {sound[21:]}: {folder / 'letters'}")
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["disagreements"] == len(disagreements) > 1
    assert all(f"letter and labels disagree: {line}" in printed for line in disagreements)


def test_mistake_in_findings_ends_in_one_sentence(archive, tmp_path):
    (tmp_path / "findings.csv").write_text("entity,period,rule,state\nX,2026-03-31,LCR,violated\n")
    with pytest.raises(UserError, match=r"findings.csv, line 2, column rule: 'LCR' is not a rule"):
        make(archive[0], tmp_path / "out", findings=tmp_path / "findings.csv")
    assert not (tmp_path / "out").exists()


def test_pairs_file_matches_letters_that_name_no_report(archive, tmp_path):
    folder, _ = archive
    first_of = {}
    for path in find_reports(folder / "reports")[0]:
        if path.name != "broken.json":
            first_of.setdefault(path.name[:20] + path.name.split("_")[-2], path.relative_to(folder / "reports"))
    lines = [f"{path},letter {number}.txt" for number, path in enumerate(list(first_of.values())[:6], start=1)]
    (tmp_path / "pairs.csv").write_text("\n".join(["report,letter", *lines, ""]))
    train = make(folder, tmp_path / "out", pairs=tmp_path / "pairs.csv")
    assert sorted(example["messages"][1]["content"].rpartition("word ")[2] for example in train) == [
        "ab" * number + "." for number in range(1, 7)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("report;letter\n", "line 1: the column 'report'"),
        ("report,letter\nÄ.zip,letter 1.txt\n", "is not valid UTF-8 at byte 14"),
        ("report,letter\nnone.zip,letter 1.txt\n", "line 2: .*none.zip does not exist"),
        ("report,letter\nbroken.json,letter 1.txt\nbroken.json,letter 2.txt\n", "line 3: .*second letter"),
    ],
)
def test_errors_in_a_pairs_file_name_the_line(archive, tmp_path, text, message):
    folder, _ = archive
    (tmp_path / "pairs.csv").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "pairs.csv", folder / "reports", folder / "letters")


def test_incomplete_report_and_second_scope_are_left_out(archive, tmp_path):
    """One report has a broken file. Another bank files its report in two scopes."""
    whole, _ = read_reports(archive[0] / "reports", 1)
    (broken, period), (twice, other_period), *_ = whole
    scope = whole[twice, other_period].entity.partition(".")[2]
    for path in whole[twice, other_period].files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
        solo = tmp_path / path.name.replace(f".{scope}", ".SUB")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as source, zipfile.ZipFile(solo, "w") as target:
                for name in source.namelist():
                    target.writestr(name, source.read(name).replace(f".{scope}".encode(), b".SUB"))
        else:
            solo.write_bytes(path.read_bytes().replace(f".{scope}".encode(), b".SUB"))
    for path in whole[broken, period].files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / path.name).write_text("{")
    reports, lines = read_reports(tmp_path, 1)
    assert list(reports) == [(twice, other_period)] and reports[twice, other_period].entity == f"{twice}.{scope}"
    missing = f"{whole[broken, period].entity} {period}: figures are missing ({tmp_path / path.name}"
    assert any(missing in line for line in lines)
    assert any(f"its scope {twice}.SUB differs from {twice}.{scope}" in line for line in lines)
