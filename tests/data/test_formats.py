"""Every form of examples becomes the canonical form, and a malformed example is one sentence."""

import json
import random

import pytest

from common.errors import UserError
from configs.load import EXAMPLE_FIELDS, FORMATS
from data.files import Reading
from data.formats import canonical_example, example_text

USER, ANSWER = {"role": "user", "content": "LCR?"}, {"role": "assistant", "content": "97.3%"}
CHAT = [USER, ANSWER]
ARGUMENTS = {"bank": "A", "year": None}
CALL = {"type": "function", "function": {"name": "lookup", "arguments": ARGUMENTS}}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]


def canonical(row: object, **reading) -> dict:
    return canonical_example(row, "f.jsonl, line 3", Reading(**reading))[1]


def message(value: dict) -> dict:
    return canonical({"messages": [USER, value]})["messages"][1]


@pytest.mark.parametrize(
    "form, row, expected",
    [
        ("messages", {"messages": CHAT}, {"messages": CHAT}),
        ("messages", {"messages": CHAT, "prompt": "LCR?", "text": "<|im_start|>"}, {"messages": CHAT}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "LCR?"}, {"from": "gpt", "value": "97.3%"}], "system": ""}, {"messages": CHAT}),
        (
            "alpaca",
            {"instruction": "Sum", "input": "1 2", "output": "3", "text": "Below is an instruction"},
            {"messages": [{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}]},
        ),
        (
            "alpaca",
            {"instruction": "c", "output": "d", "input": None, "system": "S", "history": [["LCR?", "97.3%"]]},
            {"messages": [{"role": "system", "content": "S"}, *CHAT, USER | {"content": "c"}, ANSWER | {"content": "d"}]},
        ),
        ("completion", {"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}),
        ("completion", {"prompt": [*CHAT, USER], "completion": [ANSWER]}, {"messages": [USER, ANSWER | {"weight": 0.0}, USER, ANSWER]}),
        ("completion", {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, {"messages": CHAT}),  # in a .csv file
        ("text", {"text": "Grüße", "messages": None}, {"text": "Grüße"}),
    ],
)  # fmt: skip
def test_each_form_is_detected_and_can_be_named(form, row, expected) -> None:
    for name in ("auto", form):
        assert canonical_example(row, "f", Reading(name)) == (form, expected)


def test_tools_weight_and_other_keys_of_an_example() -> None:
    rest = {"id": 7, "violations": ["v1"]}
    expected = {"messages": CHAT, "tools": TOOLS, "weight": 0.5} | rest
    assert canonical({"messages": CHAT, "tools": TOOLS, "weight": 0.5} | rest) == expected
    assert canonical({"messages": CHAT, "tools": json.dumps(TOOLS), "weight": "0.5"} | rest) == expected
    for nothing in ({"tools": [], "weight": 1}, {"tools": "[]", "weight": ""}, {"tools": None, "weight": None}):
        assert canonical({"messages": CHAT} | nothing) == {"messages": CHAT}
    assert canonical({"text": "a", "weight": 0}) == {"text": "a", "weight": 0.0}


@pytest.mark.parametrize(
    "original, expected",
    [
        ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
        ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, USER | {"content": "ab"}),
        (ANSWER | {"weight": 0}, ANSWER | {"weight": 0.0}),
        (ANSWER | {"train": False, "weight": 2}, ANSWER | {"weight": 0.0}),
        (USER | {"train": False, "weight": 0}, USER),
        (ANSWER | {"reasoning_content": "r", "thinking": "t"}, ANSWER | {"reasoning_content": "r", "thinking": "t"}),
        ({"role": "tool", "content": "a", "tool_call_id": "c1", "name": "lookup"}, {"role": "tool", "content": "a", "tool_call_id": "c1", "name": "lookup"}),
        # A tool call, in the notations that files use.
        ({"role": "assistant", "tool_calls": [{"id": "c1", **CALL}]}, {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]}),
        (
            ANSWER | {"tool_calls": [{"name": "lookup", "arguments": json.dumps(ARGUMENTS)}]},
            ANSWER | {"tool_calls": [CALL]},
        ),
        ({"from": "function_call", "value": json.dumps(CALL["function"])}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        (ANSWER | {"tool_calls": [], "function_call": CALL["function"]}, ANSWER | {"tool_calls": [CALL]}),
    ],
)  # fmt: skip
def test_each_message_has_one_canonical_form(original, expected) -> None:
    assert message(original) == expected


PAIR = {"chosen": CHAT, "rejected": [USER, {"role": "assistant", "content": "0"}]}  # as TRL writes preferences


