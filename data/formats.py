"""The forms that examples have in files, and the one form that the rest of the code knows.

A canonical example has either `messages` (data/messages.py), or `text`, or `prompt` and `completion` as texts. It may
have `tools` and a `weight` other than 1. Keys that no form has, such as `id`, are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

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
}
# Form -> keys that it may have.
OPTIONAL = {
    "messages": ("system", "tools", "weight"),
    "sharegpt": ("system", "tools", "weight"),
    "alpaca": ("input", "system", "history", "tools", "weight"),
    "completion": ("tools", "weight"),
    "text": ("weight",),
}


@dataclass(frozen=True)
class Reading:
    """How files are read: the settings data.format, data.fields, data.on_bad and data.split_by."""

    format: str = "auto"
    fields: dict[str, str] = field(default_factory=dict)  # our name -> the name in the file
    on_bad: str = "error"
    split_by: str | None = None  # a key that no form has

    @cached_property
    def example_names(self) -> dict[str, str]:
        """The part of `fields` that is about the keys of examples."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in EXAMPLE_FIELDS}

    @cached_property
    def message_names(self) -> dict[str, str]:
        """The part of `fields` that is about the keys of messages."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in MESSAGE_FIELDS}

    @cached_property
    def columns(self) -> frozenset[str]:
        """The names in the file of all keys that any form uses."""
        return frozenset(self.name_of(key) for key in EXAMPLE_FIELDS)

    @property
    def read(self) -> frozenset[str]:
        """The columns that are read of .parquet and .arrow files."""
        return self.columns | ({self.split_by} if self.split_by else set())

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
    if (tools := row.get("tools")) and form != "text" and (tools := canonical_tools(tools, where)):
        if "messages" not in example:
            raise UserError(f"{where} has `tools`, which only chats can have")
        example["tools"] = tools
    if row.get("weight", "") != "" and (weight := canonical_weight(row["weight"], where)) != 1:
        example["weight"] = weight
    return form, example | {key: value for key, value in row.items() if key not in EXAMPLE_FIELDS}


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
    own = {reading.name_of(key) for key in (*REQUIRED[form], *OPTIONAL[form])}
    return [key for key, value in row.items() if value is not None and key in reading.columns and key not in own]


def kind_of(example: dict) -> str:
    """What a canonical example is, for messages: a document, a chat, or a prompt with a completion."""
    return "a document" if "text" in example else "a chat" if "messages" in example else "a prompt with a completion"


def example_text(example: dict) -> str:
    """All text of a canonical example: the document, the prompt with its completion, or the messages of a chat."""
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
}
