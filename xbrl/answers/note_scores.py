"""The facts of a bank's note: read from an example, and scored against the truth."""

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
OVERLAP = 0.5  # of the words of a quotation and of the reference's, as their F-measure
_NOTE_LINE = re.compile(r"^note(?:: | on .*? \| )(.*)", re.IGNORECASE | re.MULTILINE)
_GERMAN = re.compile(r"\b(?:der|die|das|und|nicht|wir|ist|bei|dem|den|im|sind|wurde|von)\b", re.IGNORECASE)
_ENGLISH = re.compile(r"\b(?:the|and|of|not|we|is|at|to|in|are|was|our|that|with)\b", re.IGNORECASE)


def note_of(report: str) -> str:
    """The note in a printed report; "" without one."""
    return "\n".join(_NOTE_LINE.findall(report))


def language_of(note: str) -> str:
    """`de` or `en`, by the function words of a note."""
    return "de" if len(_GERMAN.findall(note)) > len(_ENGLISH.findall(note)) else "en"


def true_facts(example: dict, where: str = "") -> list[NoteFact] | None:
    """The field `note_facts` of an example; None without it. Raises UserError for an entry that is not of its form."""
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
    """A true fact with the said one that belongs to it, or one of the two alone."""

    kind: str
    language: str
    is_true: bool
    is_said: bool
    right: dict[str, bool]  # field -> whether both agree; empty if one is alone


def score_notes(examples: Sequence[dict], said: Sequence[Iterable[NoteFact]]) -> dict | None:
    """Scores of the facts `said` of the notes of `examples`; None if no example has the field `note_facts`.

    A true fact and a said one of the same kind are matched, those that agree most first. A match counts for `decided_f1` if
    kind and applies are right, for `amount_f1` if the amount is right too, for `f1` if everything is. `right` is the share
    of the matches in which one field is right. Names are compared without case and punctuation. A quotation is right if it
    stands in the note and shares its words with the reference's (F-measure of `OVERLAP` at least). `kinds` and `languages`
    have the same of parts of the facts, `pairs` the minimal pairs in which both notes are decided right.
    """
    matches: list[_Match] = []
    pairs: dict[str, list[bool]] = {}
    known = [(one, true_facts(one), list(own)) for one, own in zip(examples, said, strict=True) if "note_facts" in one]
    for example, true, own in known:
        of_note = list(_matches(true or [], own, note_of(report_of(example))))
        matches += of_note
        if example.get("pair"):
            pairs.setdefault(str(example["pair"]), []).append(all(one.right.get("applies") for one in of_note))
    if not known:
        return None
    both = [all(members) for members in pairs.values() if len(members) == 2]
    together = [one.right for one in matches if one.right]
    languages = sorted({one.language for one in matches})
    return _f1(matches) | {
        "n_matched": len(together),
        "right": {name: mean([one[name] for one in together]) for name in FIELDS[1:]},
        "kinds": {kind: _f1(part) for kind in KINDS if (part := [one for one in matches if one.kind == kind])},
        "languages": {name: _f1([one for one in matches if one.language == name]) for name in languages},
        "pairs": {"n": len(both), "right": mean(both)},
    }


def _matches(true: list[NoteFact], said: list[NoteFact], note: str) -> Iterable[_Match]:
    """Every true fact and every said one in one match; of equal kinds those that agree most are matched first."""
    language = language_of(note)
    places = itertools.product(range(len(true)), range(len(said)))
    candidates = [(_right(true[i], said[j], note), i, j) for i, j in places if true[i].kind == said[j].kind]
    taken, used = set(), set()
    for right, i, j in sorted(candidates, key=lambda one: (-one[0]["applies"], -sum(one[0].values()))):
        if i not in taken and j not in used:
            taken.add(i)
            used.add(j)
            yield _Match(true[i].kind, language, True, True, right)
    yield from (_Match(fact.kind, language, True, False, {}) for i, fact in enumerate(true) if i not in taken)
    yield from (_Match(fact.kind, language, False, True, {}) for j, fact in enumerate(said) if j not in used)


def _right(true: NoteFact, said: NoteFact, note: str) -> dict[str, bool]:
    return {
        "applies": true.applies == said.applies,
        "amount": true.amount == said.amount,
        "who": set(_words(" ".join(true.who))) - {"and"} == set(_words(" ".join(said.who))) - {"and"},
        "since": true.since == said.since,
        "quote": is_quotation(said.quote, note) and _overlap(true.quote, said.quote) >= OVERLAP,
    }


def is_quotation(quote: str, note: str) -> bool:
    """Whether the words stand in the note in one piece; case, spaces and punctuation do not matter."""
    return bool(_words(quote)) and f" {' '.join(_words(quote))} " in f" {' '.join(_words(note))} "


def _overlap(one: str, other: str) -> float:
    """The F-measure of the words that both texts have."""
    words, others = Counter(_words(one)), Counter(_words(other))
    return 2 * (words & others).total() / max(1, words.total() + others.total())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _f1(matches: Sequence[_Match]) -> dict[str, float]:
    total = sum(one.is_true + one.is_said for one in matches)

    def f1(*names: str) -> float:
        return 2 * sum(bool(one.right) and all(one.right[name] for name in names) for one in matches) / max(1, total)

    return {
        "n": sum(one.is_true for one in matches),
        "n_said": sum(one.is_said for one in matches),
        "f1": f1(*FIELDS[1:]),
        "amount_f1": f1("applies", "amount"),
        "decided_f1": f1("applies"),
    }
