"""Score the facts that an answer reads in a bank's note against the true facts of the example."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from common.errors import UserError
from eval.asked_examples import report_of
from eval.rouge import mean
from xbrl.rules.note_facts import KINDS, NoteFact

FIELDS = ("kind", "applies", "amount", "who", "since", "quote")
OVERLAP = 0.5  # least F-measure of a quotation's words against the words of the reference's quotation
_NOTE_LINE = re.compile(r"^note(?:: | on .*? \| )(.*)", re.IGNORECASE | re.MULTILINE)
_GERMAN = re.compile(r"\b(?:der|die|das|und|nicht|wir|ist|bei|dem|den|im|sind|wurde|von)\b", re.IGNORECASE)
_ENGLISH = re.compile(r"\b(?:the|and|of|not|we|is|at|to|in|are|was|our|that|with)\b", re.IGNORECASE)


def note_of(report: str) -> str:
    """Return the note in a printed report; "" without one."""
    return "\n".join(_NOTE_LINE.findall(report))


def language_of(note: str) -> str:
    """Return `de` or `en`, by the function words of a note."""
    return "de" if len(_GERMAN.findall(note)) > len(_ENGLISH.findall(note)) else "en"


def true_facts(example: dict, where: str = "") -> list[NoteFact] | None:
    """Read the field `note_facts` of an example; None without it. Raise UserError, which names `where`, if it is malformed."""
    entries = example.get("note_facts")
    if entries is None:
        return None
    try:
        return [_of_entry(entry) for entry in entries]
    except (KeyError, TypeError, ValueError, InvalidOperation, AttributeError):
        raise UserError(
            f"{where or 'an example'}, example {example.get('id', '?')}: `note_facts` must be a list of objects with "
            f"{', '.join(FIELDS)}; kind is one of {', '.join(KINDS)}, applies true or false, amount a number of EUR or null"
        ) from None


def _of_entry(entry: dict) -> NoteFact:
    kind, applies, amount, who = (entry[name] for name in FIELDS[:4])
    names = [who] if isinstance(who, str) else who or ()
    if kind not in KINDS or not isinstance(applies, bool) or not all(isinstance(name, str) for name in names):
        raise ValueError
    value = None if amount is None else Decimal(str(amount))
    return NoteFact(kind, applies, value, tuple(names), entry.get("since") or "", entry.get("quote") or "")


class _Match(NamedTuple):
    """A true fact matched with a stated fact, or an unmatched fact of either side."""

    kind: str
    language: str
    is_true: bool
    is_stated: bool
    right: dict[str, bool]  # field -> whether both facts agree; {} if unmatched


def score_notes(examples: Sequence[dict], stated: Sequence[Iterable[NoteFact]]) -> dict | None:
    """Score the `stated` facts of the notes of `examples`; None if no example has the field `note_facts`.

    A true and a stated fact of the same kind are matched, starting with the pair that agrees most. A match counts for
    `decided_f1` if kind and applies are right, for `amount_f1` if the amount is right too, for `f1` if everything is. `right` is
    the fraction of matches in which one field is right. Names are compared without case and punctuation. A quotation is right if
    it stands in the note and shares its words with the reference's (F-measure of at least `OVERLAP`). `kinds` and `languages`
    have the same scores for parts of the facts, `pairs` the minimal pairs in which both notes are decided right.
    """
    matches: list[_Match] = []
    pairs: dict[str, list[bool]] = {}
    known = [
        (example, true_facts(example), list(facts))
        for example, facts in zip(examples, stated, strict=True)
        if "note_facts" in example
    ]
    for example, true, facts in known:
        of_note = list(_matches(true or [], facts, note_of(report_of(example))))
        matches += of_note
        if example.get("pair"):
            pairs.setdefault(str(example["pair"]), []).append(all(match.right.get("applies") for match in of_note))
    if not known:
        return None
    complete = [all(members) for members in pairs.values() if len(members) == 2]
    matched = [match.right for match in matches if match.right]
    languages = sorted({match.language for match in matches})
    return _f1(matches) | {
        "n_matched": len(matched),
        "right": {name: mean([right[name] for right in matched]) for name in FIELDS[1:]},
        "kinds": {kind: _f1(part) for kind in KINDS if (part := [match for match in matches if match.kind == kind])},
        "languages": {name: _f1([match for match in matches if match.language == name]) for name in languages},
        "pairs": {"n": len(complete), "right": mean(complete)},
    }


def _matches(true: list[NoteFact], stated: list[NoteFact], note: str) -> Iterable[_Match]:
    """Yield every true and every stated fact in one match. Of equal kinds, the pairs that agree most are matched first."""
    language = language_of(note)
    places = itertools.product(range(len(true)), range(len(stated)))
    candidates = [(_right(true[i], stated[j], note), i, j) for i, j in places if true[i].kind == stated[j].kind]
    taken, used = set(), set()
    for right, i, j in sorted(candidates, key=lambda pair: (-pair[0]["applies"], -sum(pair[0].values()))):
        if i not in taken and j not in used:
            taken.add(i)
            used.add(j)
            yield _Match(true[i].kind, language, True, True, right)
    yield from (_Match(fact.kind, language, True, False, {}) for i, fact in enumerate(true) if i not in taken)
    yield from (_Match(fact.kind, language, False, True, {}) for j, fact in enumerate(stated) if j not in used)


def _right(true: NoteFact, stated: NoteFact, note: str) -> dict[str, bool]:
    return {
        "applies": true.applies == stated.applies,
        "amount": true.amount == stated.amount,
        "who": set(_words(" ".join(true.who))) - {"and"} == set(_words(" ".join(stated.who))) - {"and"},
        "since": true.since == stated.since,
        "quote": is_quotation(stated.quote, note) and _overlap(true.quote, stated.quote) >= OVERLAP,
    }


def is_quotation(quote: str, note: str) -> bool:
    """Return whether the words stand in the note in one piece, whatever their case, spaces and punctuation."""
    return bool(_words(quote)) and f" {' '.join(_words(quote))} " in f" {' '.join(_words(note))} "


def _overlap(reference: str, quote: str) -> float:
    """Return the F-measure of the words that both texts have."""
    expected, quoted = Counter(_words(reference)), Counter(_words(quote))
    return 2 * (expected & quoted).total() / max(1, expected.total() + quoted.total())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _f1(matches: Sequence[_Match]) -> dict[str, float]:
    total = sum(match.is_true + match.is_stated for match in matches)

    def f1(*names: str) -> float:
        right = sum(bool(match.right) and all(match.right[name] for name in names) for match in matches)
        return 2 * right / max(1, total)

    return {
        "n": sum(match.is_true for match in matches),
        "n_said": sum(match.is_stated for match in matches),
        "f1": f1(*FIELDS[1:]),
        "amount_f1": f1("applies", "amount"),
        "decided_f1": f1("applies"),
    }
