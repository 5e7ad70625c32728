"""How the chats of a finished run were rendered, in a file beside its model: evaluation and users render theirs alike."""

import json
from pathlib import Path

from common.durable_files import write_json
from common.errors import UserError
from data.chat_template import ChatSettings

CHAT_FILE = "chat.json"


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
