"""The comparison as one HTML page that needs nothing else: no network, no script, figures inside the file.

Everything that a model, a report or a user wrote is escaped: Jinja's autoescape is on for the whole template.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from common.durable_files import publish, temporary_path, write_durably, write_json
from eval.comparison.arms import Arm
from eval.comparison.figures import Picture, pictures
from eval.comparison.tables import all_tables, markdown
from eval.comparison.words import listed

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = "comparison.html"
MOST_TEXT = 20_000  # characters of one report or answer on the page; comparison.json has all of it


def write_outputs(result: dict, arms: Sequence[Arm], out: Path) -> list[Path]:
    """Write comparison.json, .md and .html, and one PNG per figure. Returns the paths, the page first."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = pictures(result, arms)
    write_json(out / "comparison.json", result)
    write_durably(out / "comparison.md", markdown(result))
    write_durably(out / PAGE, page(result, drawn))
    images = [out / f"{picture.name}.png" for picture in drawn]
    for picture, path in zip(drawn, images, strict=True):
        temporary_path(path).write_bytes(picture.png)
        publish(path)
    return [out / PAGE, out / "comparison.md", out / "comparison.json", *images]


def page(result: dict, drawn: Sequence[Picture]) -> str:
    """The page, in UTF-8 text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    arms = [row for row in result["rows"] if row["kind"] == "arm"]
    tables = [(f"table-{number}", table) for number, table in enumerate(all_tables(result), 1)]
    widest = max((len(table.head) for _, table in tables), default=0)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        result=result,
        title=f"{arms[0]['name']} compared with {listed([row['name'] for row in arms[1:]])}",
        contents=[("limits", "What this does not say"), ("figures", "Figures")]
        + [(anchor, table.title) for anchor, table in tables]
        + [("disagreements", "Where the arms differ most")],
        pictures=[(one, base64.b64encode(one.png).decode("ascii")) for one in drawn],
        tables=tables,
        text_columns=("metric", "rule", "each seed", "over"),
        unit=result["unit"].removesuffix("s"),
        disagreements=[_beside(one) for one in result["disagreements"]],
        arms=arms,
        print_points=8 if widest <= 8 else 6.5,  # so that the widest table fits on A4
    )


def _beside(one: dict) -> dict:
    """A disagreement for the page: arms with the very same answer share a column."""
    groups: dict[str, dict] = {}
    for name, answer in one["answers"].items():
        group = groups.setdefault(answer["text"], {"names": [], "judgement": answer["judgement"]})
        group["names"].append(name)
    answers = [group | {"text": _shortened(text)} for text, group in groups.items()]
    return one | {key: _shortened(one[key]) for key in ("report", "reference")} | {"answers": answers}


def _shortened(text: str) -> str:
    left = len(text) - MOST_TEXT
    return text if left <= 0 else f"{text[:MOST_TEXT]}\n[{left:,} more characters in comparison.json]"
