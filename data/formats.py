"""The forms that examples have in files, and the one form that the rest of the code knows.

A canonical example has either `messages` (data/messages.py), or `text`, or `prompt` and `completion` as texts, or
`input_ids` with a `mask` that says which of them carry loss. It may have `tools` and a `weight` other than 1. Keys that no
form has, such as `id`, are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from common.errors import UserError
from configs.load import EXAMPLE_FIELDS, MESSAGE_FIELDS
from data.messages import (
    canonical_messages,
    canonical_tools,
    canonical_weight,
    parse_json_text,
    renamed,
    short_list,
    text_message,
)

# Form -> keys that it needs. If an example fits several, the first one counts.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "tokens": ("input_ids",),
}
# Form -> keys that it may have.
OPTIONAL = {
    "messages": ("system", "tools", "weight"),
    "sharegpt": ("system", "tools", "weight"),
    "alpaca": ("input", "system", "history", "tools", "weight"),
    "completion": ("tools", "weight"),
    "text": ("weight",),
    "tokens": ("labels", "mask", "attention_mask", "weight"),
}
OF_TOKENS = ("labels", "mask", "attention_mask")  # keys that mean something else, or nothing, in other forms


@dataclass(frozen=True)
class Reading:
    """How files are read: the settings of data with these names."""

    format: str = "auto"
    fields: dict[str, str] = field(default_factory=dict)  # our name -> the name in the file
    on_bad: str = "error"
    split_by: str | None = None  # a key that no form has
    row: str | None = None  # MODULE:FUNCTION, which makes an example of a row
    max_samples: int | None = None  # rows read of all files together
    code: str = ""  # digest of the code of `row`, by which a cache knows that it has changed

    @cached_property
    def example_names(self) -> dict[str, str]:
        """The part of `fields` that is about the keys of examples."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in EXAMPLE_FIELDS}

    @cached_property
    def message_names(self) -> dict[str, str]:
        """The part of `fields` that is about the keys of messages."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in MESSAGE_FIELDS}

    @cached_property
    def columns(self) -> frozenset[str] | None:
        """The names in the file of all keys that any form or the split uses; None if `row` may use any."""
        of_split = [self.split_by] if self.split_by else []
        return None if self.row else frozenset([*map(self.name_of, EXAMPLE_FIELDS), *of_split])

    def name_of(self, key: str) -> str:
        """The name in the file of a key of an example."""
        return self.example_names.get(key) or key


DEFAULT = Reading()


def canonical_example(row: object, where: str, reading: Reading = DEFAULT) -> tuple[str, dict]:
    """(form, canonical example) of a row. Raises UserError that begins with `where`."""
    if not isinstance(row, dict):
        hint = "; the name of a file with one array must end in .json" if isinstance(row, list) else ""
        raise UserError(f"{where} is not an object with keys such as `messages` or `text`{hint}")
    keys = list(row)
    row = {key: value for key, value in renamed(row, reading.example_names).items() if value is not None}
    form = _form(row, keys, where, reading)
    names = reading.message_names
    example = _BUILDERS[form](row, where, names)
    if (tools := row.get("tools")) and form not in ("text", "tokens") and (tools := canonical_tools(tools, where)):
        if "messages" not in example:
            raise UserError(f"{where} has `tools`, which only chats can have")
        example["tools"] = tools
    if row.get("weight", "") != "" and (weight := canonical_weight(row["weight"], where)) != 1:
        example["weight"] = weight
    used = EXAMPLE_FIELDS if form == "tokens" else [key for key in EXAMPLE_FIELDS if key not in OF_TOKENS]
    return form, example | {key: value for key, value in row.items() if key not in used}


def describe(form: str, row: dict, reading: Reading = DEFAULT) -> tuple[list[str], list[str]]:
    """(keys of the row that are used, keys that are not), by their names in the file.

    Keys of messages that are not used are named like `messages.id`.
    """
    names = {key: reading.name_of(key) for key in (*REQUIRED[form], *OPTIONAL[form])}
    used = [theirs for theirs in names.values() if row.get(theirs) is not None]
    used_anyway = {*names.values(), reading.split_by}
    ignored = [key for key, value in row.items() if value is not None and key not in used_anyway]
    known = {reading.message_names.get(key, key) for key in MESSAGE_FIELDS}
    for key in used:
        for message in row[key] if isinstance(row[key], list) and key != names.get("tools") else []:
            if isinstance(message, dict):
                ignored += [
                    f"{key}.{name}" for name, value in message.items() if value is not None and name not in known
                ]
    return used, list(dict.fromkeys(ignored))


def foreign_keys(form: str, row: dict, reading: Reading = DEFAULT) -> list[str]:
    """The keys of a row that belong to forms other than its own, by their names in the file."""
    own = {*REQUIRED[form], *OPTIONAL[form], *OF_TOKENS}
    foreign = {reading.name_of(key) for key in EXAMPLE_FIELDS if key not in own}
    return [key for key, value in row.items() if value is not None and key in foreign]


def kind_of(example: dict) -> str:
    """What a canonical example is, for messages: a document, a chat, or a prompt with a completion."""
    kinds = {"text": "a document", "messages": "a chat", "input_ids": "already tokenised"}
    return next((kind for key, kind in kinds.items() if key in example), "a prompt with a completion")


def example_text(example: dict) -> str:
    """All text of a canonical example: the document, the prompt with its completion, or the messages of a chat.

    Raises UserError for token ids, which have none.
    """
    if "input_ids" in example:
        raise UserError("an example has token ids and no text; name files with text")
    if "text" in example:
        return example["text"]
    if "messages" not in example:
        return example["prompt"] + example["completion"]
    return "\n\n".join(message["content"] for message in example["messages"] if message["content"] is not None)


def _form(row: dict, keys: list, where: str, reading: Reading) -> str:
    """The form of a row: the one that is named, or the first that it has all keys of."""
    found = f"its keys are {short_list(keys)}" if keys else "it has no keys"
    if reading.format != "auto":
        for key in REQUIRED[reading.format]:
            if key not in row:
                raise UserError(
                    f"{where} has no `{reading.name_of(key)}`, which data.format={reading.format} needs; {found}"
                )
        return reading.format
    for form, needed in REQUIRED.items():
        if all(key in row for key in needed):
            return form
    named = ", ".join(f"{ours}={theirs}" for ours, theirs in reading.example_names.items())
    hint = (
        f"it was read with fields {named}, which hold for the training and validation files of a source alike"
        if named
        else "data.fields can name them"
    )
    raise UserError(f"{where} has none of the forms {', '.join(REQUIRED)} (docs/data.md): {found}; {hint}")


def _chat(key: str, row: dict, where: str, names: Mapping[str, str]) -> dict:
    return {"messages": _with_system(row, canonical_messages(row[key], where, key, names), where)}


def _alpaca(row: dict, where: str, names: Mapping[str, str]) -> dict:
    """The input stands below the instruction, after an empty line. `history`: earlier (instruction, output) pairs."""
    messages = []
    history = parse_json_text(row.get("history") or [], where, "history")
    for turn in history if isinstance(history, list) else [None]:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"{where}: `history` must be a list of pairs of an instruction and its output")
        messages += [text_message(role, text, where, "history") for role, text in zip(TURN, turn, strict=True)]
    parts = [text_message("user", row.get(key, ""), where, key)["content"] for key in ("instruction", "input")]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise UserError(f"{where}: `instruction` is empty")
    messages += [{"role": "user", "content": question}, text_message("assistant", row["output"], where, "output")]
    return {"messages": _with_system(row, messages, where)}


def _completion(row: dict, where: str, names: Mapping[str, str]) -> dict:
    """Texts stay texts. Messages become one chat in which only the completion carries loss."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise UserError(f"{where}: `completion` must be a non-empty string")
        return {key: text_message("", row[key], where, key)["content"] for key in REQUIRED["completion"]}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise UserError(f"{where}: `prompt` and `completion` must both be strings or both be lists of messages")
    earlier = canonical_messages(prompt, where, "prompt", names)
    earlier = [message | {"weight": 0.0} if message["role"] == "assistant" else message for message in earlier]
    return {"messages": earlier + canonical_messages(completion, where, "completion", names)}


