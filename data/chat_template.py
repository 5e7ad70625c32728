"""Render chats with a tokenizer's chat template on a fixed date. Raise UserError if the template refuses a chat.

Everything goes through transformers' `apply_chat_template`, so that the text is the same as on inference servers.
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

# For base models without a chat template (docs/data.md). The space before an answer belongs to the answer, because tokenizers
# join a space with the word after it: a prompt that ends in a space has ids that occur in no text.
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

DATE_FUNCTION = "strftime_now"  # transformers' function for templates: today's date in a strftime format
CHAT_FILE = "chat.json"  # beside the model of a finished run, so that evaluation and users render chats as training did
DATE_CALL = re.compile(rf"""\b{DATE_FUNCTION}\(\s*('[^'\\]*'|"[^"\\]*")\s*\)""")  # the format is a literal


@dataclass(frozen=True)
class ChatSettings:
    """How chats are rendered and which answers are trained: the settings data.chat_template_options, chat_date, train_on.

    date: YYYY-MM-DD, for templates that ask for today's date; None: today. control_tokens: the setting data.control_tokens.
    The spelling of a control token in a content stays text (text), is refused (error), or becomes a control token (allow).
    """

    options: Mapping[str, object] = field(default_factory=dict)
    date: str | None = None
    train_on: str = "all"
    control_tokens: str = "text"


def write_chat_settings(directory: str | Path, settings: ChatSettings) -> None:
    """Write the date, the template options and the rule for control tokens to `directory`, unless all are defaults."""
    content = {"date": settings.date, "template_options": dict(settings.options)}
    content["control_tokens"] = settings.control_tokens if settings.control_tokens != "text" else None
    content = {key: value for key, value in content.items() if value}
    if content:
        write_json(Path(directory, CHAT_FILE), content)


def read_chat_settings(directory: str | Path) -> ChatSettings:
    """Read the settings that a model was trained with; defaults without a file. Raise UserError if the file is damaged."""
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
        """Return the text of a chat; with `prompt`, up to the beginning of the assistant's next answer.

        Raise UserError if the template refuses the chat.
        """
        messages = list(messages)
        try:
            return self._render(messages, tools, prompt)
        except UserError:
            # transformers leaves out a content that is null, which some templates cannot handle (Qwen3).
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
        """Return (start, end) of the characters in `{% generation %}` blocks. Raise UserError if the template refuses."""
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
        """Return the Jinja source. A tokenizer with several templates has one for chats with tools."""
        return self.tokenizer.get_chat_template(tools=cast(Any, [] if with_tools else None))

    @functools.cached_property
    def marks_generation(self) -> bool:
        """Whether the template marks the assistant's text with `{% generation %}` blocks (transformers' own extension)."""
        return any(re.search(r"\{%-?\s*generation\b", self.text(tools)) for tools in (False, True))

    def knows(self, word: str, with_tools: bool = False) -> bool:
        """Return whether the template mentions a variable, a role or a function."""
        return _mentions(self.text(with_tools), word)

    def fingerprint(self) -> dict[str, object]:
        """Return everything that determines the text of a chat, as plain JSON."""
        texts = sorted({self.text(False), self.text(True)})
        date = self.date if any(DATE_FUNCTION in text for text in texts) else None
        return {"templates": texts, "options": json.loads(json.dumps(self.options, default=str)), "date": date}


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn an exception of a template into a UserError."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template has a mistake in its line {error.lineno}: {error.message}") from error
    except TemplateError as error:  # e.g. raise_exception in the template
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template refuses this chat: {reason}") from error
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        # A template is a program: adding None to a string, for instance, raises Python's own error.
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template cannot render this chat ({type(error).__name__}: {reason})") from error


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes today's date into a chat."""
    template = ChatTemplate(tokenizer, ChatSettings())
    return any(template.knows(DATE_FUNCTION, tools) for tools in (False, True))


@functools.lru_cache(maxsize=64)
def _mentions(template: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", template) is not None


@functools.lru_cache(maxsize=16)
def _on_date(template: str, date: str) -> str:
    """Return the template with the text of this date in place of each call of DATE_FUNCTION.

    A variable of that name would be simpler, but newer versions of transformers turn a function among the variables into a
    string.
    """
    day = datetime.datetime.fromisoformat(date)
    dated = DATE_CALL.sub(lambda call: json.dumps(day.strftime(ast.literal_eval(call[1]))), template)
    if re.search(rf"\b{DATE_FUNCTION}\s*\(", dated):
        raise UserError(
            f"the chat template computes the format of a date; write it as a text: {DATE_FUNCTION}('%d %b %Y')"
        )
    return dated
