"""The letter that a model wrote: shown beside the decision, and never sent. Its figures are checked, its sentences are not.

Every sentence that is not one of the approved blocks is listed, with words of `blocks/LANGUAGE/flags.toml` that may turn a
finding round. No list of words makes a text safe: what is sent is made of blocks alone (`letters.py`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xbrl.answers.letter_scores import flagged_words
from xbrl.answers.statements import quantities, sentences, statements
from xbrl.rules.rules import RuleResult

_MARKS = re.compile(r"^(?:[-*•]|\d{1,2}[.)])\s+")


@dataclass(frozen=True)
class Draft:
    """The model's letter. `outside`: (sentence that is not in the blocks, the words in it that are flagged)."""

    text: str
    outside: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unknown: tuple[str, ...] = ()  # figures, dates and articles that neither the report nor a rule has


def check_draft(text: str, approved: Sequence[str], known: Sequence[str], violated: Sequence[RuleResult]) -> Draft:
    """Compare a letter with `approved` letters from blocks and `known` texts, such as the report as the model saw it."""
    own = {sentence for letter in approved for sentence in _sentences(letter)}
    relations = {result.relation for result in violated}
    outside = [(sentence, flags(sentence, relations)) for sentence in _sentences(text) if sentence not in own]
    supported = statements("\n".join([*known, *approved]))
    stated = statements(text)
    unknown = [
        f"the figure {printed}" for printed, one in quantities(text) if one in stated["figures"] - supported["figures"]
    ]
    unknown += [f"the date {day}" for day in sorted(stated["dates"] - supported["dates"])]
    unknown += [f"the article {act} {number}" for act, number in sorted(stated["articles"] - supported["articles"])]
    return Draft(text, tuple(outside), tuple(dict.fromkeys(unknown)))


def flags(sentence: str, relations: Iterable[str]) -> tuple[str, ...]:
    """The flagged words of a sentence, each with its class. `relations` are those of the findings ("min", "max")."""
    classes = flagged_words()
    used = {name: words for name, words in classes.items() if not name.startswith("against ")}
    for relation in relations:
        used |= {name: words for name, words in classes.items() if name == f"against {relation}"}
    found = []
    for name, words in used.items():
        found += [f"{word} ({name})" for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", sentence, re.I)]
    return tuple(found)


def _sentences(text: str) -> list[str]:
    """The sentences of a letter without bullets and numbers, each once."""
    plain = (_MARKS.sub("", " ".join(sentence.split())) for sentence in sentences(text))
    return list(dict.fromkeys(sentence for sentence in plain if re.search(r"\w", sentence)))
