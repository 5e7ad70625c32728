"""Convert the messages of a chat from the files' forms to one canonical form.

A canonical message has a `role` of ROLES and `content`, a string; it is None only for an assistant's message with
`tool_calls`. It may have `tool_calls` (arguments as an object), `tool_call_id`, `name`, `reasoning_content` and
`thinking`, and an assistant's message a `weight` other than 1. All other keys are dropped.
"""

import json
import math
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from common.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# Other names of these roles. `function` is the OpenAI API's old name of a tool's answer, `ipython` is Llama 3's.
ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
# The beginning of a list of messages, as JSON or as Python writes it.
MESSAGE_LIST = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")
PLAIN = {"role", "content"}
CALLS = ("function_call", "tool_call")  # roles whose text is a tool call, or a list of calls, as JSON
TEXT_KEYS = ("tool_call_id", "name", "reasoning_content", "thinking")
LEAST_WEIGHT, MOST_WEIGHT = 1e-12, 1e12  # products with another weight and a loss must be normal fp32 numbers
MAX_NAMES = 20  # names listed in a message
MAX_DEPTH = 100  # of tools and arguments; Python's own limit depends on the caller


def canonical_messages(value: object, where: str, key: str, names: Mapping[str, str]) -> list[dict]:
    """Return the canonical form of a list of messages or of its JSON text.

    key: the list's key in the example. names: our name -> the file's name. Raise UserError with `where`.
    """
    messages = parse_json_text(value, where, key)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `{key}` must be a non-empty list of messages")
    return [_canonical_message(message, where, number, names) for number, message in enumerate(messages, 1)]


def text_message(role: str, content: object, where: str, key: str) -> dict:
    """Return a message with the text that the example has under `key`."""
    if not isinstance(content, str):
        raise UserError(f"{where}: `{key}` must be a string")
    return {"role": role, "content": check_unicode(content, where)}


def canonical_weight(value: object, where: str) -> float:
    """Return a weight as a number. Raise UserError unless it is 0 or a number that fp32 holds in full precision."""
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (weight == 0 or LEAST_WEIGHT <= weight <= MOST_WEIGHT):
        raise UserError(
            f"{where}: `weight` must be 0 or a number from {LEAST_WEIGHT} to {MOST_WEIGHT:g}, not {short(value)}"
        )
    return weight


def canonical_tools(value: object, where: str) -> list[dict]:
    """Return the tools of an example: a list of objects, or its JSON text."""
    tools = parse_json_text(value, where, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: `tools` must be a list of objects, or one as JSON text")
    return _check_json(tools, where, "tools")


def parse_json_text(value: object, where: str, key: str) -> object:
    """Parse a string as JSON, as in a cell of a CSV file; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        hint = ", but looks like Python's own notation; write it with json.dumps" if "{'" in value[:9] else ""
        raise UserError(f"{where}: `{key}` is text that is not JSON{hint}") from error


def check_unicode(text: str, where: str) -> str:
    """Return `text`. Raise UserError for lone surrogates, which JSON can contain but no tokenizer accepts."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid Unicode text: {error.reason}") from error
    return text


def renamed(record: dict, names: Mapping[str, str]) -> dict:
    """Return a record with our names of its keys. names: our name -> the file's name.

    A key of the file that has one of our names by coincidence is left out.
    """
    if not names:
        return record
    theirs = set(names.values())
    kept = {key: value for key, value in record.items() if key not in names and key not in theirs}
    return kept | {ours: record[name] for ours, name in names.items() if name in record}


