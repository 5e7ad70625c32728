"""The loss mask covers the assistant's tokens and EOS, and comes from the structure of the chat template."""

import pytest

from common.errors import UserError
from data.tokens import PLAIN_CHAT_TEMPLATE, encode_chat, encode_document, encode_prompt, load_tokenizer
from tests.tiny import tiny_tokenizer

CHAT = [
    {"role": "user", "content": "LCR 97.3%?"},
    {"role": "assistant", "content": "below 100%"},
    {"role": "user", "content": "and the leverage ratio?"},
    {"role": "assistant", "content": "above 3%"},
]
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spans(tokenizer, ids: list[int], is_target: list[bool]) -> list[str]:
    """Decode each consecutive run of target tokens."""
    found, previous = [], False
    for token, flag in zip(ids, is_target, strict=True):
        if flag and not previous:
            found.append([])
        if flag:
            found[-1].append(token)
        previous = flag
    return [tokenizer.decode(run) for run in found]


@pytest.mark.parametrize("template", [None, GENERATION])
def test_all_answers_and_their_eos_are_targets(template) -> None:
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    ids, is_target = encode_chat(tokenizer, CHAT)
    assert spans(tokenizer, ids, is_target) == ["below 100%<|im_end|>", "above 3%<|im_end|>"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(ids) == whole


@pytest.mark.parametrize("template", [None, GENERATION, PLAIN_CHAT_TEMPLATE])
def test_the_prompt_has_the_tokens_that_precede_the_answer_in_training(template) -> None:
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    for upto in (2, 4):
        ids, is_target = encode_chat(tokenizer, CHAT[:upto])
        prompt = encode_prompt(tokenizer, CHAT[:upto])
        assert ids[: len(prompt)] == prompt
        assert is_target[len(prompt)] and not is_target[len(prompt) - 1]


def test_the_plain_template_makes_eos_a_target() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    ids, is_target = encode_chat(tokenizer, CHAT[:2])
    assert spans(tokenizer, ids, is_target) == ["below 100%<|im_end|>"]
    assert tokenizer.decode(ids).startswith("User: LCR 97.3%?\n\nAssistant: below 100%")


def test_eos_after_a_generation_block_is_a_target() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GENERATION.replace(
        "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"
    )
    ids, is_target = encode_chat(tokenizer, CHAT)
    assert spans(tokenizer, ids, is_target) == ["below 100%<|im_end|>", "above 3%<|im_end|>"]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_eos_is_appended_if_the_template_has_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    ids, is_target = encode_chat(tokenizer, CHAT[:2])
    assert ids[-1] == tokenizer.eos_token_id and is_target[-1]


def test_eos_is_a_target_even_if_it_is_also_the_pad_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, is_target = encode_chat(tokenizer, CHAT[:2])
    assert [i for i, flag in zip(ids, is_target, strict=True) if flag][-1] == tokenizer.eos_token_id


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        encode_chat(tokenizer, CHAT)


def test_a_document_ends_with_eos_and_all_of_its_tokens_are_targets() -> None:
    tokenizer = tiny_tokenizer()
    ids, is_target = encode_document(tokenizer, "The bank reports.")
    assert tokenizer.decode(ids) == "The bank reports.<|im_end|>" and all(is_target)


CONFIG = '{"tokenizer_class": "PreTrainedTokenizerFast"}'


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "it has no tokenizer.json; copy the tokenizer files of the model into it"),
        ({"tokenizer_config.json": CONFIG}, "it has no tokenizer.json; copy the tokenizer files of the model into it"),
        (
            {"tokenizer.json": '{"a"', "tokenizer_config.json": CONFIG},
            "tokenizer.json is damaged (Expecting ':' delimiter: line 1 column 5 (char 4)); copy the tokenizer files of the "
            "model into it again",
        ),
        ({"tokenizer.json": "{}"}, "; copy the tokenizer files of the model into it again"),
        (
            {"tokenizer.json": "{}", "tokenizer_config.json": "{"},
            "tokenizer_config.json is damaged (Expecting property",
        ),
    ],
)
def test_a_directory_without_a_usable_tokenizer(tmp_path, files, reason) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    sentence = str(error.value)
    assert sentence.startswith(f"cannot load a tokenizer from {tmp_path}: ") and reason in sentence
    assert "\n" not in sentence and "sentencepiece or tiktoken" not in sentence


def test_a_tokenizer_directory_that_is_none(tmp_path) -> None:
    with pytest.raises(
        UserError, match=f"cannot load a tokenizer from {tmp_path}/none: there is no such directory, nor"
    ):
        load_tokenizer(f"{tmp_path}/none")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="it is a file; name the directory of a model"):
        load_tokenizer(f"{tmp_path}/file")
