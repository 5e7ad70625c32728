"""The page loads nothing, and shows every text of a model or user as text."""

import html.parser
import re

import matplotlib.pyplot as plt
import pytest

from eval.comparison.comparison import compare
from eval.comparison.figures import STYLE, pictures, png
from eval.comparison.page import page
from eval.comparison.tables import all_tables, markdown
from tests.comparisons import arm, example, general, row, task
from tests.pictures import watch_legends
from xbrl.task import TASK

ATTACK = "</pre></style><script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)>\" onload='x' {{ 7*7 }} $x_"


class Elements(html.parser.HTMLParser):
    """A parser that collects all elements and their text."""

    def __init__(self):
        super().__init__()
        self.elements, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def made():
    rules = [ATTACK, "LCR_MIN"]
    answers = [row(rules, predicted, ATTACK, text=ATTACK) for predicted in (rules, ["LCR_MIN", ATTACK + "2"], [])]
    other = [row(rules, [], ATTACK, text="none")] * 3
    arms = [
        arm(ATTACK, task(answers, model=ATTACK, data=ATTACK), general=general() | {"text": ATTACK, "base": ATTACK}),
        arm("b", task(other), task(answers), general=general(0.3) | {"text": ATTACK, "base": ATTACK}),
    ]
    examples = [example(ATTACK, ATTACK, ["LCR_MIN"], report=ATTACK) for _ in range(3)]
    result = compare(arms, {ATTACK + " baseline": {"answers": other}}, examples, task=TASK)
    with pytest.MonkeyPatch.context() as patch:
        legends = watch_legends(patch)
        figures = pictures(result, arms)
    assert legends == [1]
    found = Elements()
    found.feed(page(result, figures))
    return result, figures, found


def test_the_page_loads_nothing_and_runs_nothing(made):
    _, figures, found = made
    loading = {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    assert not {tag for tag, _ in found.elements} & loading
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "href", "action", "data", "poster"):
                assert re.match(r"data:image/png;base64,[A-Za-z0-9+/=]+$|#[a-z0-9-]+$", value), (tag, value[:50])
    images = [attributes for tag, attributes in found.elements if tag == "img"]
    assert len(images) == len(figures) == 1 and all(image["alt"] for image in images)
    style = re.sub(r"\s", "", found.text)
    assert "@import" not in style and "url(" not in style
    policy = next(attributes["content"] for tag, attributes in found.elements if "http-equiv" in attributes)
    assert "default-src 'none'" in policy


def test_every_text_stands_there_as_it_was_written(made):
    result, _, found = made
    for what in (f"{ATTACK} compared with b", f"Report {ATTACK}", f"invented {ATTACK}2"):
        assert what in found.text
    assert found.text.count(ATTACK) > 20  # {{ 7*7 }} is not evaluated either
    assert result["disagreements"][0]["question"] == ATTACK
    assert "<script>" not in markdown(result) and "<img" not in markdown(result)


def test_it_can_be_read_without_seeing_it(made):
    result, _, found = made
    tags = [tag for tag, _ in found.elements]
    assert ("html", {"lang": "en"}) in found.elements
    assert [tags.count(tag) for tag in ("h1", "main", "title")] == [1, 1, 1]
    assert tags.count("table") == tags.count("caption") == len(all_tables(result))
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in found.elements if tag == "th")
    anchors = {attributes["href"][1:] for tag, attributes in found.elements if tag == "a"}
    assert anchors <= {attributes.get("id") for _, attributes in found.elements}
    assert "prefers-color-scheme: dark" in found.text and "size: A4" in found.text


def test_figure_is_reproducible_and_names_are_no_formulas():
    drawn = []
    for _ in range(2):
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(2, 1))
            axes.set_title("costs $5 and $6_")
            drawn.append(png(figure))
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG")


def test_no_direction_of_user_score_is_called_better():
    answers, own = [row(["LCR_MIN"], ["LCR_MIN"])] * 3, {"each": {"wrong": [2.0] * 3}, "scores": {}}
    for more, better in (({}, "Better is up and to the left."), ({"metric": own}, "Better is to the left.")):
        arms = [arm(name, task(answers, **more), general=general()) for name in "ab"]
        assert pictures(compare(arms, {}, []), arms)[0].caption.endswith(better)
