"""What an export has beside the weights: config, tokenizer, where generation stops, how chats are rendered; and its sums."""

import json
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.durable_files import write_json
from common.errors import UserError
from common.sha256 import sha256_of_all
from configs.config import Config
from data.chat_settings import write_chat_settings
from data.encoding import ExampleEncoder
from distributed.process_group import Ranks, gather_objects
from training.chat_settings import chat_settings

GENERATION_CONFIG = "generation_config.json"
RECORD = "export.json"  # which weights an export holds, and the SHA-256 of its files
CARD = "README.md"  # may be written anew


def write_files(
    folder: Path, config: Config, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write everything but the weights to `folder`. Raises UserError if generation_config.json of the base is damaged.

    transformers and the servers that read its directories stop at `eos_token_id` of generation_config.json. It becomes a
    list of what training has taught (EOS, and the token that ends an answer in the chat template, which may be another one)
    and of what the base's file has.
    """
    model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = chat_settings(config.data)
    write_chat_settings(folder, settings)
    file = Path(config.model.path, GENERATION_CONFIG)
    generation = read_json(file, "remove it or copy it again, and start again to export") if file.is_file() else {}
    generation.pop("_from_model_config", None)  # some versions would then take `eos_token_id` of config.json
    before = generation.get("eos_token_id")
    before = before if isinstance(before, list) else [] if before is None else [before]
    taught = ExampleEncoder(tokenizer, settings).stop_ids
    generation["eos_token_id"] = list(dict.fromkeys([*taught, *before]))
    write_json(folder / GENERATION_CONFIG, generation)


def sums_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an export but its record and its card, by name."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (RECORD, CARD)]
    return {path.name: digest for path, digest in sha256_of_all(files).items()}


def damage(sums: dict[Path, str], ranks: Ranks) -> list[str]:
    """What is wrong with files that must have these SHA-256 sums, one sentence each. A collective; the ranks share the files.

    Every byte is read. Files that nobody knows, such as a user's, are not looked at.
    """
    mine = sorted(sums)[ranks.rank :: ranks.world_size]
    there = [path for path in mine if path.is_file()]
    problems = [f"{path} is missing" for path in mine if path not in there]
    try:
        found = sha256_of_all(there)
    except OSError as error:
        problems.append(f"{error.filename or there[0].parent} cannot be read ({error.strerror})")
    else:
        problems += [
            f"{path} has changed: its SHA-256 is not that of export.json" for path in there if found[path] != sums[path]
        ]
    return sorted(problem for part in gather_objects(problems, ranks) for problem in part)


def read_json(path: Path, mend: str) -> dict:
    """The JSON object in a file. Raises UserError, which says what to do about it, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {mend}") from error
