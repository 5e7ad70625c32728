"""Chats of many template families: the ids are those of inference, and the targets are what the assistant said."""

import datetime
import re

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from data.chat_template import ChatSettings
from data.encoding import Encoded, ExampleEncoder
from data.tokens import plain_template
from tests.chat_families import FAMILIES, family_tokenizer

ASK = {"role": "user", "content": "What is the LCR of the bank?"}
SAY = {"role": "assistant", "content": "Yes: 97.3%, below the minimum."}
MORE = {"role": "user", "content": "And the own funds?"}
LAST = {"role": "assistant", "content": "none\nC 03.00 is missing"}
SYSTEM = {"role": "system", "content": "You are a supervisor of banks."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "ratio", "arguments": {"name": "LCR"}}}
    ],
}
RESULT = {"role": "tool", "content": "97.3", "tool_call_id": "call00001"}
TOOLS = [{"type": "function", "function": {"name": "ratio", "parameters": {"type": "object", "properties": {}}}}]
THOUGHT = {"role": "assistant", "content": "<think>\nThe minimum is 100%.\n</think>\n\nIt is too low."}
LONG = [
    message
    for i in range(9)
    for message in (
        {"role": "user", "content": f"Report {i}?"},
        {"role": "assistant", "content": f"e {i} % of the bank"},
    )
]
CASES = {
    "single": [ASK, SAY],
    "multi-turn": [ASK, SAY, MORE, LAST],
    "system": [SYSTEM, ASK, SAY],
    "system, multi-turn": [SYSTEM, ASK, SAY, MORE, LAST],
    "assistant first": [SAY, ASK, LAST],
    "tools": [ASK, CALL, RESULT, SAY],
    "system, tools": [SYSTEM, ASK, CALL, RESULT, SAY],
    "thinking": [ASK, THOUGHT, MORE, LAST],
    "ends with user": [ASK, SAY, MORE],
    "long": LONG,
}
TODAY = datetime.date.today().isoformat()
# Between an answer and the words that the assistant said, a template may write this.
FORMAT = re.compile(r"(<think>)?\s*(</think>)?\s*|<\|channel\|>final<\|message\|>")


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    tokenizer = family_tokenizer(family)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)
    return tokenizer


def inference_prompt(tokenizer, messages: list[dict], tools: list | None) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True)
    return list(ids["input_ids"] if hasattr(ids, "keys") else ids)


def trained_answers(sequences: tuple[Encoded, ...]) -> list[tuple[list[int], list[int]]]:
    """(ids before an answer, ids of the answer) of every span, in order."""
    return [(s.ids[:a].tolist(), s.ids[a:b].tolist()) for s in sequences for a, b, _ in s.spans]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_inference_and_targets_are_what_the_assistant_said(family, case) -> None:
    tokenizer, messages = tokenizer_of(family), CASES[case]
    tools = TOOLS if "tools" in case else None
    encoder = ExampleEncoder(tokenizer, ChatSettings(date=TODAY))
    outcome = encoder.encode([{"messages": messages} | ({"tools": tools} if tools else {})])[0]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if (family, case) in REFUSED:
        assert "the chat template" in outcome.error and not outcome.sequences
        if family not in RENDERS_WITHOUT_CALLS or "tools" not in case:
            with pytest.raises((TemplateError, TypeError)):
                tokenizer.apply_chat_template(messages[: turns[-1] + 1], tools=tools, tokenize=False)
        return
    assert outcome.error is None
    answers = trained_answers(outcome.sequences)
    assert len(answers) == len(turns)
    for i, (before, answer) in zip(turns, answers, strict=True):
        assert before == inference_prompt(tokenizer, messages[:i], tools)
        assert not set(answer[:-1]) & {*encoder.stop_ids}
        if (family, i) not in [(f, t) for f in WITHOUT_END for t in turns[:-1]]:
            assert answer[-1] in encoder.stop_ids or tokenizer.decode([answer[-1]]) in ("<|end|>", "<|call|>")
        check_words(tokenizer.decode(answer), encoder.markers.special, messages[i])
    assert ("split" in outcome.notes) == (len(outcome.sequences) > 1)
    if len(outcome.sequences) == 1 and "rebuilt" not in outcome.notes:
        whole = list(
            tokenizer.apply_chat_template(messages[: turns[-1] + 1], tools=tools, return_dict=True)["input_ids"]
        )
        ids = outcome.sequences[0].ids.tolist()
        assert whole[: len(ids) - 1] == ids[:-1]
        assert ids[-1] in (whole[len(ids) - 1 :] or [encoder.eos])[:1] or ids[-1] == encoder.eos


def check_words(text: str, special: tuple[str, ...], message: dict) -> None:
    """The answer consists of what the assistant said, white space, special tokens and an empty thinking block."""
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "")
    if message.get("tool_calls"):
        assert (
            "ratio" in text
            and "LCR" in text
            and not {"What is", "supervisor"} & {*re.findall("What is|supervisor", text)}
        )
        return
    said = message["content"].replace("<think>", "").strip()
    assert said in text
    rest = text.replace(said, "").replace("final", "")  # "final" is the name of a channel
    assert re.sub(r"\s|</?think>", "", rest) == ""


WITHOUT_END = ("olmo", "vicuna")  # no token ends an answer in the middle of a chat
RENDERS_WITHOUT_CALLS = ("smollm3", "gemma3", "command-r", "deepseek-v2", "phi3.5")  # they would leave the call out
WITHOUT_TOOLS = (
    "smollm2",
    "smollm3",
    "llama2",
    "mistral-v1",
    "phi3",
    "phi3.5",
    "gemma",
    "gemma3",
    "deepseek-v2",
    "zephyr",
    "olmo",
)
# What the templates themselves refuse: tool calls, roles that do not alternate, system messages.
REFUSED = {
    *((family, case) for family in (*WITHOUT_TOOLS, "vicuna", "command-r") for case in ("tools", "system, tools")),
    *((family, "assistant first") for family in ("llama2", "mistral-v1", "mistral-v3", "mistral-tekken", "gemma")),
    *((family, case) for family in ("mistral-v1", "gemma") for case in ("system", "system, multi-turn")),
}


def test_a_call_is_found_where_the_template_moves_the_system_message_or_drops_the_thinking() -> None:
    chat = {"messages": [SYSTEM, ASK, CALL, RESULT, SAY], "tools": TOOLS}
    for family, begins in (("mistral-v3", "[TOOL_CALLS]"), ("deepseek-r1", "<|call|>")):
        tokenizer = tokenizer_of(family)
        outcome = ExampleEncoder(tokenizer, ChatSettings(date=TODAY)).encode([chat])[0]
        answer = str(tokenizer.decode(trained_answers(outcome.sequences)[0][1]))
        assert answer.removeprefix("\n</think>\n\n").startswith(begins)


def test_what_a_template_leaves_out_of_an_answer_is_said() -> None:
    encoder = ExampleEncoder(tokenizer_of("gpt-oss"), ChatSettings(date=TODAY))
    twice = CALL | {"tool_calls": CALL["tool_calls"] * 2}
    assert "leaves out a tool call" in str(encoder.encode([{"messages": [ASK, twice]}])[0].error)
    encoder = ExampleEncoder(tokenizer_of("smollm2"))
    assert "thinking" in encoder.encode([{"messages": [ASK, SAY | {"reasoning_content": "a reason"}]}])[0].notes
