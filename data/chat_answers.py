"""Where an answer begins and ends in the texts that a chat template makes of it (data/chat_turns.py)."""

import os
import re
from dataclasses import dataclass

from common.errors import UserError

NEAR = 12  # characters by which the end of a prompt is recognised in another rendering
MAX_GAP = 64  # characters that a template may write between the prompt and the answer
OPEN_TAG = re.compile(r"<[^<>\s]*$")
THOUGHTS = ("reasoning_content", "thinking")  # keys of a message
OPEN_THINKING = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")


@dataclass(frozen=True)
class EndMarkers:
    """How answers can end.

    special: texts of the tokenizer's special tokens. stops: those that end an answer for certain, EOS first. ending: what the
    template writes directly after an answer, one or more special tokens; empty if it is not known.
    """

    special: tuple[str, ...]
    stops: tuple[str, ...]
    ending: str = ""


def thinking_of(message: dict) -> str:
    """The thinking that a message has beside its content, or nothing."""
    return next((message[key] for key in THOUGHTS if message.get(key)), "")


def parting(prompt: str, given: str, markers: EndMarkers) -> int:
    """Where two renderings begin to differ, but not inside a special token or a tag."""
    end = len(os.path.commonprefix([prompt, given]))
    for token in markers.special:
        at = given.find(token, max(0, end - len(token) + 1), end + len(token) - 1)
        end = end if at < 0 else at
    tag = OPEN_TAG.search(given[:end])
    return tag.start() if tag else end


def answer_after(prompt: str, given: str, message: dict, before: dict, markers: EndMarkers) -> str:
    """The answer to append to a prompt that is not a prefix of the chat with the answer.

    It is what the template writes from the end of the prompt on, where that end can be found before the content; else the
    content and what the template writes after it. A thinking block that the prompt opens is closed. before: the message
    before the answer, whose content is no part of it.
    """
    said = (message.get("content") or "").strip()
    content = said
    if "</think>" in said and said not in given:  # the template drops the thinking of an answer that is given
        content = said.rpartition("</think>")[2].strip()
    end = content_end(given, content, markers)
    if end is None:
        raise UserError(
            "the chat template rewrites the last answer, so what the assistant wrote cannot be found in it; give another "
            "template in data.chat_template"
        )
    start = end - len(content)
    opened = OPEN_THINKING.search(prompt)
    if not opened:
        earlier = (before.get("content") or "").strip() if before["role"] == "assistant" else ""
        for gap in range(min(MAX_GAP, start) + 1):
            if earlier and given.startswith(earlier, start - gap):
                break  # the template joins two answers
            if given[: start - gap].endswith(prompt[-NEAR:]):
                return given[start - gap :]
        return given[start:]
    tag, thought = opened[1], thinking_of(message)
    if thought:
        said = f"{thought.strip()}\n</{tag}>\n\n{said}"
    elif f"</{tag}>" in said:
        said = said.removeprefix(f"<{tag}>").lstrip()
    else:
        said = f"\n</{tag}>\n\n{said}"
    return said + given[end:]


def content_end(text: str, content: str, markers: EndMarkers) -> int | None:
    """Where a content, without white space around it, ends in a text that ends with it and what the template adds.

    None if it is not there. It is looked for from the end: behind it, a template mostly writes special tokens and white space
    only.
    """
    if not content:
        return None
    ends = [len(text)]
    while True:
        rest = text[: ends[-1]]
        shorter = rest.rstrip()
        shorter = next((shorter.removesuffix(m) for m in markers.special if shorter.endswith(m)), shorter)
        if len(shorter) == len(rest):
            break
        ends.append(len(shorter))
    for end in reversed(ends):
        if text.endswith(content, 0, end):
            return end
    at = text.rfind(content)
    return None if at < 0 else at + len(content)


def end_of_answer(rest: str, message: dict, markers: EndMarkers) -> tuple[int, bool]:
    """(where the answer ends in `rest`, whether EOS is to follow). `rest` begins with the answer.

    The end is behind the first special token after the content, or behind the template's usual ending that begins with it.
    After a tool call, which may contain special tokens, it is behind the first token that is known to end an answer, or
    behind the last special token. Without any such token it is behind the last character that is not white space, and EOS is
    to follow it.
    """
    found = content_end(rest, (message.get("content") or "").strip(), markers)
    after = found or 0
    texts = markers.stops if found is None or message.get("tool_calls") else markers.special
    ends = [(rest.index(text, after), len(text)) for text in texts if text in rest[after:]]
    if ends:
        start, length = min(ends, key=lambda end: (end[0], -end[1]))
        ending = markers.ending if rest.startswith(markers.ending, start) else ""
        return start + max(length, len(ending)), False
    end = max(len(rest.rstrip()), after)
    return end, not rest[:end].endswith(markers.special)
