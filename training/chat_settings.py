"""The settings with which the chats of a run are rendered, fixed before any chat is read: template options and date."""

import datetime
import inspect
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Data
from configs.load import replace
from data.chat_template import ChatSettings, ChatTemplate, read_chat_settings, writes_date
from training.checkpointer import newest_start


def chat_settings(data: Data) -> ChatSettings:
    """Return the settings of a config that data/encoding.py needs."""
    return ChatSettings(data.chat_template_options, data.chat_date, data.train_on, data.control_tokens)


def settle_chat_settings(config: Config, tokenizer: PreTrainedTokenizerBase, run_directory: Path) -> Config:
    """Return the config with the run's date in data.chat_date, or with None if the chat template writes no date.

    A template that writes today's date would tokenise the same chats differently every day, and the run could not be resumed.
    So the date of the run's first start holds, which its config.json records. (Ranks that start on different sides of midnight
    refuse to go on, as with any setting that differs between ranks.) Raise UserError if an option is not a variable of the
    template.
    """
    data = config.data
    _check_options(data, ChatTemplate(tokenizer, ChatSettings()))
    if not writes_date(tokenizer):
        return replace(config, "data.chat_date", None)
    if data.chat_date is not None:
        return config
    recorded = newest_start(run_directory).get("config", {}).get("data", {}).get("chat_date")
    return replace(config, "data.chat_date", recorded or datetime.date.today().isoformat())


def _check_options(data: Data, template: ChatTemplate) -> None:
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name, value in data.chat_template_options.items():
        if name in taken:
            raise UserError(f"data.chat_template_options: {name} is set by this code; remove it")
        if name == "enable_thinking" and value is False:
            continue  # a template without this variable has no thinking to turn off
        if not (template.knows(name) or template.knows(name, with_tools=True)):
            raise UserError(f"data.chat_template_options: the chat template has no variable {name}; correct its name")


def other_options(config: Config) -> list[str]:
    """Return a warning if model.path is an export whose chats were rendered with other options than this config has."""
    before, now = dict(read_chat_settings(config.model.path).options), config.data.chat_template_options
    if not before or before == now:
        return []
    was, has = (
        ",".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()
        )
        for options in (before, now)
    )
    return [
        f"{config.model.path} was trained with data.chat_template_options={was}, and this run has {has or 'none'}: its prompts "
        "may be others than those that the model knows"
    ]