@pytest.mark.parametrize(
    "row, setting, example",
    [
        (PAIR, {"fields": {"messages": "chosen"}}, {"messages": CHAT}),
        (PAIR | {"prompt": "LCR?"}, {"fields": {"messages": "chosen"}}, {"messages": CHAT}),
        (PAIR | {"prompt": "LCR?", "messages": CHAT}, {"fields": {"messages": "chosen"}}, {"messages": CHAT}),
        (PAIR | {"messages": CHAT}, {"format": "messages"}, {"messages": CHAT}),
        ({"chosen": json.dumps(CHAT), "rejected": json.dumps(CHAT)}, {"fields": {"messages": "chosen"}}, {"messages": CHAT}),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, {"fields": {"completion": "chosen"}}, {"messages": CHAT}),
        ({"prompt": "LCR?", "chosen": "97.3%", "rejected": "0"}, {"fields": {"instruction": "prompt", "output": "chosen"}}, {"messages": CHAT}),
        ({"prompt": "LCR?", "chosen": "97.3%", "rejected": "0"}, {"fields": {"completion": "chosen"}}, {"prompt": "LCR?", "completion": "97.3%"}),
        ({"chosen": "LCR? 97.3%", "rejected": "LCR? 0"}, {"fields": {"text": "chosen"}}, {"text": "LCR? 97.3%"}),
    ],
)  # fmt: skip
def test_preferences_name_the_setting_that_trains(row, setting, example) -> None:
    with pytest.raises(UserError, match=r"line 3 is a row of preferences \(`chosen`, `rejected`\)") as error:
        canonical(row)
    names = setting.get("fields", {})
    words = (
        "data.fields=" + ",".join(f"{ours}={theirs}" for ours, theirs in names.items())
        if names
        else "data.format=messages"
    )
    assert words in str(error.value)
    trained = canonical(row, **setting)
    assert {key: trained[key] for key in example} == example


