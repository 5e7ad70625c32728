"""The items of a JSON array one by one, without the whole file in memory; also JSON values that simply follow another."""

import json
import re
from collections.abc import Iterator

from common.errors import UserError

PART = 1 << 20  # characters that are read ahead
NOT_SPACE = re.compile(r"[^ \t\n\r]")
# An error so many characters before the end of what has been read is a mistake in the file. A later one may only mean
# that the rest of a value has not been read yet.
CERTAIN = 16


def explain_json_error(error: Exception) -> str:
    """The reason why `json` could not read a value, for an error message."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "it has a number with more than 4,300 digits" if "digits" in str(error) else str(error)


def read_json_values(parts: Iterator[str], name: str) -> Iterator[object]:
    """Yield the items of one array, or the values of a file that does not begin with `[`.

    parts: the text. Memory is that of the largest value. Raises UserError with `name` and the line for invalid JSON; the
    items after it are not found.
    """
    text = _Text(parts, name)
    in_array = text.next_character() == "["
    if in_array:
        text.skip()
        if text.next_character() == "]":
            return
    while in_array or text.next_character():
        yield text.value()
        if not in_array:
            continue
        end = text.next_character()
        if end not in (",", "]"):
            raise text.error("the array is cut off" if not end else "Expecting ',' or ']' after an item of the array")
        text.skip()
        if end == "]":
            if text.next_character():
                raise text.error("there is more after the end of the array")
            return


class _Text:
    """What has been read but not used yet of a text that comes in parts."""

    def __init__(self, parts: Iterator[str], name: str) -> None:
        self.parts, self.name = parts, name
        self.text, self.start = "", 0  # the next value begins at text[start]
        self.lines = 1  # number of the line in which `text` begins

    def skip(self) -> None:
        """Skip one character."""
        self.start += 1

    def next_character(self) -> str:
        """Skip white space; return the character after it, or an empty string at the end."""
        while True:
            if not_space := NOT_SPACE.search(self.text, self.start):
                self.start = not_space.start()
                return not_space[0]
            self.start = len(self.text)
            if not self.read_more():
                return ""

    def value(self) -> object:
        """Read the value that begins here, after white space."""
        self.next_character()
        while True:
            try:
                value, self.start = json.JSONDecoder().raw_decode(self.text, self.start)
                return value
            except json.JSONDecodeError as error:
                is_certain = error.pos < len(self.text) - CERTAIN and not error.msg.startswith("Unterminated string")
                if is_certain:
                    raise self.error(error.msg, error.pos) from error
                if not self.read_more():
                    raise self.error(f"{error.msg}; is the file cut off?", error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.error(explain_json_error(error)) from error

    def read_more(self) -> bool:
        """Read at least as much as is left, so that a long value is not begun too often. False at the end."""
        self.lines += self.text.count("\n", 0, self.start)
        read = [self.text[self.start :]]
        self.start, missing = 0, max(PART, len(read[0]))
        for part in self.parts:
            read.append(part)
            missing -= len(part)
            if missing <= 0:
                break
        self.text = "".join(read)
        return any(read[1:])

    def error(self, reason: str, position: int | None = None) -> UserError:
        """The error for invalid JSON at `position` of the text, by default where the next value begins."""
        line = self.lines + self.text.count("\n", 0, self.start if position is None else position)
        return UserError(f"{self.name}, line {line} is not valid JSON: {reason}")
