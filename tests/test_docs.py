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
from eval.metric import load_metric
from eval.task import full_report, load_task
from tests.processes import run_python
from tests.scripts.plan import fits
from tests.tiny import write_chat_file, write_tiny_model
from training.auto import suggested_rate
from xbrl.answers.answer_reader import parse_answer, read_facts

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs" / "LOG.md"  # the history: it may name what is gone
USER_PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path != LOG]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md", *USER_PAGES]
# Their docstrings, which --help prints, have commands too.
HELP = [path for folder in ("configs", "scripts", "xbrl/scripts") for path in sorted((ROOT / folder).glob("*.py"))]
# Paths of this repository in a text. `runs/` and `artifacts/` are made by a user.
ROOMS = "common|configs|data|distributed|docs|eval|model|scripts|tests|training|xbrl"
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
        namespace = parse(self, args, namespace)
        if args is None:  # the command of a script with several commands is given as `args`
            raise Parsed
        return namespace
    return parsed

for name in ("parse_args", "parse_intermixed_args"):
    setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
root, *lines = sys.argv[1:]
for line in lines:
    script, *words = shlex.split(line)
    sys.path[0] = os.path.join(root, "scripts")
    sys.argv = [os.path.join(root, script), *words]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_path(sys.argv[0], run_name="__main__")
        print(f"{line}: nothing was parsed")
    except Parsed:
        pass
    except SystemExit:
        print(f"{line}: {errors.getvalue()}")
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
            (
                i
                for i, word in enumerate(words)
                if word.startswith(("scripts/", "xbrl/scripts/")) and (ROOT / word).exists()
            ),
            None,
        )
        if script is not None:
            yield words[script:]


def test_there_are_at_most_twelve_pages_for_users() -> None:
    assert len(USER_PAGES) <= 12, names(USER_PAGES)


def test_readme_lists_every_page() -> None:
    listed = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{path.name}" for path in USER_PAGES} <= listed