def _canonical_message(message: object, where: str, number: int, names: Mapping[str, str]) -> dict:
    if isinstance(message, dict) and message.keys() == PLAIN and not names:
        role, content = message["role"], message["content"]
        if role in ROLES and isinstance(content, str):  # already canonical, like most messages
            check_unicode(content, where)
            return message
    this = f"{where}: message {number}"
    if not isinstance(message, dict):
        raise UserError(f"{this} is not an object")
    message = {key: value for key, value in renamed(message, names).items() if value is not None}
    if spans := [key for key, value in message.items() if _is_mask_within(value)]:
        raise UserError(
            f"{this} has `{spans[0]}`, which marks the characters that carry loss (axolotl's message_field_training_detail); "
            "only whole messages can be marked here, so give `input_ids` with a `mask` instead of messages"
        )
    role_name = message.get("role", message.get("from"))
    role = ROLE_NAMES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        roles = ", ".join(ROLES)
        raise UserError(f"{this} needs a `role` that is one of {roles}, not {short(role_name)}; data.row can change it")
    if role_name == "function" and "role" not in message:
        raise UserError(f"{this}: `from` is function, which may be a call or its answer; say function_call or tool")
    content = message.get("content", message.get("value"))
    if role_name in CALLS:
        content, calls = None, parse_json_text(content, this, role_name)
    else:
        calls = message.get("tool_calls") or message.get("function_call")
    result = {"role": role, "content": _text_of(content, where, this)}
    if calls := _canonical_calls(calls, this):
        if role != "assistant":
            raise UserError(f"{this} has `tool_calls`, but its role is {role}, not assistant")
        result["tool_calls"] = calls
    elif content is None:
        raise UserError(f"{this} needs a `content` that is a string")
    for key in TEXT_KEYS:
        if key in message:
            if not isinstance(message[key], str):
                raise UserError(f"{this}: `{key}` must be a string")
            result[key] = check_unicode(message[key], where)
    weight = _weight_of(message, role, this)
    return result if weight == 1 else result | {"weight": weight}


def _is_mask_within(value: object) -> bool:
    """Return whether a value of a message marks a part of its text, as in axolotl's data."""
    return isinstance(value, list) and any(isinstance(part, dict) and "begin_offset" in part for part in value)


def _text_of(content: object, where: str, this: str) -> str | None:
    """Return the text of a message's content: a string, or a list of text parts, joined without a separator."""
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f"{this} has a part of type {short(kind)} in its `content`; only text can be trained on"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise UserError(f"{this} needs a `content` that is a string")
    return content if content is None else check_unicode(content, where)


def _canonical_calls(calls: object, this: str) -> list[dict]:
    """Return tool calls as templates expect them: a list of {"type", "function": {"name", "arguments"}}, perhaps with "id"."""
    calls = parse_json_text(calls, this, "tool_calls") if calls else []
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{this}: a tool call must be an object with the `name` of a function and `arguments`")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _as_object(arguments)
        canonical = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            canonical = {"id": call["id"]} | canonical
        result.append(_check_json(canonical, this, "tool_calls"))
    return result


def _as_object(text: str) -> object:
    """Parse a call's arguments to an object, as templates expect. Return text that is no JSON object unchanged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _weight_of(message: dict, role: str, this: str) -> float:
    """Return the weight of a message's loss, 1 by default. Only an assistant's message can carry loss."""
    weight = canonical_weight(message["weight"], this) if "weight" in message else 1.0
    for key in ("train", "training"):
        if key not in message:
            continue
        if message[key] not in (True, False):
            raise UserError(f"{this}: `{key}` must be true or false, not {short(message[key])}")
        if message[key] and role != "assistant":
            raise UserError(
                f"{this}: `{key}` is true, but only messages of the assistant can carry loss, not of {role}"
            )
        weight = weight if message[key] else 0.0
    return weight if role == "assistant" else 1.0


def _check_json(value: Any, where: str, key: str) -> Any:
    """Return `value`. Raise UserError unless it is plain JSON that any template can write."""
    stack: list[tuple[object, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: `{key}` is nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, str):
            check_unicode(item, where)
        elif isinstance(item, dict):
            stack.extend((child, depth + 1) for pair in item.items() for child in pair)
        elif isinstance(item, list):
            stack.extend((child, depth + 1) for child in item)
        elif not (item is None or isinstance(item, int) or (isinstance(item, float) and math.isfinite(item))):
            raise UserError(f"{where}: `{key}` has the value {short(item)}, which JSON does not have")
    return value


def short(value: object) -> str:
    """Return a value for an error message: printable and of limited length."""
    return printable(reprlib.repr(value))


def short_list(names: Collection[object]) -> str:
    """Return names for an error message: printable, and at most MAX_NAMES of them."""
    shown = [name if isinstance(name, str) and len(name) < 80 else reprlib.repr(name) for name in names][:MAX_NAMES]
    return printable(", ".join(shown)) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def printable(text: str) -> str:
    """Return the text in one line that any terminal can show."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
