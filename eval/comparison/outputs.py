"""Everything that a comparison writes to its directory."""

from collections.abc import Sequence
from pathlib import Path

from common.durable_files import write_durably, write_json
from eval.comparison.arms import Arm
from eval.comparison.events import write_events
from eval.comparison.figures import pictures
from eval.comparison.page import page
from eval.comparison.tables import markdown
from eval.comparison.words import limits, verdict, warnings

PAGE = "comparison.html"


def write_outputs(result: dict, arms: Sequence[Arm], out: Path) -> list[Path]:
    """Write comparison.json, .md and .html, one PNG per figure, and tensorboard/. Returns the paths, the page first."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = [picture.drawn() for picture in pictures(result, arms)]
    sentences = {"verdict": verdict(result), "warnings": warnings(result), "limits": limits(result)}
    write_json(out / "comparison.json", result | sentences)
    write_durably(out / "comparison.md", markdown(result))
    write_durably(out / PAGE, page(result, drawn))
    images = [out / f"{picture.name}.png" for picture in drawn]
    for picture, path in zip(drawn, images, strict=True):
        picture.write(path)
    write_events(result, drawn, out / "tensorboard")
    return [out / PAGE, out / "comparison.md", out / "comparison.json", *images, out / "tensorboard"]
