"""Render chats with a tokenizer's chat template, on a fixed date, with a UserError where the template refuses.

Everything goes through `apply_chat_template` of transformers, so that the text is the one that inference servers make.
"""

import ast
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from common.durable_files import write_json
from common.errors import UserError

# For base models without a chat template. Documented in docs/chats.md. The space before an answer belongs to the answer,
# because tokenizers join a word and the space before it: a prompt that ended in a space would be one that no text contains.
PLAIN_CHAT_TEMPLATE = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role in ('system', 'developer') %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\n\n' }}"
    "{% elif message.role == 'tool' %}{{ 'Tool: ' + message.content + '\n\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant:' }}"
    "{% if message.content %}{{ ' ' + message.content }}{% endif %}"
    "{% if message.tool_calls %}{{ ' ' + message.tool_calls | tojson }}{% endif %}"
    "{{ eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

DATE_FUNCTION = "strftime_now"  # transformers gives it to templates: today's date in a format of strftime
CHAT_FILE = "chat.json"  # beside the model of a finished run, so that evaluation and users render chats alike
DATE_CALL = re.compile(rf"""\b{DATE_FUNCTION}\(\s*('[^'\\]*'|"[^"\\]*")\s*\)""")  # with the format as a literal


@dataclass(frozen=True)
class ChatSettings:
    """How chats are rendered and which answers are trained: the settings data.chat_template_options, chat_date, train_on.

    date: YYYY-MM-DD, given to templates that ask for today's date; None: today. control_tokens: what becomes of control tokens
    in a content: they stay text, are refused (error), or are control tokens (allow); the setting data.control_tokens.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    date: str | None = None
    train_on: str = "all"
    control_tokens: str = "text"


def write_chat_settings(directory: str | Path, settings: ChatSettings) -> None:
    """Write the date, the options of the template and the rule for control tokens to `directory`, where they are set."""
    content = {"date": settings.date, "template_options": dict(settings.options)}
    content["control_tokens"] = settings.control_tokens if settings.control_tokens != "text" else None
    content = {key: value for key, value in content.items() if value}
    if content:
        write_json(Path(directory, CHAT_FILE), content)


def read_chat_settings(directory: str | Path) -> ChatSettings:
    """The settings that a model was trained with; the defaults if it has no such file. Raises UserError if it is damaged."""
    path = Path(directory, CHAT_FILE)
    if not path.is_file():
        return ChatSettings()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        date, options = content.get("date"), content.get("template_options", {})
        control = content.get("control_tokens", "text")
        if not (isinstance(options, dict) and isinstance(date, str | None) and control in ("text", "error", "allow")):
            raise TypeError("the types are wrong")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f'{path} is damaged ({error}); correct it to {{"date": "YYYY-MM-DD", "template_options": {{...}}}} or remove it'
        ) from error
    return ChatSettings(options, date, control_tokens=control)


class ChatTemplate:
    """The chat template of a tokenizer with its options, on a fixed date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> None:
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = dict(settings.options)
        self.date = settings.date

    def render(self, messages: Sequence[dict], tools: list | None = None, prompt: bool = False) -> str:
        """The text of a chat; with `prompt`, up to the beginning of the assistant's next answer.

        Raises UserError if the template does.
        """
        messages = list(messages)
        try:
            return self._render(messages, tools, prompt)
        except (
            UserError
        ):  # transformers leaves out a content that is null, for which some templates have no case (Qwen3)
            filled = [m | {"content": ""} if m.get("content") is None else m for m in messages]
            if filled == messages:
                raise
            return self._render(filled, tools, prompt)

    def _render(self, messages: list[dict], tools: list | None, prompt: bool) -> str:
        with _refusals():
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tools=cast(Any, tools),
                chat_template=self._dated(tools),
                tokenize=False,
                add_generation_prompt=prompt,
                **self.options,
            )
        return cast(str, rendered)

    def generation_spans(self, messages: Sequence[dict], tools: list | None = None) -> list[tuple[int, int]]:
        """(start, end) of the characters in `{% generation %}` blocks. Raises UserError if the template refuses the chat."""
        messages = [{"content": ""} | {k: v for k, v in message.items() if v is not None} for message in messages]
        with _refusals():
            rendered = render_jinja_template(
                [messages],
                tools=cast(Any, tools),
                chat_template=self._dated(tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        return cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)[1][0]

    def _dated(self, tools: list | None) -> str:
        template = self.text(tools is not None)
        return _on_date(template, self.date) if self.date else template

    def text(self, with_tools: bool = False) -> str:
        """The Jinja source. A tokenizer with several templates has one for chats with tools."""
        return self.tokenizer.get_chat_template(tools=cast(Any, [] if with_tools else None))

    @functools.cached_property
    def marks_generation(self) -> bool:
        """Whether the template marks what the assistant wrote with `{% generation %}` blocks (transformers' own extension)."""
        return any(re.search(r"\{%-?\s*generation\b", self.text(tools)) for tools in (False, True))

    def knows(self, word: str, with_tools: bool = False) -> bool:
        """Whether the template mentions a variable, a role or a function."""
        return _mentions(self.text(with_tools), word)

    def fingerprint(self) -> dict[str, object]:
        """All that determines the text of a chat, as plain JSON."""
        texts = sorted({self.text(False), self.text(True)})
        date = self.date if any(DATE_FUNCTION in text for text in texts) else None
        return {"templates": texts, "options": json.loads(json.dumps(self.options, default=str)), "date": date}


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what a template raises into a UserError."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template has a mistake in its line {error.lineno}: {error.message}") from error
    except TemplateError as error:  # raise_exception in the template is one of them
        what = " ".join(str(error).split())
        raise UserError(f"the chat template refuses this chat: {what}") from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        # A template is a program: adding None to a string, for instance, ends in Python's own error.
        what = " ".join(str(error).split())
        raise UserError(f"the chat template cannot render this chat ({type(error).__name__}: {what})") from error


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date into a chat."""
    template = ChatTemplate(tokenizer, ChatSettings())
    return any(template.knows(DATE_FUNCTION, tools) for tools in (False, True))


@functools.lru_cache(maxsize=64)
def _mentions(template: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", template) is not None


@functools.lru_cache(maxsize=16)
def _on_date(template: str, date: str) -> str:
    """The template with this date in place of today's: the text that each call of DATE_FUNCTION gives.

    A variable named like the function would do, but newer versions of transformers turn a function among the variables
    into a string.
    """
    day = datetime.datetime.fromisoformat(date)
    dated = DATE_CALL.sub(lambda call: json.dumps(day.strftime(ast.literal_eval(call[1]))), template)
    if re.search(rf"\b{DATE_FUNCTION}\s*\(", dated):
        raise UserError(
            f"the chat template computes the format of a date; write it as a text: {DATE_FUNCTION}('%d %b %Y')"
        )
    return dated
