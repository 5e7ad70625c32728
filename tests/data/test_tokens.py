"""Loading a tokenizer; loss-carrying tokens of chats, texts and completions with the small ChatML tokenizer."""

import datetime
import itertools
import json

import numpy as np
import pytest

from common.errors import UserError
from data.chat_template import ChatSettings, ChatTemplate, writes_date
from data.encoding import ExampleEncoder, Span
from data.tokens import bos_ids, load_tokenizer, plain_template, tokenizer_fingerprint
from model.vocabulary import read_base_tokenizer
from tests.chat_families import family_tokenizer
from tests.tiny import encode_one, tiny_tokenizer

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


def spans(tokenizer, ids: list[int], is_target: list) -> list[str]:
    """Decode each run of consecutive target tokens."""
    runs = itertools.groupby(zip(ids, is_target, strict=True), lambda pair: bool(pair[1]))
    return [tokenizer.decode([token for token, _ in run]) for flag, run in runs if flag]


def targets(tokenizer, example: dict, **settings) -> list[list[str]]:
    """Return the texts of the targets of each sequence of an example."""
    outcome = ExampleEncoder(tokenizer, ChatSettings(**settings)).encode([example])[0]
    assert outcome.error is None, outcome.error
    return [spans(tokenizer, s.ids.tolist(), s.weights().tolist()) for s in outcome.sequences]


def notes(tokenizer, example: dict) -> tuple[str, ...]:
    return ExampleEncoder(tokenizer).encode([example])[0].notes


@pytest.mark.parametrize("template", [None, GENERATION])
def test_all_answers_and_their_eos_are_targets(template) -> None:
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    ids, is_target = encode_one(tokenizer, {"messages": CHAT})
    assert spans(tokenizer, ids, is_target) == ["below 100%<|im_end|>", "above 3%<|im_end|>"]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(ids) == whole.rstrip("\n")  # without the template's text after the last answer


def test_plain_template_leaves_space_to_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = plain_template(tokenizer)
    ids, is_target = encode_one(tokenizer, {"messages": CHAT[:2]})
    assert spans(tokenizer, ids, is_target) == [" below 100%<|im_end|>"]
    assert tokenizer.decode(ids) == "User: LCR 97.3%?\n\nAssistant: below 100%<|im_end|>"
    prompt = ExampleEncoder(tokenizer).prompt(CHAT[:2])
    assert tokenizer.decode(prompt) == "User: LCR 97.3%?\n\nAssistant:" and ids[: len(prompt)] == prompt


def test_the_plain_template_names_every_role() -> None:
    tokenizer = family_tokenizer("plain")  # adds BOS
    tokenizer.chat_template = plain_template(tokenizer)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "lcr", "arguments": {}}}]}
    chat = [{"role": "developer", "content": "Be brief."}, CHAT[0], call, {"role": "tool", "content": "97.3"}, CHAT[1]]
    tools = [{"type": "function", "function": {"name": "lcr"}}]
    text = ChatTemplate(tokenizer, ChatSettings()).render(chat, tools)
    assert text == (
        '<s>Tools: [{"type": "function", "function": {"name": "lcr"}}]\n\nBe brief.\n\nUser: LCR 97.3%?\n\n'
        'Assistant: [{"function": {"name": "lcr", "arguments": {}}}]</s>\n\nTool: 97.3\n\nAssistant: below 100%</s>\n\n'
    )
    assert targets(tokenizer, {"messages": chat, "tools": tools}) == [
        [' [{"function": {"name": "lcr", "arguments": {}}}]</s>', " below 100%</s>"]
    ]
    refused = ExampleEncoder(tokenizer).encode([{"messages": [{"role": "judge", "content": "x"}, *CHAT[:2]]}])[0]
    assert refused.error == "the chat template refuses this chat: unknown role judge"


