"""Greedy decoding inside a grammar."""

import pytest
import regex
import torch
from hypothesis import given, settings, strategies
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data.tokens import load_tokenizer
from eval.constrained import ConstrainedAnswer, Grammar, _by_probability
from eval.generate import greedy_answers
from tests.tiny import write_tiny_model
from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.answers import LETTER, answer_grammar

CELLS = (
    "Violations:\nCET1_MIN | C 03.00 r0010 c0010 | 4.31% | min 4.5% | CRR Art. 92(1)(a)\n"
    "OF_SUM | C 01.00 r0010 c0010 | not reported | expected 92000 thousand | CRR Art. 72\nDirective:\nTo the Board é."
)
CHECKS = (
    "Checks:\nTier 1 ratio 5.2% < 6%: T1_MIN, CRR Art. 92(1)(b)\nClients 14% + 13% = 27% > 25%: LE_CONNECTED, CRR Art. 395(1)\n"
    "Waiver: lifts LCR_MIN, CRR Art. 8\nNSFR 110%: met\nDirective:\nTo the Board."
)
SHORT = (
    'Note:\nprofit | applies | EUR 4000000 | - | - | "our profit is in CET1"\nChecks:\nCET1 ratio 7.31% min 4.5%: met\n'
    "min 9.34%: OCR_CET1, CRD Art. 141a(a)\nClient Arno S.A. 15% max 25%: met\nLCR 1010 / 1000 = 101% != 104%: LCR_CALC, 2015/61 Art. 4(1)\n"
    "CET1 73.1 mn - 4 mn = 69.1 mn: PROFIT_COUNTED, CRR Art. 26(2)\nTier 1 ratio 120 - 4 = 116, 116 / 1000 = 11.6% min 6%: met\n"
    "Directive:\nTo the Board."
)
NONE = "Violations:\nnone\nDirective:\nNo measures."


def examples(*answers):
    return [{"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": one}]} for one in answers]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("constrained") / "model", seed=3)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), load_tokenizer(directory)


def test_of_equally_probable_tokens_the_one_comes_first_that_is_taken_without_a_grammar():
    """In bf16 seven of a hundred tokens are as probable as the next one."""
    scores = torch.randint(0, 99, (50, 400), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert [next(_by_probability(row)) for row in scores] == scores.argmax(-1).tolist()
    every = list(_by_probability(scores[0]))
    assert sorted(every) == list(range(400)) and scores[0, every].diff().max() <= 0


def grammar(tokenizer, *answers):
    return Grammar(answer_grammar(examples(*answers)), LETTER, tokenizer, frozenset({tokenizer.eos_token_id}))


def matches(pattern, text):
    return regex.fullmatch(pattern, text, flags=regex.DOTALL) is not None


@pytest.mark.parametrize("answer", [CELLS, CHECKS, SHORT, NONE])
def test_every_prefix_of_an_answer_is_inside_its_grammar(tiny, answer):
    own = grammar(tiny[1], answer)
    assert own.is_complete(answer)
    assert all(own.can_be_continued(answer[:end]) for end in range(len(answer)))
    assert not any(own.is_complete(answer[:end]) for end in range(answer.index("Directive:") + len("Directive:\n")))
    assert parse_answer(answer).void == 0


def test_what_no_answer_has_is_outside(tiny):
    own, breach = grammar(tiny[1], CELLS), "Violations:\nLCR_MIN | LCR | "
    for text in ("The bank", "Violations:\nnone\nLCR", f"{breach}low", f"{breach}93% | about"):
        assert not own.can_be_continued(text)
    pattern, right = answer_grammar(examples(SHORT)), "CET1 ratio 7.31% min 4.5%: met"
    assert right in SHORT and matches(pattern, SHORT)
    for line in (
        "CET1 ratio 7.31% min : met",
        "CET1 ratio 7.31% min 4.5%: GOLD_MIN, CRR Art. 92",
        "CET1 ratio 7.31% min 4.5% max 9%: met",
        "min 4.5%: met",
    ):
        assert not matches(pattern, SHORT.replace(right, line))


@settings(max_examples=30)
@given(
    text=strategies.from_regex(
        answer_grammar(examples(CELLS, CHECKS, SHORT)).removesuffix(".+") + "[a-z]{1,9}", fullmatch=True
    )
)
def test_the_reader_reads_whatever_the_grammar_allows(text):
    answer = parse_answer(text)
    assert answer is not None and answer.void == 0 and answer.directive


def test_the_forms_are_those_of_the_examples():
    both, checks, short = (answer_grammar(examples(*some)) for some in ((CELLS, CHECKS), (CHECKS,), (SHORT,)))
    assert matches(both, CELLS) and matches(both, CHECKS) and not matches(checks, CELLS)
    assert matches(short, SHORT) and not matches(both, SHORT)
    assert not matches(short, SHORT.replace("Checks:", "Violations:"))
    for cell, is_right in (("r0010", True), (" ", False)):
        line = f"Violations:\nCET1_MIN | {cell} | not reported | min 0 | CRR\nDirective:\na"
        assert matches(both, line) == is_right
    with pytest.raises(UserError, match="--constrained knows the answers of this project only"):
        answer_grammar(examples("forty-two"))


def test_the_most_probable_token_inside_the_grammar_is_taken(tiny):
    tokenizer = tiny[1]
    wanted = tokenizer.encode(NONE, add_special_tokens=False)
    answer = ConstrainedAnswer(grammar(tokenizer, CELLS))
    stop, garbage = tokenizer.eos_token_id, tokenizer.encode("Zz", add_special_tokens=False)
    # Before each token of the answer, garbage, a special token and the end are more probable. Inside the letter all is free.
    chosen = [answer.choose([*garbage, *tokenizer.all_special_ids, stop, token]) for token in wanted[:-1]]
    start_of_letter = len(tokenizer.encode(NONE[: NONE.index("No measures")], add_special_tokens=False))
    assert chosen[:start_of_letter] == wanted[:start_of_letter]
    assert set(chosen[start_of_letter:]) <= {garbage[0], stop}
    assert answer.choose([stop]) == stop


def test_batches_of_constrained_answers_are_inside_the_grammar(tiny):
    model, tokenizer = tiny
    own = grammar(tokenizer, CELLS)
    prompts = [[5, 60, 61], [7] * 20, [9, 80, 81]]
    free = greedy_answers(model, prompts, {tokenizer.eos_token_id}, 40, 3)
    answers = greedy_answers(model, prompts, {tokenizer.eos_token_id}, 40, 3, grammar=own)
    for ids in answers:
        assert own.can_be_continued(tokenizer.decode(ids)) or LETTER in tokenizer.decode(ids)
    assert not any(own.can_be_continued(tokenizer.decode(ids)) for ids in free)
    assert answers == greedy_answers(model, prompts, {tokenizer.eos_token_id}, 40, 1, grammar=own)