def _document(row: dict, where: str, names: Mapping[str, str]) -> dict:
    if not isinstance(row["text"], str) or not row["text"]:
        raise UserError(f"{where}: `text` must be a non-empty string")
    return {"text": text_message("", row["text"], where, "text")["content"]}


def _tokens(row: dict, where: str, names: Mapping[str, str]) -> dict:
    """Ids as they are, without those that `attention_mask` calls padding. `labels` are the ids, or -100 for no loss."""
    found: dict[str, Any] = {
        key: parse_json_text(row[key], where, key) for key in ("input_ids", *OF_TOKENS) if key in row
    }
    ids = found["input_ids"]
    for key, values in found.items():
        if not isinstance(values, list) or not all(type(value) is int or value in (True, False) for value in values):
            raise UserError(f"{where}: `{key}` must be a list of integers")
        if len(values) != len(ids):
            raise UserError(f"{where}: `{key}` has {len(values)} items, but `input_ids` has {len(ids)}")
        if key in ("mask", "attention_mask") and not set(values) <= {0, 1}:
            raise UserError(f"{where}: `{key}` must have only 0 and 1")
    if not ids or min(ids) < 0:
        raise UserError(f"{where}: `input_ids` must be at least one id, and none below 0")
    if "labels" in found and "mask" in found:
        raise UserError(f"{where} has `labels` and `mask`; remove one of them")
    labels, mask = found.get("labels"), found.get("mask") or [1] * len(ids)
    if labels is not None:
        wrong = next((i for i, (a, b) in enumerate(zip(labels, ids, strict=True)) if a not in (b, -100)), None)
        if wrong is not None:
            raise UserError(
                f"{where}: `labels` must have -100 or the id at the same place, not shifted; item {wrong + 1} is "
                f"{labels[wrong]} beside the id {ids[wrong]}"
            )
        mask = [int(label != -100) for label in labels]
    kept = found.get("attention_mask") or [1] * len(ids)
    pairs = [(int(i), int(m)) for i, m, is_kept in zip(ids, mask, kept, strict=True) if is_kept]
    if not pairs:
        raise UserError(f"{where}: `attention_mask` is 0 everywhere")
    return {"input_ids": [i for i, _ in pairs], "mask": [m for _, m in pairs]}


def _with_system(row: dict, messages: list[dict], where: str) -> list[dict]:
    """The messages after the example's own `system` text, if it has one."""
    if not row.get("system"):
        return messages
    system = text_message("system", row["system"], where, "system")
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0]["content"] != system["content"]:
        raise UserError(f"{where} has `system` and another system message; remove one of them")
    return messages


TURN = ("user", "assistant")
_BUILDERS = {
    "messages": lambda *args: _chat("messages", *args),
    "sharegpt": lambda *args: _chat("conversations", *args),
    "alpaca": _alpaca,
    "completion": _completion,
    "text": _document,
    "tokens": _tokens,
}
