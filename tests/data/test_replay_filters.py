import random

import pytest

from data.replay_filters import Evaluated, Filters, ended, filtered, normalised, repetition, sketch
from eval.general_text import held_out_texts
from tests.tiny import WORDS

NOTHING = Evaluated([])


def prose(seed, words=60):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randint(0, 999)) for _ in range(words))


def test_each_reason_is_counted_and_the_first_stays():
    a, b = prose(1), prose(2)
    altered = a.replace(a.split()[30], "altered")
    loop = " ".join(["The bank shall report its own funds to the supervisor."] * 12)
    overlapping = prose(3) + " " + held_out_texts()[0][100:180]
    texts = [a, "  " + a.upper().replace(" ", "\n"), altered, "Too short.", loop, overlapping, b, prose(3)]
    kept, left_out = filtered(texts, Filters(), Evaluated(held_out_texts()))
    assert kept == [0, 6, 7]
    assert left_out == {"too short": 1, "repetitive": 1, "duplicate": 1, "near duplicate": 1, "evaluated": 1}
    assert filtered(texts, Filters(min_characters=1, repeated=1.0, alike=1.0), NOTHING)[0] == [0, 2, 3, 4, 5, 6, 7]


def test_similarity_is_the_jaccard_of_the_shingles():
    # Half of the words in common at the same places: a third of the union.
    words, others = prose(5, 400).split(), prose(6, 400).split()
    half = " ".join(words[:200] + others[200:])
    for alike, kept in ((0.25, [0]), (0.42, [0, 1])):
        assert filtered([" ".join(words), half], Filters(alike=alike), NOTHING)[0] == kept
    everything = normalised(prose(7, 2000))
    assert len(sketch(everything)) == pytest.approx(len(everything) / 4, rel=0.1)


def test_repetition_is_the_share_that_stood_before():
    assert repetition(normalised(prose(8))) < 0.02
    sentence = "abcdefghij klmnopqrstu vwxyz 0123456789."  # 40 characters, all shingles of the loop distinct
    assert repetition(sentence * 10) == pytest.approx(1 - 40 / 377)
    assert repetition("") == repetition("short") == 0.0


def test_a_short_text_counts_as_a_whole_only_between_words():
    evaluated = Evaluated(["2 + 2 = 4", "The capital of France is Paris", " "])
    assert evaluated.overlaps(normalised("We know that the CAPITAL of France\n is Paris."))
    assert evaluated.overlaps("so 2 + 2 = 4, as you see")
    assert not evaluated.overlaps("so 2 + 2 = 45")
    assert not evaluated.overlaps("the capital of france is")


def test_a_text_that_was_cut_ends_with_a_whole_sentence():
    assert ended("One. Two is 3.5 and") == "One."
    assert ended('He said "no." Then he') == 'He said "no."'
    assert ended("A list:\n- first\n- sec") == "A list:\n- first"
    assert ended("句子。第二") == "句子。"
    assert ended("no end at all") == ""
    assert ended("Whole.") == "Whole."
