"""The set of questions, and how it is scored."""

from data.replay_filters import normalize
from eval.questions import FILE, Question, encode_options, read_questions, right_answers, start_tokens
from tests.tiny import tiny_tokenizer

TWO = [Question("a", "The bank is", (" liquid", " dry")), Question("b", "1 + 1 =", (" 2", " 3", " 11"))]


def test_the_question_set_is_well_formed():
    questions = read_questions()
    kinds = {question.kind: sum(other.kind == question.kind for other in questions) for question in questions}
    assert len(questions) >= 100
    assert len(kinds) >= 6 and min(kinds.values()) >= 10
    assert len({normalize(question.prompt) for question in questions}) == len(questions)
    for question in questions:
        assert 2 <= len(question.options) == len(set(question.options)) <= 4, question
        assert not question.prompt.endswith(" "), question  # a space belongs to the word after it
        # If one option were a prefix of another, only their lengths would be compared.
        assert not any(a != b and b.startswith(a) for a in question.options for b in question.options), question
    chance = sum(1 / len(question.options) for question in questions) / len(questions)
    assert 0.25 <= chance < 0.3
    assert FILE.read_text(encoding="utf-8").count("\n") == len(questions)


def test_only_tokens_of_the_option_are_targets():
    tokenizer = tiny_tokenizer()

    def targets(ids, is_target):
        return [tokenizer.decode([i]) for i, flag in zip(ids, is_target, strict=True) if flag]

    sequences = encode_options(tokenizer, TWO)
    assert start_tokens(tokenizer) == tokenizer.encode("\n", add_special_tokens=False) and len(sequences) == 5
    options = [(q.prompt, option) for q in TWO for option in q.options]
    for (ids, is_target), (prompt, option) in zip(sequences, options, strict=True):
        assert tokenizer.decode(ids) == f"\n{prompt}{option}" and "".join(targets(ids, is_target)) == option
    tokenizer.add_tokens([" is liquid"])
    liquid, dry = encode_options(tokenizer, TWO[:1])
    assert targets(*liquid) == [" is liquid"] and "".join(targets(*dry)) == " dry"


def test_the_likeliest_option_per_byte_wins():
    # " liquid" has 7 bytes, " dry" 4: 6.9 / 7 < 4.0 / 4, although the sum is larger. A tie is not a right answer.
    assert right_answers(TWO, [6.9, 4.0, 1.0, 1.1, 9.0]) == [True, True]
    assert right_answers(TWO, [7.1, 4.0, 1.0, 1.0, 9.0]) == [False, False]
    assert right_answers(TWO, [1.0, 4.0, float("nan"), 1.0, 9.0]) == [True, False]
    assert right_answers([Question("c", "2 +", (" €", " e"))], [1.5, 1.0]) == [True]  # 4 bytes and 2
