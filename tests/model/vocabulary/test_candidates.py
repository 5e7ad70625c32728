"""Which strings become tokens: whole codes and repeated labels, but neither figures nor everyday words."""

import random
import re

import pytest

from common.errors import UserError
from model.new_tokens import NewToken, check_patterns, find_new_tokens, is_valid, split

CODES = (r"[rc]\d{4}",)


def length(text: str) -> int:
    """Return the number of tokens of a tokenizer with words and single digits."""
    return len(re.findall(r" ?[^\W\d]+|.", text, re.S))


def lines(n: int) -> list[str]:
    """Return lines of a report: two codes, a label (of two), and a figure that hardly ever repeats."""
    rng = random.Random(0)
    labels = ("Type 1 surface ratio", "NET WATER OUTFLOW of the region")
    return [f"r{10 * (i % 4):04d} c0010 {labels[i % 2]} | {rng.randrange(10**6)} thousand" for i in range(n)]


def found(texts: list[str], max_tokens: int = 50, **options) -> dict[str, NewToken]:
    return {token.text: token for token in find_new_tokens(texts, length, max_tokens, **options)}


def test_codes_are_whole_and_counted() -> None:
    tokens = found(["\n".join(lines(80))], patterns=CODES)
    assert tokens[" c0010"] == NewToken(" c0010", 80, 80 * 4)  # " c", 0, 0, 1, 0: five tokens become one
    assert tokens["r0030"].count == 20 and "r0030 c0010" not in tokens
    assert all("c0010" not in text for text in tokens if text != " c0010")


def test_labels_are_ranked_by_saved_tokens() -> None:
    tokens = list(found(["\n".join(lines(80))], patterns=CODES).values())
    texts = [token.text for token in tokens]
    assert tokens[0] == NewToken(" NET WATER OUTFLOW of the region | ", 40, 40 * 8)  # nine tokens become one
    assert {" c0010", " NET WATER OUTFLOW of the region | ", " surface ratio | "} <= {*texts}
    assert [token.saved for token in tokens] == sorted((token.saved for token in tokens), reverse=True)
    best = {token.text for token in find_new_tokens(["\n".join(lines(80))], length, 2, CODES)}
    assert best == set(texts[:2])


def test_reported_savings_match_the_token_count() -> None:
    text = "\n".join(lines(80))
    tokens = found([text], patterns=CODES)
    longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    parts = re.split(f"({longest_first})", text)
    after = len(parts) // 2 + sum(length(part) for part in parts[::2])
    reported = sum(token.saved for token in tokens.values())
    assert length(text) - after == pytest.approx(reported, rel=0.01)
    assert after < 0.7 * length(text)


def test_figures_are_kept_also_in_names() -> None:
    codes, chunks = split(["\n".join(lines(80)), "reference date 2026-12-31"], CODES)
    assert " surface ratio | " in chunks and not any(re.search(r"\d", chunk) for chunk in chunks)
    assert set(split(["Type 1 surface ratio of H2O or 2B"], ())[1]) == {"Type ", " surface ratio of H2O or 2B"}
    tokens = found(["\n".join(lines(400))], patterns=CODES)
    assert not any(re.search(r"\| ?\d", text) for text in tokens)


def test_min_count_and_everyday_text() -> None:
    text = "\n".join(lines(80))
    assert "r0030" not in found([text], patterns=CODES, min_count=21)
    assert all(token.count >= 21 for token in found([text], patterns=CODES, min_count=21).values())
    everyday = ["Each day has a NET WATER OUTFLOW of the region | so to speak"]
    labels = set(found([text], patterns=CODES, general=everyday))
    assert not any(label in everyday[0] for label in labels)
    assert " surface ratio | " in labels
    assert " NET WATER OUTFLOW of the region | " in found([text], patterns=CODES)
    assert not found([text], patterns=CODES, usable=lambda text: False)


def test_no_token_crosses_the_end_of_a_sentence() -> None:
    text = "".join(f"Patient with hypercholesterolaemia receives atorvastatin{end} " for end in (".", "!", ".)", "?"))
    tokens = found([text * 20])
    assert (
        tokens[" Patient with hypercholesterolaemia receives atorvastatin"].count == 79
    )  # the first has no space before it
    assert not [token for token in tokens if re.search(r"[.!?]", token)]
    assert set(split(["A e.coli strain. It grew.\nWhy? \u7ec6\u83cc\u3002\u7ec6\u80de"], ())[1]) == {
        "A e.coli strain", " It grew", "Why", " \u7ec6\u83cc", "\u7ec6\u80de",
    }  # fmt: skip


def test_existing_tokens_are_no_candidates() -> None:
    assert not found([" water coverage\n" * 50], patterns=(r"water",), max_tokens=5).get(" water")
    assert find_new_tokens(["r0010\n" * 50], lambda text: 1, 5, CODES) == []


@pytest.mark.parametrize(
    ("text", "codes"),
    [("{r0010, c0010}", ["r0010", " c0010"]), ("r0010-r0020", ["r0010", "r0020"]), ("xr0010 r00105", [])],
)
def test_codes_begin_and_end_at_words(text, codes) -> None:
    assert list(split([text], CODES)[0]) == codes


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        (" Total assets", True), (", of which", True), (" assets | ", True), ("assets", False), (" Total ", False),
        (" Type 1", False), ("  a", False), (" | ", False), ("", False), (" " + "a" * 64, False), (" a▁b", False),
    ],
)  # fmt: skip
def test_is_valid(text, valid) -> None:
    assert is_valid(text) == valid


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("r(", r"--patterns: 'r\(' is not a regular expression"),
        ("a*", r"--patterns: 'a\*' matches the empty text"),
        ("(r)", r"--patterns: '\(r\)' has a group; write \(\?:"),
    ],
)
def test_invalid_patterns_are_refused(pattern, message) -> None:
    with pytest.raises(UserError, match=message):
        check_patterns([pattern])


def test_words_of_unique_sentences_become_tokens() -> None:
    rng = random.Random(0)
    words = re.findall(r"\w+", "a patient with renal failure was given enoxaparin after the hemicolectomy")
    text = "\n".join(" ".join(rng.sample(words, 8)) for _ in range(80))
    tokens = find_new_tokens([text], lambda part: len(re.findall(r" ?\S{1,4}|.", part, re.S)), 50)
    assert {" enoxaparin", " hemicolectomy"} <= {token.text for token in tokens}
