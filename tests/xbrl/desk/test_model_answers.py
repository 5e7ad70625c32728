"""What a model is asked, and why a report cannot be asked."""

import pytest

from data.tokens import load_tokenizer
from tests.tiny import write_tiny_model
from tests.xbrl.desk.reports import LCR, NAMED, SMALL, read
from xbrl.desk.model_answers import Asking, Questions
from xbrl.desk.profiles import PROFILES
from xbrl.desk.record import Case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(read(tmp_path_factory.mktemp("report"), {LCR: "0.93"}, SMALL), NAMED)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def questions(model, profile="laptop", longest=100):
    return Questions(Asking(model, PROFILES[profile], "--profile", longest, 4, "fp32"))


def test_the_prompt_is_that_of_training_and_the_answer_is_decoded(model, case):
    asking = questions(model)
    reply, ids = asking.question(case)
    tokenizer = load_tokenizer(str(model))
    expected = (
        f"<|im_start|>system\nCheck the report.<|im_end|>\n<|im_start|>user\n31 March 2026\n{NAMED.name}\n"
        "Leverage ratio 5%\nLCR 93%\nNSFR 110%<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == expected
    text = tokenizer("Checks:\nLCR", add_special_tokens=False)["input_ids"]
    unasked, none = questions(model, longest=500).question(case)
    replies = asking.replies([(reply, ids), (unasked, none), (reply, ids)], [text, [5] * 100])
    assert [one.text for one in replies[:2]] == ["Checks:\nLCR", None]
    assert [one.cut_short for one in replies] == [False, False, True]


def test_a_report_that_is_too_long_or_of_another_profile_is_not_asked(model, case):
    _, ids = questions(model).question(case)
    room = 512 - len(ids)
    assert questions(model, longest=room).question(case)[1] == ids
    reply, none = questions(model, longest=room + 1).question(case)
    assert none == [] and reply.problem == (
        f"it is too long: {len(ids)} tokens and an answer of up to {room + 1} do not fit into the model's context of 512"
    )
    reply, none = questions(model, "quickstart").question(case)
    assert none == [] and reply.problem.startswith("it has C 84.00.a r0220 c0040, which no example")
