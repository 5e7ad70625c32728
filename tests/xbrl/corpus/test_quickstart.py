"""The quickstart's corpus: what is planted is what the files and findings.csv give back, and nothing leaks into the test."""

import json
import re
from itertools import pairwise

import pytest

from xbrl.corpus.generate import Request
from xbrl.corpus.quickstart_corpus import generate_quickstart
from xbrl.corpus.quickstart_notes import KINDS

REQUEST = Request(150, 3, "quickstart", [0.4, 0.2, 0.4])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(the corpus directory, split -> examples)."""
    directory = tmp_path_factory.mktemp("quickstart") / "corpus"
    generate_quickstart(directory, REQUEST)
    splits = {
        name: [json.loads(line) for line in (directory / f"{name}.jsonl").open()]
        for name in ("train", "validation", "test")
    }
    return directory, splits


def texts(example) -> tuple[str, str]:
    return example["messages"][1]["content"], example["messages"][2]["content"]


def meaning(note: str):
    """(kind of a note, whether it has the first wording of a pair)."""
    ((number, applies),) = {
        (number, place == 0)
        for number, kind in enumerate(KINDS)
        for pairs in kind.pairs.values()
        for pair in pairs
        for place in (0, 1)
        # the longer wording of a pair may contain the shorter one
        if pair[place].lower() in note.lower()
        and not (pair[place] in pair[1 - place] and pair[1 - place].lower() in note.lower())
    }
    return KINDS[number], applies


def violated_by_hand(report: str) -> set[str]:
    """The violations, from the printed report and the lists of wordings alone."""
    figures = dict(re.findall(r"^(LCR|Leverage ratio) ([\d.]+)%$", report, re.MULTILINE))
    note = report.partition("Note: ")[2]
    kind, applies = meaning(note)
    found = {"LR_MIN"} if float(figures["Leverage ratio"]) < 3 else set()
    if float(figures["LCR"]) < 100 and not (kind.name == "waiver" and applies):
        found.add("LCR_MIN")
    percent = [float(number) for number in re.findall(r"([\d.]+)%", note)]
    if kind.name == "pledged" and applies and percent[0] < 100:
        found.add("LCR_PLEDGED")
    if kind.name == "connected" and applies and percent[0] > 25:
        found.add("LE_CONNECTED")
    return found


def test_labels_follow_from_the_words_and_the_figures(corpus) -> None:
    examples = [example for members in corpus[1].values() for example in members]
    assert len(examples) == 150
    for example in examples:
        report, answer = texts(example)
        assert set(example["violations"]) == violated_by_hand(report), report
        lines = answer.partition("\nDirective:\n")[0].splitlines()
        assert lines[0] == "Checks:" and [line.split(" ")[0] for line in lines[1:3]] == ["Leverage", "LCR"]
        named = set(re.findall(r": ([A-Z_]+), ", answer)) - set(re.findall(r": lifts (\w+),", answer))
        assert named == set(example["violations"])
    rules = {rule for example in examples for rule in example["violations"]}
    assert rules == {"LR_MIN", "LCR_MIN", "LCR_PLEDGED", "LE_CONNECTED"}
    assert any(set(e["engine"]) - set(e["violations"]) for e in examples)  # lifted by a waiver
    assert any(set(e["violations"]) - set(e["engine"]) for e in examples)  # shown by a note alone


def test_answers_repeat_the_note_and_compare_as_it_is(corpus) -> None:
    deadlines = {"LR_MIN": 30, "LCR_MIN": 10, "LCR_PLEDGED": 10, "LE_CONNECTED": 30}
    for example in [example for members in corpus[1].values() for example in members]:
        report, answer = texts(example)
        checks = answer.partition("\nDirective:\n")[0].splitlines()[1:]
        words = report.partition("Note: ")[2].partition(";")[0].rstrip(".")
        kind, applies = meaning(report.partition("Note: ")[2])
        said = re.split(r": | \d", checks[2].removeprefix(f"{words}, so "))[0]
        assert said == (kind.subject if applies else kind.other_subject)
        for line in checks:
            for value, sign, limit in re.findall(r"([\d.]+)% (<|>|<=|>=) ([\d.]+)%", line):
                one, other = float(value), float(limit)
                assert {"<": one < other, ">": one > other, "<=": one <= other, ">=": one >= other}[sign], line
                assert (sign in "<>") == (": met" not in line)
        assert [measure["deadline_days"] for measure in example["measures"]] == [
            deadlines[rule] for rule in example["violations"]
        ]


def test_a_test_has_other_banks_and_other_wordings(corpus) -> None:
    splits = corpus[1]
    banks = {name: {example["bank"] for example in members} for name, members in splits.items()}
    assert not banks["train"] & banks["test"] and not banks["train"] & banks["validation"]
    for kind in KINDS:
        wordings = {name: {wording for pair in pairs for wording in pair} for name, pairs in kind.pairs.items()}
        assert len(wordings["train"]) >= 40 and len(wordings["test"]) == 16 and len(wordings["validation"]) == 8
        for one, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
            assert not wordings[one] & wordings[other]
    for name, members in splits.items():
        seen = " ".join(texts(example)[0].lower() for example in members)
        for kind in KINDS:
            for other, pairs in kind.pairs.items():
                used = [pair for pair in pairs if any(wording.lower() in seen for wording in pair)]
                assert len(used) == len(pairs) if name == other == "test" else bool(used) == (name == other)


def test_negations_alone_do_not_decide() -> None:
    """In training, words of negation stand in the first wording of many pairs and in the second of others."""
    negation = re.compile(r"\b(not|no|none|never|cannot|nobody|nothing|without)\b")
    for kind in KINDS:
        sides = [sum(bool(negation.search(pair[side])) for pair in kind.pairs["train"]) for side in (0, 1)]
        assert min(sides) >= 6, (kind.name, sides)


def test_pairs_differ_in_one_place_and_in_their_violations(corpus) -> None:
    test = corpus[1]["test"]
    assert len(test) == 60 and len({example["id"] for example in test}) == 60
    kinds = set()
    for one, other in [pair for pair in pairwise(test) if pair[0]["pair"] == pair[1]["pair"]]:
        assert set(one["violations"]) != set(other["violations"]) and one["bank"] == other["bank"]
        lines = [texts(example)[0].splitlines() for example in (one, other)]
        changed = [(a, b) for a, b in zip(*lines, strict=True) if a != b and not a.startswith("Client ")]
        assert len(changed) == 1
        without_digits = {re.sub(r"\d+(\.\d+)?", "#", line) for line in changed[0]}
        assert len(without_digits) == (2 if one["pair"].endswith("in words") else 1)
        kinds.add((one["kind"], one["pair"].partition(" ")[2]))
    assert kinds == {(kind.name, part) for kind in KINDS for part in ("in words", "in figures")}


def test_the_same_request_gives_the_same_bytes(corpus, tmp_path) -> None:
    generate_quickstart(tmp_path / "again", REQUEST)
    files = sorted(path.relative_to(corpus[0]) for path in corpus[0].rglob("*") if path.is_file())
    assert len(files) > 300
    for path in files:
        assert (tmp_path / "again" / path).read_bytes() == (corpus[0] / path).read_bytes()
