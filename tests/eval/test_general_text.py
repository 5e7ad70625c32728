from eval import general_text
from eval.general_text import held_out_texts, pieces, training_texts


def paragraphs(texts):
    return [" ".join(part.split()) for text in texts for part in text.split("\n\n") if part.strip()]


def test_no_paragraph_stands_on_both_sides_or_twice(monkeypatch):
    topics = {name: f"About {name}.\n\nShared by all.\n\nOnly in {name}:\n  indented" for name in map(str, range(200))}
    topics["quotes"] = "\n\n".join(topics.values()).replace(":\n  indented", ":\n      indented")
    monkeypatch.setattr(general_text, "topics", topics)
    held_out, training = paragraphs(held_out_texts()), paragraphs(training_texts())
    assert 10 < len(held_out_texts()) < 50  # 12% of 200
    assert len(held_out_texts()) + len(training_texts()) in (200, 201)
    assert not set(held_out) & set(training)
    assert len(held_out) == len(set(held_out))
    assert len(training) == len(set(training))


def test_a_topic_stays_on_its_side_when_others_come_or_go(monkeypatch):
    topics = {str(i): f"Topic number {i}." for i in range(100)}
    monkeypatch.setattr(general_text, "topics", topics)
    before = set(held_out_texts())
    for others in (topics | {"a new one": "New."}, {name: text for name, text in topics.items() if int(name) % 3}):
        monkeypatch.setattr(general_text, "topics", others)
        assert set(held_out_texts()) - {"New."} == before & set(others.values())


def test_the_real_text_is_enough_on_both_sides():
    held_out, training = held_out_texts(), training_texts()
    assert sum(map(len, held_out)) > 25_000
    assert sum(map(len, training)) > 200_000
    assert not set(paragraphs(held_out)) & set(paragraphs(training))


def test_pieces_lose_no_word_and_are_short():
    texts = ["One.\n\nTwo two.\n\n" + "word " * 40 + "\nline\n\n" + "x" * 70 + "é" * 30, "short", "\n\n"]
    for most in (7, 20, 64):
        found = pieces(texts, most)
        assert all(0 < len(piece.encode()) <= most and piece.strip() for piece in found)
        assert "".join("".join(found).split()) == "".join("".join(texts).split())
    assert pieces(texts, 10_000) == texts[:2]
    assert pieces(["One.\n\nTwo two.\n\nThree."], 14) == ["One.\n\nTwo two.", "Three."]
