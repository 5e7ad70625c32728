"""The quickstart's corpus: labels follow from notes and figures, and training has no phrase and no bank of the test."""

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from common.errors import UserError
from xbrl.answers.answer_reader import read_facts
from xbrl.answers.note_scores import score_notes
from xbrl.answers.scores import read_answer
from xbrl.corpus.generate import Request, generate_corpus, is_generated, split_counts
from xbrl.corpus.quickstart import KINDS, NOTES_FILE, decisive_words

REQUEST = Request(150, 3, "quickstart", [0.4, 0.2, 0.4])
NOTES = [json.loads(line) for line in NOTES_FILE.read_text(encoding="utf-8").splitlines()]
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The examples of each split."""
    directory = tmp_path_factory.mktemp("quickstart") / "corpus"
    generate_corpus(directory, REQUEST, 1)
    return {name: [json.loads(line) for line in (directory / f"{name}.jsonl").open()] for name in SPLITS}


def texts(example) -> tuple[str, str]:
    return example["messages"][1]["content"], example["messages"][2]["content"]


def note_in(report: str) -> dict:
    """Return the entry of notes/quickstart.jsonl that stands as a note in a printed report."""
    text = re.sub(r"\b[AB]\d\d\b", "CLIENT", re.sub(r"\d+(\.\d+)?%", "{figure}", report.partition("Note: ")[2]))
    (entry,) = [note for note in NOTES if note["text"].replace("{a}", "CLIENT").replace("{b}", "CLIENT") == text]
    return entry


def test_labels_agree_with_the_answers(corpus) -> None:
    """The independent judge reads this corpus in tests/xbrl/rules/test_law_check.py."""
    examples = [example for members in corpus.values() for example in members]
    assert len(examples) == 150
    for example in examples:
        answer = read_answer(texts(example)[1], example)  # the rules compute the violations from the facts
        assert answer and answer.void == 0 and answer.directive == ""
        assert set(answer.rule_ids) == set(example["violations"])
    rules = {rule for example in examples for rule in example["violations"]}
    assert rules == {"LR_MIN", "LCR_MIN", "PLEDGED_COUNTED", "LCR_PLEDGED", "LE_CONNECTED"}
    assert any("PLEDGED_COUNTED" in e["violations"] and "LCR_PLEDGED" not in e["violations"] for e in examples)
    assert any(set(e["engine"]) - set(e["violations"]) for e in examples)  # lifted by a waiver
    notes = score_notes(examples, [read_facts(texts(example)[1])[0] for example in examples])
    assert notes and notes["n"] == 150 and notes["f1"] == 1


def test_answers_quote_the_note_before_they_decide(corpus) -> None:
    for example in [example for members in corpus.values() for example in members]:
        report, answer = texts(example)
        (fact,), note = example["note_facts"], note_in(report)
        words = decisive_words(report.partition("Note: ")[2])
        assert (fact["kind"], fact["applies"], fact["quote"]) == (note["kind"], note["applies"], words)
        state = "applies" if fact["applies"] else "does not apply"
        assert answer == f'Note:\n"{words}" | {fact["kind"]} | {state} | - | {" and ".join(fact["who"]) or "-"} | -'
        assert len(fact["who"]) == (2 if fact["kind"] == "connected" else 0)


def test_notes_are_short_pairs_with_unseen_test_phrases() -> None:
    def runs(note: dict) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w{}]+", note["text"].lower())
        return set(zip(*(words[start:] for start in range(5)), strict=False))

    counts = Counter((note["kind"], note["split"], note["applies"]) for note in NOTES)
    for kind in KINDS:
        assert [counts[kind, split, True] for split in SPLITS] == [42, 6, 15]
        assert [counts[kind, split, False] for split in SPLITS] == [42, 6, 15]
    assert set(Counter((note["pair"], note["kind"], note["split"]) for note in NOTES).values()) == {2}
    known = {run for note in NOTES if note["split"] == "train" for run in runs(note)}
    for note in NOTES:
        assert len(note["text"].split()) <= 25
        places = {"pledged": {"figure"}, "connected": {"a", "b", "figure"}, "waiver": set()}[note["kind"]]
        assert set(re.findall(r"{(\w+)}", note["text"])) == places
        assert note["split"] == "train" or not runs(note) & known, note["text"]


def test_neither_negations_nor_single_words_decide() -> None:
    """Notes that apply contain negations as often as notes that do not. Many pairs have the same words in a different order."""
    negation = re.compile(r"\b(not|no|none|never|cannot|nobody|nothing|without|neither)\b")
    for kind in KINDS:
        trained = [note for note in NOTES if (note["kind"], note["split"]) == (kind, "train")]
        negated = Counter(note["applies"] for note in trained if negation.search(note["text"].lower()))
        sides = (negated[True], negated[False])
        assert min(sides) >= 10 and max(sides) - min(sides) <= 8, (kind, sides)
    bags = [(note["pair"], *sorted(re.findall(r"\w+", note["text"].lower()))) for note in NOTES]
    assert sum(count == 2 for count in Counter(bags).values()) >= 15


def test_splits_have_different_banks_and_use_notes_evenly(corpus) -> None:
    banks = {name: {example["bank"] for example in members} for name, members in corpus.items()}
    assert not banks["train"] & banks["test"] and not banks["train"] & banks["validation"]
    for name, members in corpus.items():
        used = Counter(example["note"] for example in members)
        assert {note_in(texts(example)[0])["split"] for example in members} == {name}
        assert max(used.values()) <= (2 if name == "validation" else 3)


def test_pairs_differ_in_one_place_and_violations(corpus) -> None:
    test = corpus["test"]
    assert len(test) == 60 and len({example["id"] for example in test}) == 60
    seen = set()
    for pair in [pair for pair in pairwise(test) if pair[0]["pair"] == pair[1]["pair"]]:
        first, second = pair
        assert set(first["violations"]) != set(second["violations"]) and first["bank"] == second["bank"]
        lines = [texts(example)[0].splitlines() for example in pair]
        changed = [(a, b) for a, b in zip(*lines, strict=True) if a != b and not a.startswith("Client ")]
        assert len(changed) == 1
        without_digits = {re.sub(r"\d+(\.\d+)?", "#", line) for line in changed[0]}
        assert len(without_digits) == (2 if first["pair"].endswith("in words") else 1)
        seen.add((first["kind"], first["pair"].partition(" ")[2], first["note_facts"][0]["applies"]))
    assert seen >= {(kind, "in words", True) for kind in KINDS}
    assert seen >= {(kind, "in figures", applies) for kind in KINDS for applies in (True, False)}


def test_the_same_request_gives_the_same_bytes(tmp_path) -> None:
    for name in ("first", "again"):
        card = generate_corpus(tmp_path / name, replace(REQUEST, examples=20), 1)
        for split, uses in card["notes"].items():  # make_reports.py prints how often a note is repeated
            used = Counter(json.loads(line)["note"] for line in (tmp_path / name / f"{split}.jsonl").open())
            assert uses == {"notes": len(used), "reports": used.total(), "most": max(used.values()), "without": 0}
    first, again = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "first", tmp_path / "again")
    )
    assert first == again and len(first) > 40


@pytest.mark.parametrize(
    ("examples", "shares", "message"),
    [(5, [0.9, 0.05, 0.05], "too few for a share of 0.05 in 'validation'"), (50, [0.5, 0.2, 0.2], "add up to 1")],
)
def test_splits_that_cannot_be_made_are_refused(examples, shares, message) -> None:
    with pytest.raises(UserError, match=message):
        split_counts(Request(examples, 0, "quickstart", shares))
    assert split_counts(Request(101, 0, "quickstart", [0.5, 0.2, 0.3])) == {"train": 50, "validation": 20, "test": 30}


def test_a_directory_of_something_else_is_refused(tmp_path) -> None:
    for card in ("[", "[]", "{}"):
        (tmp_path / "dataset.json").write_text(card)
        with pytest.raises(UserError, match="was not made with these arguments"):
            is_generated(tmp_path, REQUEST)
    (tmp_path / "dataset.json").write_text(json.dumps({"arguments": asdict(REQUEST)}))
    assert is_generated(tmp_path, REQUEST) and not is_generated(tmp_path / "new", REQUEST)
    with pytest.raises(UserError, match="corpus cannot be made: a file is in its path"):
        is_generated(tmp_path / "dataset.json" / "corpus", REQUEST)