def test_readme_and_pages_stay_short() -> None:
    words = {path.name: len(path.read_text(encoding="utf-8").split()) for path in [ROOT / "README.md", *USER_PAGES]}
    assert words.pop("README.md") <= 900
    assert "eval.metric=" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert sum(words.values()) <= 18_000, words
    assert len(LOG.read_text(encoding="utf-8").split()) <= 8_000
    assert len((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split()) <= 400


@pytest.mark.parametrize("page", names([ROOT / "README.md", *USER_PAGES]))
def test_page_with_base_figures_names_base_weights(page) -> None:
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
    keys = KEY.findall((ROOT / page).read_text(encoding="utf-8"))
    assert not {f"{section}.{key}" for section, key in keys if key not in SECTIONS[section]}


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
    lines = sorted({shlex.join(words) for page in [*PAGES, LOG, *HELP] for words in script_commands(page)})
    assert len(lines) > 50
    (tmp_path / "driver.py").write_text(DRIVER)
    done = run_python(tmp_path / "driver.py", ROOT, *lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


def test_exports_of_a_page_have_different_directories() -> None:
    for page in PAGES:
        exports = [words for words in script_commands(page) if words[0] == "scripts/export.py" and "--out" in words]
        folders = [words[words.index("--out") + 1] for words in exports]
        assert len(set(folders)) == len(folders), (page, folders)


@pytest.mark.slow
def test_readme_table_shows_the_models_that_fit() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\d+ GB \|.*$", readme, re.MULTILINE) == fits.rows()


def test_readme_table_shows_the_suggested_rates() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, *rows = (re.search(rf"^{name} \| (.*)$", readme, re.MULTILINE) for name in ("parameters", "full", "LoRA"))
    assert head and all(rows)
    sizes = [int(float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]) for size in head[1].split(" | ")]
    for row, is_lora in zip(rows, (False, True), strict=True):
        assert row and [float(rate) for rate in row[1].split(" | ")] == [suggested_rate(n, is_lora) for n in sizes]


@pytest.mark.slow
def test_the_commands_for_own_data_train(tmp_path) -> None:
    """The README's, as they are, with a model of the tests."""
    write_tiny_model(tmp_path / "model")
    write_chat_file(tmp_path / "mine.jsonl", 80, seed=0)
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


def test_task_of_the_page_scores_answers(tmp_path, monkeypatch) -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    shown = re.search(r"^    # triage.py:.*\n(?:(?:    .*)?\n)+", page, re.MULTILINE)
    assert shown
    (tmp_path / "triage.py").write_text(textwrap.dedent(shown[0]), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    task, answers = load_task("triage"), ["billing urgent", "urgent"]
    examples = [
        {"customer": name, "messages": [{"role": "assistant", "content": "billing"}]} for name in ("first", "second")
    ]
    result = {"model": "m", "data": "d", "n_examples": 2, "n_in_file": 2, "seconds": 1.0}
    result |= task.score(answers, examples, "d", None, "")
    text = full_report(task, result, None, 1)
    assert re.search(r"^F1 +0\.400 +0\.000 to 0\.667$", text, re.MULTILINE), text
    assert "(true: billing)" in text and load_metric("triage")(answers, examples) == {"f1": 0.4}


def read_figures(name: str) -> dict:
    return json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def test_quickstart_tables_show_the_kept_figures() -> None:
    """The tables of results.md equal docs/figures/quickstart.json. README has the scores of the newest run."""
    columns: dict[str, list[list[float]]] = {"f1": [], "note_f1": []}  # per seed: the model, then the programs
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for run in read_figures("quickstart")["seeds"]:
        for key, values in columns.items():
            programs = (run["programs"][name][key] for name in ("engine + note words", "thresholds", "rule engine"))
            values.append([run[key], *programs])
    for key, name in (("f1", "all rules"), ("note_f1", "rules decided by notes")):
        cells = [
            f"{fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})" for values in zip(*columns[key], strict=True)
        ]
        assert re.sub(r"(\S+) \((\S+)-\2\)", r"\1 (each)", f"\n{name} | {' | '.join(cells)}\n") in results
    newest = read_figures("quickstart")["facts_alone"]
    for name, values in newest["rows"].items():
        assert f"\n{name} | {' | '.join(f'{value:.3f}' for value in values)}" in results
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    model, words, *_ = newest["rows"]["F1, all rules"]
    assert f"has F1 {model:.3f} on unseen reports (one seed); a regression on words has {words:.3f}" in readme


def test_remedies_stand_in_the_order_of_the_table() -> None:
    """The table of forgetting.md equals docs/figures/pareto.json; the list has each best F1 below a KL of 0.2, the largest first."""
    page = (ROOT / "docs" / "forgetting.md").read_text(encoding="utf-8")
    names = {"anchored 1": "[anchored](#replay-anchored-to-the-base), weight 1", "self-replay": "the base's text"}
    names |= {"EWC 100": "[EWC](#ewc), strength 100", "replay": "replay", "plain": "plain"}
    names |= {"low rate": "a third of the rate", "anchored 4": "anchored, weight 4"}
    figures, best = read_figures("pareto"), []
    for arm, name in names.items():
        points = [
            tuple(fmean(figures[key][f"{arm}, alpha {alpha}"].values()) for key in ("F1", "KL"))
            for alpha in (1, 0.75, 0.5)
        ]
        assert f"\n{name} | {' | '.join(f'{f1:.3f}; {kl:.3f}' for f1, kl in points)}\n" in page, arm
        best += [max(f1 for f1, kl in points if kl < 0.2)] if arm != "anchored 4" else []
    assert best == sorted(best, reverse=True)
    remedies = page.partition("## Which remedy\n")[2].partition("\nEach cell")[0].split("\n- ")[1:]
    assert [re.search(r"0\.\d{3}", text)[0] for text in remedies] == [f"{f1:.3f}" for f1 in best]  # pyright: ignore


def test_full_corpus_tables_show_the_kept_figures() -> None:
    """The facts of notes by kind in results.md equal docs/figures/full_corpus.json."""
    figures = read_figures("full_corpus")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("\n", " ")
    programs = (figures["programs"][f"engine + note {name}"]["notes"] for name in ("words", "states"))
    columns = [figures["notes"], *programs]
    names = {"pledged assets": "pledged", "own shares": "own_shares", "unapproved profit": "profit"}
    for name, kind in (names | {"connected clients": "connected", "waivers": "waiver"}).items():
        row = " | ".join(f"{notes['kinds'][kind]['decided_f1']:.3f}" for notes in columns)
        assert f" {name} | {row} " in results
    assert " all | " + " | ".join(f"{notes['decided_f1']:.3f}" for notes in columns) + " " in results
    head = (
        f"F1 {figures['f1']:.3f}, of rules decided by notes {figures['note_f1']:.3f}, ROUGE-L {figures['rouge_l']:.3f}"
    )
    assert head in results


@pytest.mark.parametrize("name", ("settle", "knowledge"))
def test_declared_contrasts_show_the_kept_figures(name) -> None:
    """Each declared difference and its interval stand in results.md as in docs/figures/NAME.json."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("\n", " ")
    rows = [line.split(" | ") for line in read_figures(name)["report"] if "**" in line]
    assert rows
    for _, _, difference, interval, *rest in rows:
        outcome = next(cell for cell in rest if cell.startswith("**"))
        assert f"{difference} (95%: {interval}): {outcome}" in results


def test_kept_figures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()}
    assert len(sizes) == 5 and max(sizes.values()) < 50_000, sizes
    assert sum(path.stat().st_size for path in (ROOT / "docs").rglob("*") if path.is_file()) < 2_000_000


def test_answer_shown_on_page_is_parsed() -> None:
    page = (ROOT / "docs" / "xbrl.md").read_text(encoding="utf-8")
    shown = re.search(r"^    Note:\n(?:    .*\n)+", page, re.MULTILINE)
    assert shown
    answer, facts = parse_answer(textwrap.dedent(shown[0])), read_facts(textwrap.dedent(shown[0]))
    assert answer and not answer.void and answer.rule_ids == ("LCR_PLEDGED",)
    assert facts and facts[1] == 0 and [fact.kind for fact in facts[0]] == ["pledged"]


def test_pages_named_in_code_exist() -> None:
    gone = []
    for path in [*ROOT.glob("*.py"), *(f for room in ROOMS.split("|") for f in (ROOT / room).rglob("*.py"))]:
        for name in re.findall(r"(?<![\w/.])docs/[\w-]+\.md", path.read_text(encoding="utf-8")):
            if not (ROOT / name).exists():
                gone.append(f"{path.relative_to(ROOT)}: {name}")
    assert not gone, "\n".join(gone)