def test_eos_after_a_generation_block_is_a_target() -> None:
    tokenizer, inside = tiny_tokenizer(), "+ '<|im_end|>' }}{% endgeneration %}"
    tokenizer.chat_template = GENERATION.replace(inside, "}}{% endgeneration %}<|im_end|>")
    ids, is_target = encode_one(tokenizer, {"messages": CHAT})
    assert spans(tokenizer, ids, is_target) == ["below 100%<|im_end|>", "above 3%<|im_end|>"]


def test_eos_is_appended_if_the_template_has_none() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    ids, is_target = encode_one(tokenizer, {"messages": CHAT[:2]})
    assert ids[-1] == tokenizer.eos_token_id and is_target[-1] and ids.count(tokenizer.eos_token_id) == 1


def test_document_is_between_bos_and_one_eos() -> None:
    """BOS and EOS that a text spells are encoded as their characters, unless they are allowed."""
    for tokenizer in (tiny_tokenizer(), family_tokenizer("mistral-v1")):
        bos, eos = bos_ids(tokenizer), tokenizer.eos_token
        assert bos == ([tokenizer.bos_token_id] if tokenizer.eos_token == "</s>" else [])
        for text in ("The bank reports.", f"The bank reports.{eos}"):
            outcome = ExampleEncoder(tokenizer).encode([{"text": text}])[0]
            (encoded,) = outcome.sequences
            ids, eos_id = encoded.ids.tolist(), tokenizer.eos_token_id
            assert ids[: len(bos)] == bos and ids[-1] == eos_id and ids.count(eos_id) == 1
            assert tokenizer.decode(ids[len(bos) : -1]) == text and encoded.spans == (Span(max(1, len(bos)), len(ids)),)
            assert outcome.notes == (("control",) if text.endswith(eos) else ())
        allowed = ExampleEncoder(tokenizer, ChatSettings(control_tokens="allow"))
        start = tokenizer.bos_token if bos else ""
        (encoded,) = allowed.encode([{"text": f"{start}The bank{eos}"}])[0].sequences
        assert encoded.ids.tolist() == [*tokenizer("The bank")["input_ids"], tokenizer.eos_token_id]


def test_a_completion_is_the_only_target() -> None:
    tokenizer = tiny_tokenizer()
    example = {"prompt": "The bank", "completion": " reports."}
    assert targets(tokenizer, example) == [[" reports.<|im_end|>"]]
    ids, _ = encode_one(tokenizer, example)
    assert tokenizer.decode(ids) == "The bank reports.<|im_end|>"


def test_weights_of_messages_and_examples_multiply() -> None:
    tokenizer = tiny_tokenizer()
    chat = [CHAT[0], CHAT[1] | {"weight": 0.5}, CHAT[2], CHAT[3]]
    (sequence,) = ExampleEncoder(tokenizer).encode([{"messages": chat, "weight": 3.0}])[0].sequences
    assert [span.weight for span in sequence.spans] == [1.5, 3.0]
    weights = sequence.weights()
    assert weights.dtype == np.float32 and set(weights.tolist()) == {0.0, 1.5, 3.0}
    chat[1] = CHAT[1] | {"weight": 0}
    assert targets(tokenizer, {"messages": chat}) == [["above 3%<|im_end|>"]]
    for example in ({"messages": [CHAT[0], chat[1]]}, {"text": "The bank", "weight": 0}):
        outcome = ExampleEncoder(tokenizer).encode([example])[0]
        assert outcome.sequences == () and outcome.notes == ("weightless",)


def test_only_the_last_answer() -> None:
    tokenizer = tiny_tokenizer()
    assert targets(tokenizer, {"messages": CHAT}, train_on="last") == [["above 3%<|im_end|>"]]
    silent = [*CHAT[:3], CHAT[3] | {"weight": 0}]
    assert targets(tokenizer, {"messages": silent}, train_on="last") == []


@pytest.mark.parametrize("content", ["e", ">", "|", "n", "im_end", "", "  e  ", "a <|im_end|> e"])
def test_answer_that_resembles_a_turns_end(content) -> None:
    tokenizer = tiny_tokenizer()
    chat = [CHAT[0], CHAT[1] | {"content": content}]
    assert targets(tokenizer, {"messages": chat}) == [[content + "<|im_end|>"]]
    tokenizer = family_tokenizer("phi3")  # the template writes <|end|>, a newline and <|endoftext|>
    (answer,) = targets(tokenizer, {"messages": chat})[0]
    assert answer.replace(" ", "") == content.replace(" ", "") + "<|end|>"


