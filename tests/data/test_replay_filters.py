import random

import pytest

import data.replay_filters
from common.errors import UserError
from data.replay_filters import (
    EvaluationTexts,
    filter_sampled,
    filter_texts,
    normalize,
    repetition,
    sketch,
    until_last_sentence,
)
from eval.general_text import held_out_texts
from tests.tiny import WORDS

NOTHING = EvaluationTexts([])


def prose(seed, words=60):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randint(0, 999)) for _ in range(words))


def test_reasons_are_counted_first_similar_text_stays(monkeypatch):
    a, b = prose(1), prose(2)
    altered = a.replace(a.split()[30], "altered")
    loop = " ".join(["The bank shall report its own funds to the supervisor."] * 12)
    overlapping = prose(3) + " " + held_out_texts()[0][100:180]
    texts = [a, "  " + a.upper().replace(" ", "\n"), altered, "Too short.", loop, overlapping, b, prose(3)]
    kept, dropped = filter_texts(texts, 100, EvaluationTexts(held_out_texts()))
    assert kept == [0, 6, 7]
    assert dropped == {"too short": 1, "repetitive": 1, "duplicate": 2, "evaluated": 1}
    monkeypatch.setattr(data.replay_filters, "MAX_REPETITION", 1.0)
    monkeypatch.setattr(data.replay_filters, "MAX_SIMILARITY", 1.0)
    assert filter_texts(texts, 1, NOTHING)[0] == list(range(8))


def test_similarity_is_the_jaccard_similarity_of_the_shingles(monkeypatch):
    # Half of the words are common to both texts, in the same places: a third of the union.
    words, more_words = prose(5, 400).split(), prose(6, 400).split()
    half = " ".join(words[:200] + more_words[200:])
    for max_similarity, kept in ((0.25, [0]), (0.42, [0, 1])):
        monkeypatch.setattr(data.replay_filters, "MAX_SIMILARITY", max_similarity)
        assert filter_texts([" ".join(words), half], 100, NOTHING)[0] == kept
    text = normalize(prose(7, 2000))
    assert len(sketch(text)) == pytest.approx(len(text) / 4, rel=0.1)


def test_repetition_is_the_fraction_of_repeated_shingles():
    assert repetition(normalize(prose(8))) < 0.02
    sentence = "abcdefghij klmnopqrstu vwxyz 0123456789."  # 40 characters; all shingles of the loop are distinct
    assert repetition(sentence * 10) == pytest.approx(1 - 40 / 377)
    assert repetition("") == repetition("short") == 0.0


def test_short_evaluation_text_overlaps_only_as_whole():
    evaluation = EvaluationTexts(["2 + 2 = 4", "The capital of France is Paris", " "])
    assert evaluation.overlaps(normalize("We know that the CAPITAL of France\n is Paris."))
    assert evaluation.overlaps("so 2 + 2 = 4, as you see")
    assert not evaluation.overlaps("so 2 + 2 = 45")
    assert not evaluation.overlaps("the capital of france is")


def test_overlap_is_any_shared_fifty_characters():
    rng = random.Random(0)
    alphabet = "abcdefgh äö句😀"

    def letters(count: int) -> str:
        return "x" + "".join(rng.choice(alphabet) for _ in range(count - 2)) + "x"

    held_out = [letters(1000), "a short text", letters(200), letters(49)]
    evaluation = EvaluationTexts(held_out)
    runs = {text[i : i + 50] for text in map(normalize, held_out) for i in range(len(text) - 49)}
    assert len(evaluation.shingles) == sum(len(normalize(text)) - 49 for text in (held_out[0], held_out[2]))
    num_overlaps = 0
    for trial in range(400):
        start, length = rng.randrange(900), 40 + trial % 20
        before, after = letters(rng.randrange(150)), letters(rng.randrange(150))
        text = normalize(before + held_out[0][start : start + length] + after)
        overlaps = any(text[i : i + 50] in runs for i in range(len(text) - 49))
        assert evaluation.overlaps(text) == overlaps
        num_overlaps += overlaps
    assert 100 < num_overlaps < 300
    assert not NOTHING.overlaps(held_out[0])


def test_truncated_text_ends_with_a_complete_sentence():
    assert until_last_sentence("One. Two is 3.5 and") == "One."
    assert until_last_sentence('He said "no." Then he') == 'He said "no."'
    assert until_last_sentence("A list:\n- first\n- sec") == "A list:\n- first"
    assert until_last_sentence("句子。第二") == "句子。"
    assert until_last_sentence("no end at all") == ""
    assert until_last_sentence("Whole.") == "Whole."


def test_unfinished_texts_are_truncated_and_unfinished_chats_dropped():
    def chat(answer):
        return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]

    sampled = [
        {"text": prose(1) + ". And then", "finished": False},
        {"text": prose(2), "finished": True},
        {"messages": chat(prose(3)), "finished": False},
        {"messages": chat(prose(4)), "finished": True},
        {"text": "Too short.", "finished": True},
    ]
    documents, dropped, num_truncated = filter_sampled(sampled, 100, NOTHING)
    assert documents == [{"text": prose(1) + "."}, {"text": prose(2)}, {"messages": chat(prose(4))}]
    assert num_truncated == 1
    assert {reason: count for reason, count in dropped.items() if count} == {"unfinished": 1, "too short": 1}
    with pytest.raises(UserError, match="none of 1 documents passed the filters"):
        filter_sampled(sampled[4:], 100, NOTHING)
