"""General text: what is held out, and how it is cut."""

import pytest

from common.errors import UserError
from eval import general_text
from eval.general_text import evaluation_texts, held_out_texts, split_into_pieces, training_texts


def paragraphs(texts):
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()]


def test_no_paragraph_is_in_both_parts(monkeypatch):
    assert sum(map(len, held_out_texts())) > 25_000 and sum(map(len, training_texts())) > 200_000
    assert not set(paragraphs(held_out_texts())) & set(paragraphs(training_texts()))
    topics = {name: f"About {name}.\n\nShared by all.\n\nOnly in {name}:\n  indented" for name in map(str, range(200))}
    topics["quotes"] = "\n\n".join(topics.values()).replace(":\n  indented", ":\n      indented")
    monkeypatch.setattr(general_text, "topics", topics)
    held_out, training = paragraphs(held_out_texts()), paragraphs(training_texts())
    assert 10 < len(held_out_texts()) < 50  # 12% of 200
    assert len(held_out_texts()) + len(training_texts()) in (200, 201)
    assert not set(held_out) & set(training)
    assert len(held_out) == len(set(held_out))
    assert len(training) == len(set(training))


def test_topics_stay_in_their_part(monkeypatch):
    topics = {str(i): f"Topic number {i}." for i in range(100)}
    monkeypatch.setattr(general_text, "topics", topics)
    before = set(held_out_texts())
    for others in (topics | {"a new one": "New."}, {name: text for name, text in topics.items() if int(name) % 3}):
        monkeypatch.setattr(general_text, "topics", others)
        assert set(held_out_texts()) - {"New."} == before & set(others.values())


def test_pieces_keep_all_words():
    texts = ["One.\n\nTwo two.\n\n" + "word " * 40 + "\nline\n\n" + "x" * 70 + "é" * 30, "short", "\n\n"]
    for max_bytes in (7, 20, 64):
        pieces = split_into_pieces(texts, max_bytes)
        assert all(0 < len(piece.encode()) <= max_bytes and piece.strip() for piece in pieces)
        assert "".join("".join(pieces).split()) == "".join("".join(texts).split())
    assert split_into_pieces(texts, 10_000) == texts[:2]
    assert split_into_pieces(["One.\n\nTwo two.\n\nThree."], 14) == ["One.\n\nTwo two.", "Three."]


def test_evaluation_texts_must_be_plain_text(tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(UserError, match=r"chat.jsonl, line 1 has no `text`"):
        evaluation_texts([chat], 200_000)