@pytest.mark.parametrize(
    "row, name, expected",
    [
        (
            {"instruction": "LCR?", "completions": [{"response": "0", "overall_score": 3.0}, {"response": "97.3%", "overall_score": 8.5}]},
            "best",
            CHAT,
        ),
        ({"prompt": "LCR?", "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen", CHAT),
    ],
)  # fmt: skip
def test_printed_functions_convert_preferences(row, name, expected) -> None:
    with pytest.raises(UserError, match=f"data.row=MODULE:{name}") as error:
        canonical(row)
    namespace: dict = {}
    exec(str(error.value).split("`")[-2], namespace)
    assert canonical(namespace[name](row))["messages"] == expected


@pytest.mark.parametrize(
    "row, words",
    [
        (3, " is not an object with keys"),
        ({}, " has none of the forms .*: it has no keys"),
        ({"question": "q", "answer": "a"}, " has none of the forms .*: its keys are question, answer; .*data.fields=instruction=question,output=answer"),
        ({"\ud800\n": 1} | {str(i): 1 for i in range(30)}, r" has none of the forms .*: its keys are \\ud800\\n, 0, .*, 18 and 11 more;"),
        ({"text": "\ud800"}, " is not valid Unicode text: surrogates not allowed"),
        ({"text": "a", "weight": 1e-46}, ": `weight` must be 0 or a number from 1e-12 to 1e.12, not 1e-46"),
        ({"text": "a", "weight": True}, ": `weight` must be .*, not True"),
        ({"messages": [{"role": "robot", "content": "a"}]}, ": message 1 needs a `role` .*, not 'robot'; data.row can"),
        ({"messages": [{"from": "function", "value": "a"}]}, ": message 1: `from` is function, which may be a call"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ": message 2 needs a `content` that is a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, ": message 1 has a part of type 'image'"),
        ({"messages": [ANSWER | {"train": "no"}]}, ": message 1: `train` must be true or false, not 'no'"),
        ({"messages": [USER | {"train": True}]}, ": message 1: `train` is true, but only messages of the assistant"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, ": message 1 has `tool_calls`, but its role is user"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, ": message 1: a tool call must be"),
        (
            {"messages": [ANSWER | {"tool_calls": [{"name": "f", "arguments": '{"a":' * 101 + "1" + "}" * 101}]}]},
            ": message 1: `tool_calls` is nested more than 100 levels deep",
        ),
        ({"messages": CHAT, "tools": "[" * 100_000}, ": `tools` is text that is not JSON"),
        ({"messages": CHAT, "tools": [{"f": float("inf")}]}, ": `tools` has the value inf, which JSON does not have"),
        ({"messages": [{"role": "system", "content": "A"}], "system": "B"}, " has `system` and another system message"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, " has `tools`, which only chats can have"),
        ({"prompt": "a", "completion": CHAT}, ": `prompt` and `completion` must both be strings or both be lists"),
        ({"prompt": "a", "completion": "b", "label": True}, " has `label`, as data of preferences"),
        ({"prompt": "a", "completion": "b", "label": "False"}, " has `label`, as data of preferences"),  # as a .csv file has it
        ({"messages": CHAT, "label": False}, " has `label`, as data of preferences"),
        ({"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}, " has `chat_template_kwargs`, .* write them as data.chat_template_options"),
        ({"messages": [USER, ANSWER | {"spans": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]}, ": message 2 has `spans`"),
        ({"input_ids": [3, 4], "assistant_masks": [0, 1]}, ".* a `mask` here; write data.fields=mask=assistant_masks"),
        ({"input_ids": [3, 4], "completion_mask": [0, 1], "attention_mask": [1, 1]}, ".*; write data.fields=mask=completion_mask"),
        ({"prompt": str([USER]), "completion": str([ANSWER])}, ": `prompt` is text that is not JSON, but looks like Python"),
        ({"prompt": "a", "completion": None}, " has none of the forms .*: its keys are prompt, completion .null.;"),
        ({"prompt": "a", "completion": ""}, ": `completion` must be a non-empty string"),
        ({"instruction": " ", "output": "o"}, ": `instruction` is empty"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, ": `history` must be a list of pairs"),
        ({"input_ids": []}, ": `input_ids` must be at least one id"),
        ({"input_ids": [3, 4.5]}, ": `input_ids` must be a list of integers"),
        ({"input_ids": [3], "labels": [3, 4]}, ": `labels` has 2 items, but `input_ids` has 1"),
        ({"input_ids": [3, 4], "labels": [4, -100]}, ".* not shifted; item 1 is 4 beside the id 3"),
        ({"input_ids": [3, 4], "mask": [0, 1], "labels": [-100, 4]}, " has `labels` and `mask`"),
        ({"input_ids": [3], "attention_mask": [0]}, ": `attention_mask` is 0 everywhere"),
    ],
)  # fmt: skip
def test_a_malformed_example_is_one_sentence(row, words) -> None:
    with pytest.raises(UserError, match=f"^f.jsonl, line 3{words}") as error:
        canonical(row)
    assert str(error.value).isprintable()


def test_fields_rename_the_keys_of_examples_and_messages() -> None:
    dialogue = [{"speaker": "human", "utterance": "LCR?", "w": 3}, {"speaker": "bot", "utterance": "97.3%", "w": 0}]
    row = {"dialogue": dialogue, "messages": "the number of messages"}
    fields = {"messages": "dialogue", "role": "speaker", "content": "utterance", "weight": "w"}
    assert canonical(row, fields=fields) == {"messages": [USER, ANSWER | {"weight": 0.0}]}
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert canonical({"prompt": "a", "completion": "b"}, fields=swapped) == {"prompt": "b", "completion": "a"}
    with pytest.raises(UserError, match="has no `body`, which data.format=text needs; its keys are text"):
        canonical({"text": "a"}, format="text", fields={"text": "body"})
    with pytest.raises(UserError, match="has no `output`, which data.format=alpaca needs; its keys are instruction"):
        canonical({"instruction": "a"}, format="alpaca")


def test_nonsense_never_ends_in_a_traceback() -> None:
    """Random values in the places of known keys are either read or refused with a UserError."""
    chosen = random.Random(0)
    scraps = [
        None,
        "",
        "a",
        "{}",
        "[]",
        0,
        -1,
        2.5,
        True,
        [],
        {},
        [[]],
        [None],
        [{}],
        CALL,
        [CALL],
        CHAT,
        TOOLS,
        "\ud800",
    ]
    keys = ["role", "content", "from", "value", "tool_calls", "function_call", "name", "weight", "train", "x"]
    read = 0
    for _ in range(3_000):
        turn = {key: chosen.choice(scraps) for key in chosen.sample(keys, 3)}
        turn |= chosen.choice([{}, {"role": chosen.choice(["user", "assistant", "function_call", "tool"])}])
        row = {key: chosen.choice(scraps) for key in chosen.sample(EXAMPLE_FIELDS, 3)} | {"messages": [turn]}
        try:
            example = canonical(row, format=chosen.choice(FORMATS))
        except UserError:
            continue
        read += 1
        example_text(example).encode()
    assert read > 30


def test_the_text_of_an_example() -> None:
    assert example_text({"text": "a"}) == "a" and example_text({"prompt": "a", "completion": "b"}) == "ab"
    assert example_text(canonical({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, ANSWER]})) == (
        "LCR?\n\n97.3%"
    )


@pytest.mark.parametrize(
    "row, ids, mask",
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [1, 1, 1]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}, [5, 6, 7], [0, 1, 0]),
        ({"input_ids": [5, 6, 7], "mask": [False, True, True]}, [5, 6, 7], [0, 1, 1]),
        ({"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [0, 1, 1, 0]}, [5, 6], [1, 1]),
        ({"input_ids": "[5, 6]", "mask": "[0, 1]"}, [5, 6], [0, 1]),
    ],
)
def test_token_ids_are_taken_as_they_are(row, ids, mask) -> None:
    example = canonical(row | {"id": 3})
    assert example == {"input_ids": ids, "mask": mask, "id": 3}
    with pytest.raises(UserError, match="has token ids and no text"):
        example_text(example)


def test_trl_mask_is_read_if_named_in_fields() -> None:
    row = {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]}
    named = canonical_example(row | {"completion_mask": [0, 0, 1]}, "a", Reading(fields={"mask": "assistant_masks"}))
    assert named[1]["mask"] == [0, 1, 1]
    assert canonical(row | {"labels": [-100, -100, 7]})["mask"] == [0, 0, 1]
