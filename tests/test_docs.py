"""README, CONTRIBUTING and the pages of docs name only files, sections and keys that exist, and their commands are taken."""

import dataclasses
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from common.errors import UserError
from configs.config import Config
from configs.load import load_config
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model
from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.scores import micro_f1, pairs_right
from xbrl.answers.screen import of_result

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs" / "LOG.md"  # the history: it may name what is gone
USER_PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path != LOG]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *USER_PAGES]
# Their docstrings, which --help prints, have commands too.
HELP = [*sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py")), ROOT / "tools" / "bench.py"]
# Paths of this repository in a text. `runs/` and `artifacts/` are made by a user.
ROOMS = "bench|common|configs|data|distributed|docs|eval|experiment|model|scripts|tests|tools|training|xbrl"
FILE = re.compile(rf"(?<![\w/.-])(?:(?:{ROOMS})/[\w/.-]+\.(?:py|sh|md|png|jsonl?|csv)|train\.py)(?![\w/])")
PLACEHOLDER = re.compile(r"NAME|CONFIG|MODEL|FILE")
MODULE = re.compile(rf"python -m ((?:{ROOMS})(?:\.\w+)+)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"```(?s:.*?)```|^ {4}.*$", re.MULTILINE)
SECTIONS = {
    section.name: {key.name for key in dataclasses.fields(section.type)} for section in dataclasses.fields(Config)
}
KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)(?==)")  # section.key=value
# In a synopsis: what stands after ` | ` up to the bracket, `|` and the word after it, brackets, dots.
SYNOPSIS = re.compile(r" \| [^\]]*|\|[^\s\]]+|[\[\]]|\.\.\.")
OWN_DATA = ("train.py", "scripts/data.py show")
# Starts each command up to the point where its arguments are parsed, and prints what was refused.
DRIVER = """
import argparse, contextlib, io, os, runpy, shlex, sys

class Parsed(BaseException):
    pass

def stopping(parse):
    def parsed(self, args=None, namespace=None):
        found = parse(self, args, namespace)
        if args is None:  # the command of a script with several commands is given as `args`
            raise Parsed
        return found
    return parsed

for name in ("parse_args", "parse_intermixed_args"):
    setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
root, *lines = sys.argv[1:]
for line in lines:
    script, *words = shlex.split(line)
    sys.path[0] = os.path.join(root, "scripts")
    sys.argv = [os.path.join(root, script), *words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
        print(f"{line}: nothing was parsed")
    except Parsed:
        pass
    except SystemExit:
        print(f"{line}: {said.getvalue()}")
"""


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


def rows_of_the_log() -> list[str]:
    """Of LOG's table of figures and commands, the rows whose command is not that of an earlier commit."""
    table = LOG.read_text(encoding="utf-8").split("\n## ")[1]
    rows = re.findall(r"^\|.*\|$", table, re.MULTILINE)
    return [row for row in rows if not re.search(r"commit [0-9a-f]{7}", row)]


def commands(page: Path) -> Iterator[str]:
    """The commands of a page that start a script or train.py, with the lines that they continue on. Of LOG: those of its table."""
    if page == LOG:
        yield from re.findall(r"`((?:python|torchrun) [^`]*)`", "\n".join(rows_of_the_log()))
        return
    text = re.sub(r"\\+\n", " ", page.read_text(encoding="utf-8"))
    yield from re.findall(r"^ *((?:python|torchrun) .*)$", text, re.MULTILINE)


def script_commands(page: Path) -> Iterator[list[str]]:
    """The words of a page's commands that start a script of ours, from its path on; of alternatives the first."""
    for line in commands(page):
        words = shlex.split(SYNOPSIS.sub("", line).partition(" < ")[0], comments=True)
        script = next(
            (i for i, word in enumerate(words) if word.startswith("scripts/") and (ROOT / word).exists()), None
        )
        if script is not None:
            yield words[script:]


def test_there_are_at_most_twelve_pages_for_users() -> None:
    assert len(USER_PAGES) <= 12, names(USER_PAGES)


def test_readme_lists_every_page() -> None:
    listed = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{path.name}" for path in USER_PAGES} <= listed


def test_readme_takes_two_minutes_and_the_pages_have_18_000_words() -> None:
    words = {path.name: len(path.read_text(encoding="utf-8").split()) for path in [ROOT / "README.md", *USER_PAGES]}
    assert words.pop("README.md") <= 620
    assert "eval.metric=" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert sum(words.values()) <= 18_000, words


@pytest.mark.parametrize("page", names([ROOT / "README.md", *USER_PAGES]))
def test_a_page_with_figures_of_the_base_says_which_weights_it_has(page) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "4-bit" in text or not re.search("SmolLM2-|SmolLM2's|runs/quickstart", text)


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


def test_what_the_table_of_the_log_names_exists() -> None:
    rows = rows_of_the_log()
    text = "\n".join(rows)
    modules = [*MODULE.findall(text), *re.findall(r"from ([\w.]+) import", text)]
    files = {*named_files(text), *(f"{module.replace('.', '/')}.py" for module in modules)}
    assert len(rows) > 30 and len(files) > 15
    assert not {name for name in files if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", names(PAGES))
def test_keys_that_are_named_exist(page) -> None:
    found = KEY.findall((ROOT / page).read_text(encoding="utf-8"))
    assert not {f"{section}.{key}" for section, key in found if key not in SECTIONS[section]}


@pytest.mark.parametrize("page", names([*PAGES, *HELP, ROOT / "train.py"]))
def test_settings_of_commands_are_read_with_their_config(page) -> None:
    for line in commands(ROOT / page):
        words = shlex.split(SYNOPSIS.sub("", line), comments=True)
        config = next((word for word in words if word.startswith("configs/") and (ROOT / word).exists()), None)
        if config and "scripts/sweep.py" not in words:  # a sweep has lists of values
            overrides = [word for word in words if re.match(r"\w+\.\w+=", word)]
            try:
                load_config(ROOT / config, overrides)
            except UserError as error:
                pytest.fail(f"{line}: {error}")


@pytest.mark.slow
def test_scripts_take_the_options_of_commands(tmp_path) -> None:
    found = sorted({shlex.join(words) for page in [*PAGES, LOG, *HELP] for words in script_commands(page)})
    assert len(found) > 50
    (tmp_path / "driver.py").write_text(DRIVER)
    done = run_python(tmp_path / "driver.py", ROOT, *found, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


def test_no_export_of_a_page_is_refused_because_the_one_above_it_is_there() -> None:
    for page in PAGES:
        exports = [words for words in script_commands(page) if words[0] == "scripts/export.py" and "--out" in words]
        folders = [words[words.index("--out") + 1] for words in exports]
        assert len(set(folders)) == len(folders), (page, folders)


@pytest.mark.slow
def test_the_commands_for_own_data_train(tmp_path) -> None:
    """The README's, as they are, with a model of the tests."""
    write_tiny_model(tmp_path / "model")
    for name, examples in (("mine", 16), ("held_out", 4)):
        write_chat_file(tmp_path / f"{name}.jsonl", examples, seed=examples)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    train, show = (
        re.search(rf"^    python ({command} .*data.train=mine.jsonl.*)$", readme, re.M) for command in OWN_DATA
    )
    assert train and show
    model = f"model.path={tmp_path / 'model'}"
    script, config, *overrides = shlex.split(train[1])
    done = run_python(ROOT / script, ROOT / config, *overrides, model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mine/export/model.safetensors").exists()
    script, command, config, *overrides = shlex.split(show[1])
    done = run_python(ROOT / script, command, ROOT / config, *overrides, model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "⟦" in done.stdout


def test_the_figures_of_the_quickstart_are_those_of_its_kept_answers() -> None:
    """README's table and those of results.md, from the answers and results of three seeds in docs/quickstart."""
    rows: dict[str, list[list[float]]] = {"f1": [], "note_f1": []}  # of each seed: the model, and programs without one
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for seed in range(3):
        folder = ROOT / "docs" / "quickstart" / f"seed-{seed}" / "eval"
        after, forgetting = (
            json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("after", "forgetting")
        )
        scores, examples = after["violations"], [one | {"violations": one["true"]} for one in after["answers"]]
        said = of_result(after, examples)[1]
        f1 = micro_f1(said, [one["violations"] for one in examples])["f1"]
        assert f1 == scores["micro"]["f1"]  # the last screen and evaluate.py say the same
        for key, own in (("f1", f1), ("note_f1", scores["note_f1"])):
            programs = (scores["baselines"][name][key] for name in ("engine + note words", "thresholds", "rule engine"))
            rows[key].append([own, *programs])
        in_words = [i for i, one in enumerate(examples) if one["pair"].endswith("in words")]
        pairs = sum(pairs_right([examples[i] for i in in_words], [said[i] for i in in_words]))
        assert f"\n{seed} | {f1:.3f}; {scores['note_f1']:.3f}; {pairs} |" in results
        kept = f"{forgetting['perplexity_per_byte']['tuned']['value']:.3f} | {forgetting['kl']['value']:.2f}"
        right = f"{forgetting['questions']['all']['tuned']['value']:.0%}"
        assert f"\n{seed} | {after['facts']['f1']:.3f} | {after['rouge_l']['f']:.3f} | {kept} | {right}\n" in results
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for key, name in (("f1", "all rules"), ("note_f1", "what notes decide")):
        columns = zip(*rows[key], strict=True)
        cells = [f"{fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})" for values in columns]
        assert re.sub(r"(\S+) \((\S+)-\2\)", r"\1 (each)", f"| {name} | {' | '.join(cells)} |") in readme


def test_what_notes_state_by_kind_is_that_of_the_kept_answers() -> None:
    """The run of the full corpus in results.md, from docs/full_corpus."""
    found = json.loads((ROOT / "docs" / "full_corpus" / "test.json").read_text(encoding="utf-8"))
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("\n", " ")
    scores, programs = found["violations"], found["violations"]["baselines"]
    columns = [found["notes"], *(programs[f"engine + note {name}"]["notes"] for name in ("words", "states"))]
    names = {"pledged assets": "pledged", "own shares": "own_shares", "unapproved profit": "profit"}
    for name, kind in (names | {"connected clients": "connected", "waivers": "waiver"}).items():
        row = " | ".join(f"{one['kinds'][kind]['decided_f1']:.3f}" for one in columns)
        assert f" {name} | {row} " in results
    assert " all | " + " | ".join(f"{one['decided_f1']:.3f}" for one in columns) + " " in results
    head = f"F1 {scores['micro']['f1']:.3f}, of what notes decide {scores['note_f1']:.3f}, ROUGE-L {found['rouge_l']['f']:.3f}"
    assert head in results


def test_the_answer_that_a_page_shows_is_read_as_written() -> None:
    page = (ROOT / "docs" / "xbrl.md").read_text(encoding="utf-8")
    shown = re.search(r"^    Checks:\n(?:    .*\n)+", page, re.MULTILINE)
    assert shown
    answer = parse_answer(textwrap.dedent(shown[0]))
    assert answer and not answer.void
    assert answer.rule_ids == ("OCR_CET1", "PLEDGED_COUNTED", "LCR_PLEDGED")


def test_what_the_code_says_of_the_pages_is_true() -> None:
    gone = []
    for path in [*ROOT.glob("*.py"), *(f for room in ROOMS.split("|") for f in (ROOT / room).rglob("*.py"))]:
        for name in re.findall(r"(?<![\w/.])docs/[\w-]+\.md", path.read_text(encoding="utf-8")):
            if not (ROOT / name).exists():
                gone.append(f"{path.relative_to(ROOT)}: {name}")
    assert not gone, "\n".join(gone)
