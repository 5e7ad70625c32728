"""Write the comparison as one HTML page that stands alone: no network, no script, figures inside the file.

Every text by a model, a user or the data is escaped: Jinja's autoescape is on for the whole template.
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
MOST_TEXT = 20_000  # characters of a question or an answer on the page; comparison.json has all of it


def write_outputs(result: dict, arms: Sequence[Arm], out: Path) -> list[Path]:
    """Write comparison.json, .md and .html, and one PNG per figure. Return the paths, the page first."""
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
    """Return the page as text, to be written in UTF-8."""
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
        pictures=[(picture, base64.b64encode(picture.png).decode("ascii")) for picture in drawn],
        tables=tables,
        text_columns=("metric", result["label"], "each seed", "over"),
        unit=result["unit"].removesuffix("s"),
        disagreements=[_grouped(disagreement) for disagreement in result["disagreements"]],
        arms=arms,
        print_points=8 if widest <= 8 else 6.5,  # so that the widest table fits on A4
    )


def _grouped(disagreement: dict) -> dict:
    """Return a disagreement for the page: arms with equal answers share a column."""
    groups: dict[str, dict] = {}
    for name, answer in disagreement["answers"].items():
        group = groups.setdefault(answer["text"], {"names": [], "judgement": answer["judgement"]})
        group["names"].append(name)
    answers = [group | {"text": _shortened(text)} for text, group in groups.items()]
    texts = {key: _shortened(disagreement[key]) for key in ("question", "reference")}
    return disagreement | texts | {"answers": answers}


def _shortened(text: str) -> str:
    left = len(text) - MOST_TEXT
    return text if left <= 0 else f"{text[:MOST_TEXT]}\n[{left:,} more characters in comparison.json]"