def test_unusual_examples_are_noted() -> None:
    tokenizer = tiny_tokenizer()
    for messages, note in (
        (CHAT, ()),
        (CHAT[:3], ("trailing",)),
        (CHAT[1:], ("opening",)),
        (CHAT[:1], ("unanswered",)),
    ):
        assert notes(tokenizer, {"messages": messages}) == note
    assert notes(tokenizer, {"messages": [{"role": "developer", "content": "x"}, *CHAT]}) == ("developer",)
    assert notes(tokenizer, {"messages": CHAT, "tools": [{"type": "function"}]}) == ("tools",)
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert notes(tokenizer, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}) == ("left out",)
    # The prompt ends in a space, which a joint encoding would put into the first token of the answer.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = {"messages": [CHAT[0], CHAT[1] | {"content": "the bank"}]}
    assert notes(tokenizer, chat) == () and targets(tokenizer, chat) == [["the bank<|im_end|>"]]
    completion = {"prompt": "assistant: ", "completion": "the bank"}
    assert notes(tokenizer, completion) == ("boundary",)
    assert targets(tokenizer, completion) == [[" the bank<|im_end|>"]]  # that token belongs to the completion


def test_an_error_of_the_template_is_one_sentence() -> None:
    tokenizer = tiny_tokenizer()
    chat = {"messages": CHAT}
    for template, error in (
        ("{{ raise_exception('no\nroles') }}", "the chat template refuses this chat: no roles"),
        ("{{ messages[9].content.x }}", "the chat template refuses this chat: list object has no element 9"),
        ("{{ 1 / 0 }}", "the chat template cannot render this chat (ZeroDivisionError: division by zero)"),
        ("{{ 'a' + 1 }}", "the chat template cannot render this chat (TypeError: can only concatenate str"),
        ("{% if %}", "the chat template has a mistake in its line 1: Expected an expression"),
    ):
        tokenizer.chat_template = template
        outcome = ExampleEncoder(tokenizer).encode([chat])[0]
        assert outcome.error.startswith(error) and "\n" not in outcome.error


def test_fingerprint_depends_on_ids_alone(tmp_path) -> None:
    digest = tokenizer_fingerprint(tiny_tokenizer())
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=4)  # this setting stays in the backend
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"]
    assert tokenizer_fingerprint(tokenizer) == digest
    tokenizer.add_tokens(["C 03.00"])
    assert len({digest, tokenizer_fingerprint(tiny_tokenizer(300)), tokenizer_fingerprint(tokenizer)}) == 3


def test_set_date_is_written() -> None:
    tokenizer = family_tokenizer("llama3")
    assert writes_date(tokenizer) and not writes_date(tiny_tokenizer())
    text = ChatTemplate(tokenizer, ChatSettings(date="2024-07-06")).render(CHAT)
    assert "Today: 06 Jul 2024\n" in text
    first, second = (ExampleEncoder(tokenizer, ChatSettings(date=date)) for date in ("2024-07-06", "2024-07-07"))
    assert first.fingerprint() != second.fingerprint()
    plain = (ExampleEncoder(tiny_tokenizer(), ChatSettings(date=date)) for date in ("2024-07-06", "2024-07-07"))
    assert len({str(encoder.fingerprint()) for encoder in plain}) == 1


@pytest.mark.parametrize("space", ["", "\n", "  ", "\n  "])
@pytest.mark.parametrize("tag", ["{%- set", "{% set", "{%+ set"])
def test_fixed_date_changes_only_the_date(space, tag) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{space}{tag} day = strftime_now('%A %-d %B %y, %j') %}}\n  {{{{ day }}}}\nend"
    today = ChatTemplate(tokenizer, ChatSettings(date=datetime.date.today().isoformat())).render(CHAT)
    assert today == ChatTemplate(tokenizer, ChatSettings()).render(CHAT) and "end" in today


