"""Which of the profiles of xbrl/corpus/examples.py a model was trained on."""

import json
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from xbrl.corpus.examples import PROFILES, Profile

DATA_CARD = "dataset.json"  # beside the examples of a run; scripts/make_reports.py writes it


def choose_profile(option: str | None, model: Path) -> tuple[Profile, str]:
    """(the profile that a model was trained on, where that stands): `--profile`, its export.json, or the data card of its run.

    scripts/export.py records the profile. The export of a run lies in the run's directory: the run's config.json names the
    training file, and the data card beside that names the profile. Raises UserError if this chain is broken.
    """
    if option:
        return PROFILES[option], "--profile"
    record = model / "export.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return PROFILES[json.loads(record.read_text(encoding="utf-8"))["profile"]], str(record)
    config = model.resolve().parent / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        train = Path(content.get("config", content)["data"]["train"][0])
        card = train.parent / DATA_CARD
        name = json.loads(card.read_text(encoding="utf-8"))["arguments"]["profile"]
        return PROFILES[name], str(card)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{model}: the profile that it was trained on is not recorded ({config} or its data card cannot be read); name it "
            f"with --profile {', '.join(PROFILES)}"
        ) from error
