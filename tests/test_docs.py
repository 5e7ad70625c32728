"""README, CONTRIBUTING and the pages of docs name only files, scripts, sections and keys that exist."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.config import Config

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs" / "LOG.md"  # the history: it may name what is gone
USER_PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path != LOG]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *USER_PAGES]
# Paths of this repository in a text. `runs/` and `artifacts/` are made by a user.
ROOMS = "bench|common|configs|data|distributed|docs|eval|experiment|model|scripts|tests|tools|training|xbrl"
FILE = re.compile(rf"(?<![\w/.-])(?:(?:{ROOMS})/[\w/.-]+\.(?:py|sh|md|png|jsonl?|csv)|train\.py)(?![\w/])")
PLACEHOLDER = re.compile(r"NAME|CONFIG|MODEL|FILE")
MODULE = re.compile(rf"python -m ((?:{ROOMS})(?:\.\w+)+)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"```.*?```|^ {4}.*$", re.DOTALL | re.MULTILINE)
SECTIONS = {
    section.name: {key.name for key in dataclasses.fields(section.type)} for section in dataclasses.fields(Config)
}
KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)(?==)")  # section.key=value
IMPORT = re.compile(r"^ *from ([\w.]+) import ", re.MULTILINE)


def names(pages: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in pages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def named_files(text: str) -> Iterator[str]:
    for name in FILE.findall(text):
        if not PLACEHOLDER.search(name):
            yield name


def commands(page: Path) -> Iterator[str]:
    """The commands of a page that start a script or train.py, with the lines that they continue on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    yield from re.findall(r"^ *((?:python|torchrun) .*)$", text, re.MULTILINE)


def sources(file: Path, depth: int) -> Iterator[str]:
    """The source of a module and of our modules that it imports, `depth` imports away."""
    text = file.read_text(encoding="utf-8")
    yield text
    for name in IMPORT.findall(text) if depth else ():
        imported = ROOT / f"{name.replace('.', '/')}.py"
        if imported.exists():
            yield from sources(imported, depth - 1)


def has_option(script: str, option: str) -> bool:
    """Whether a script, or a module near it, writes an option out or has a field of its name."""
    field = re.compile(rf"^    {option[2:].replace('-', '_')}: ", re.MULTILINE)
    return any(f'"{option}"' in text or field.search(text) for text in sources(ROOT / script, 2))


def test_there_are_at_most_twelve_pages_for_users() -> None:
    assert len(USER_PAGES) <= 12, names(USER_PAGES)


def test_readme_lists_every_page() -> None:
    listed = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{path.name}" for path in USER_PAGES} <= listed


@pytest.mark.parametrize("page", names([*PAGES, LOG, ROOT / "CHANGELOG.md"]))
def test_links_resolve(page) -> None:
    path = ROOT / page
    text = CODE_BLOCK.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", names(PAGES))
def test_files_and_modules_that_are_named_exist(page) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    missing = {name for name in named_files(text) if not ((ROOT / name).exists() or (path.parent / name).exists())}
    missing |= {m for m in MODULE.findall(text) if not (ROOT / f"{m.replace('.', '/')}.py").exists()}
    assert not missing


@pytest.mark.parametrize("page", names(PAGES))
def test_keys_that_are_named_exist(page) -> None:
    found = KEY.findall((ROOT / page).read_text(encoding="utf-8"))
    assert not {f"{section}.{key}" for section, key in found if key not in SECTIONS[section]}


@pytest.mark.parametrize("page", names(PAGES))
def test_options_of_commands_exist(page) -> None:
    wrong = []
    for line in commands(ROOT / page):
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word.startswith("scripts/") and (ROOT / word).exists()), None)
        if script:
            options = {word.split("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
            wrong += [f"{script} {option}" for option in options if not has_option(script, option)]
    assert not wrong


def test_what_the_code_says_of_the_pages_is_true() -> None:
    gone = []
    for path in [*ROOT.glob("*.py"), *(f for room in ROOMS.split("|") for f in (ROOT / room).rglob("*.py"))]:
        for name in re.findall(r"(?<![\w/.])docs/[\w-]+\.md", path.read_text(encoding="utf-8")):
            if not (ROOT / name).exists():
                gone.append(f"{path.relative_to(ROOT)}: {name}")
    assert not gone, "\n".join(gone)
