"""The profile `laptop`: figures and notes that decide together, checks, short letters."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from xbrl.corpus.corpus import make_filings, twin_of
from xbrl.corpus.note_phrases import FAMILIES
from xbrl.corpus.notes import PHRASES, wording
from xbrl.corpus.profiles import LAPTOP

ROOT = Path(__file__).resolve().parents[3]
FILINGS = [make_filings(3, index, 1, LAPTOP)[0] for index in range(600)]


def share(filing, name):
    return filing.figures["C_28.00", name, "c350"]


def test_each_note_decides_or_not_by_its_words_or_by_the_figures():
    counts = Counter()
    for filing in FILINGS:
        if filing.note is None:
            continue
        note, (finding,) = filing.note, filing.note.findings
        fields = dict(note.fields)
        if note.kind == "pledged":
            ratio = filing.figures["C_76.00.a", "r0030", "c0010"]
            amount = round(float(fields["amount"].partition("%")[0]) * 10)
            free = int(ratio * 1000) - amount
            breaks = free < 1000
            assert ratio >= 1 and amount > 0
            assert finding.value is None or int(finding.value * 1000) == free
        elif note.kind == "connected":
            one, two = (fields[name].removeprefix("client ") for name in ("one", "two"))
            total = share(filing, one) + share(filing, two)
            breaks = total > finding.limit if finding.limit else total * 4 > 1
            assert max(share(filing, one), share(filing, two)) * 4 <= 1
            assert finding.value in (None, total)
        else:
            breaks = True
            assert finding.rule in ("LCR_MIN", "NSFR_MIN")
        assert (finding.rule in filing.violated) == (
            finding.state == ("benign" if note.kind == "waiver" else "violated")
        )
        if finding.state == "violated":
            assert note.holds and breaks
        if finding.state == "benign" and note.kind != "waiver" and note.holds:
            assert not breaks
        counts[note.kind, finding.state != "benign", note.holds, breaks] += 1
    for kind in ("pledged", "connected"):
        total = sum(number for key, number in counts.items() if key[0] == kind)
        assert 0.28 < counts[kind, True, True, True] / total < 0.48
        assert counts[kind, False, True, False] > 20  # the figures say no
        assert counts[kind, False, False, True] > 20 and counts[kind, False, False, False] > 10  # the words say no
    assert counts["waiver", True, True, True] > 40 and counts["waiver", False, True, True] > 20


def test_the_opposite_note_flips_what_follows_where_the_figures_allow_it():
    flips = Counter()
    for filing in FILINGS:
        if filing.note is None:
            continue
        (before,) = filing.note.findings
        twin = twin_of(filing)
        if twin is None:
            assert before.state == "benign"
            flips[filing.note.kind, None] += 1
            continue
        (after,) = twin.note.findings
        assert twin.figures == filing.figures and twin.note.holds != filing.note.holds
        assert (before.state == "benign") != (after.state == "benign")
        assert after.entity == twin.bank.entity != filing.bank.entity and twin.bank.name == filing.bank.name
        assert twin.violated ^ filing.violated == {before.rule}
        if after.state == "violated":
            assert (after.value > after.limit) == (filing.note.kind == "connected")
            assert (after.value < after.limit) == (filing.note.kind == "pledged")
        flips[filing.note.kind, after.state] += 1
    for kind in ("pledged", "connected", "waiver"):
        assert flips[kind, "benign"] > 20 and flips[kind, "lifted" if kind == "waiver" else "violated"] > 10
        assert flips[kind, None] > 20


@pytest.mark.parametrize("kind", PHRASES)
def test_wordings_of_a_kind_are_different_and_fill_all_families(kind):
    for side in ("holds", "fails"):
        assert len(set(PHRASES[kind][side])) == len(PHRASES[kind][side]) == 22
        placeholders = {frozenset(re.findall(r"{(\w+)}", text)) for text in PHRASES[kind][side]}
        assert len(placeholders) == 1
    assert not set(PHRASES[kind]["holds"]) & set(PHRASES[kind]["fails"])


def test_families_are_disjoint():
    tests = [FAMILIES[f"test_{name}"] for name in ("banks", "quarters", "combinations")]
    parts = [FAMILIES["train"], FAMILIES["validation"], *tests]
    assert sorted(place for part in parts for place in part) == list(range(22))
    assert sorted(place for part in tests for place in part) == list(FAMILIES["test"])
    assert len(FAMILIES["train"]) >= 8 and min(map(len, tests)) >= 4


def test_a_sentence_starts_with_a_capital_letter():
    notes = [filing.note for filing in FILINGS if filing.note]
    assert all(not wording(note, place)[0].islower() for note in notes[:60] for place in range(22))


def make_corpus(out):
    command = [sys.executable, "scripts/make_reports.py", "--profile", "laptop", "--examples", "160"]
    done = subprocess.run(
        [*command, "--processes", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_corpus_is_reproducible_and_its_answers_follow_from_the_report(tmp_path):
    make_corpus(tmp_path / "a"), make_corpus(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert {"findings.csv", "register.csv", "dataset.json", "train.jsonl"} <= {str(file) for file in files}
    card = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert set(card["leak_test"]["test"].values()) == {0}
    kinds, pairs = Counter(), {}
    for split in ("train", "validation", "test"):
        for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines():
            example = json.loads(line)
            report, answer = (message["content"] for message in example["messages"][-2:])
            checks, _, letter = answer.removeprefix("Checks:\n").partition("\nDirective:\n")
            printed = re.findall(
                r"^((?:CET1|Tier 1|Total capital|Leverage) ratio|LCR|NSFR) [\d.]+%$", report, re.MULTILINE
            )
            assert printed == [name for name in printed if f"\n{name} " in f"\n{checks}"]  # also a ratio at its limit
            for check in checks.splitlines():
                compared = re.search(r"([\d.]+)% ([<>]=?) ([\d.]+)%: (.*)", check)
                if compared:
                    value, sign, limit, verdict = compared.groups()
                    true = {"<": float(value) < float(limit), ">": float(value) > float(limit)}.get(
                        sign, float(value) >= float(limit) if sign == ">=" else float(value) <= float(limit)
                    )
                    assert true and (verdict == "met") == ("=" in sign), check
                    assert "=" in check.split(sign)[0] or f"{value}%" in report
            stated = re.findall(r": ([A-Z0-9_]+), ", checks)
            lifted = re.findall(r": lifts ([A-Z0-9_]+), ", checks)
            assert [rule for rule in stated if rule not in lifted] == example["violations"]
            assert {finding["rule"] for finding in example["findings"]} == set(example["violations"])
            assert bool(example["measures"]) == bool(example["violations"])
            subjects = {measure["subject"] for measure in example["measures"]}
            is_daily = any(
                word in letter for word in ("daily", "each day", "every day", "every business day", "evening")
            )
            assert is_daily == bool(subjects & {"liquidity", "funding"}), letter  # CRR Art. 414
            assert ("references" in example) == (split == "test")
            if split == "test":
                assert len(set(example["references"])) == 8 and letter == example["references"][0]
            assert ("Note: " in report) == bool(example["kind"])
            kinds[example["kind"]] += 1
            if "pair" in example:
                assert split == "test"
                pairs.setdefault(example["pair"], []).append(example)
    assert set(kinds) == {"", "pledged", "connected", "waiver"}
    assert len(pairs) >= 4
    for one, two in pairs.values():
        texts = [example["messages"][1]["content"].splitlines() for example in (one, two)]
        different = [lines for lines in zip(*texts, strict=True) if lines[0] != lines[1]]
        assert len(different) == 1 and different[0][0].startswith("Note: ")
        assert len(set(one["violations"]) ^ set(two["violations"])) == 1
        assert one["engine"] == two["engine"]