CONFIG = '{"tokenizer_class": "PreTrainedTokenizerFast"}'


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer_config.json": CONFIG}, "it has no tokenizer.json; copy the tokenizer files of the model into it"),
        ({"adapter_config.json": "{}"}, "it has no tokenizer.json; scripts/export.py RUN writes the adapter"),
        (
            {"tokenizer.json": '{"a"', "tokenizer_config.json": CONFIG},
            "tokenizer.json is damaged (Expecting ':' delimiter: line 1 column 5 (char 4)); copy the tokenizer files of the "
            "model into it again",
        ),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "tokenizer_config.json is damaged (Expecting property"),
        ({"tokenizer.json": "[" * 10**5}, "tokenizer.json is damaged (maximum recursion depth exceeded"),
    ],
)  # fmt: skip
def test_a_directory_without_a_usable_tokenizer(tmp_path, files, reason) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(str(tmp_path))
    sentence = str(error.value)
    assert sentence.startswith(f"cannot load a tokenizer from {tmp_path}: ") and reason in sentence
    assert "\n" not in sentence and "sentencepiece or tiktoken" not in sentence


@pytest.mark.parametrize("read", [load_tokenizer, read_base_tokenizer])
def test_text_is_split_as_tokenizer_json_says(tmp_path, read) -> None:
    """SmolLM2 and StarCoder2 name GPT2Tokenizer, which transformers builds without the single digits of their files."""
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}')
    tokenizer = read(str(tmp_path))
    split = getattr(tokenizer, "backend_tokenizer", tokenizer).pre_tokenizer.pre_tokenize_str("LCR\n\n97")
    assert [piece for piece, _ in split] == ["LCR", "ĊĊ", "9", "7"]  # and not Ċ, Ċ, 97


def test_template_file_replaces_the_template(tmp_path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text("\ufeff{{ messages[0].content }}", encoding="utf-8")  # as Windows writes it
    loaded = load_tokenizer(str(tmp_path / "model"), str(tmp_path / "chat.jinja"))
    assert loaded.chat_template == "{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"data.chat_template: .*none.jinja cannot be read"):
        load_tokenizer(str(tmp_path / "model"), str(tmp_path / "none.jinja"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    tokenizer.save_pretrained(tmp_path / "named")
    with pytest.raises(UserError, match=r"several chat templates and no default one \(rag, tool_use\)"):
        load_tokenizer(str(tmp_path / "named"))
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(tmp_path / "with_default")
    template = ChatTemplate(load_tokenizer(str(tmp_path / "with_default")), ChatSettings())
    assert (template.render(CHAT), template.render(CHAT, [])) == ("1", "2")


def test_token_ids_train_by_their_mask() -> None:
    encoder = ExampleEncoder(tiny_tokenizer())
    ready = {"input_ids": [5, 6, 7, 8, 9], "mask": [1, 1, 0, 1, 1], "weight": 0.5}
    text, (outcome,) = {"text": "a"}, encoder.encode([ready])
    (sequence,) = outcome.sequences
    assert sequence.ids.tolist() == [5, 6, 7, 8, 9] and sequence.spans == (Span(1, 2, 0.5), Span(3, 5, 0.5))
    mixed = encoder.encode([text, ready, {"messages": CHAT}, text])
    assert [len(outcome.sequences) for outcome in mixed] == [1, 1, 1, 1]
    assert mixed[1].sequences[0].spans == sequence.spans
    assert mixed[3].sequences[0].ids.tolist() == encoder.encode([text])[0].sequences[0].ids.tolist()
    (bad,) = encoder.encode([{"input_ids": [5, 10_000], "mask": [1, 1]}])
    assert bad.error == f"it has the token id 10000, but the tokenizer has {len(tiny_tokenizer())} tokens"
    (untrained,) = encoder.encode([{"input_ids": [5, 6], "mask": [1, 0]}])  # the first token has no context
    assert untrained.sequences[0].spans == ()
