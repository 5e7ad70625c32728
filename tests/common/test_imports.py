"""Which directory may import which, checked in the lines of every module, and that the core does not name the case."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
CORE = {"common", "configs", "data", "distributed", "eval", "model", "training", "train"}
# Directory, or module in the root -> which of them its modules may import. The core depends on nothing else: the scripts start
# train.py as a child, or import from the core.
ALLOWED = {
    "common": {"common"},
    "configs": {"common", "configs"},  # a mistake in a config ends before torch is imported
    "data": CORE - {"train", "training"},
    "distributed": CORE - {"train", "training"},
    "model": CORE - {"train", "training"},
    "eval": CORE - {"train", "training"},
    "training": CORE - {"train"},
    "train": CORE,
    "xbrl": CORE | {"xbrl"},
    "scripts": CORE | {"scripts"},
    "tests": CORE | {"scripts", "tests", "xbrl"},
}
# Words of the case, which only its own files may have. Paths of its commands and configs count, too: `configs/xbrl.py`.
CASE = re.compile(
    r"xbrl|\bbanks?\b|supervisor|regulator\b|\brule ids?\b|own funds|competent authority|tier 1|liquidity coverage"
    r"|\bCOREP\b|\bCRR\b|fact_f1",
    re.IGNORECASE,
)
# The last four are stubs that name the new path of a moved command.
OF_THE_CASE = re.compile(
    r"xbrl/.*|configs/(xbrl\w*|quickstart)\.py|scripts/quickstart\.sh|scripts/(analyze|make_reports|read_report|regulator)\.py"
)

IMPORT = re.compile(r"^ *(?:from (\S+) import |import (\w[\w., ]*))", re.MULTILINE)


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import in a file, including those inside functions and in programs that it has as text."""
    text = path.read_text(encoding="utf-8")
    lines = [(text.count("\n", 0, match.start()) + 1, match[1] or match[2]) for match in IMPORT.finditer(text)]
    return [(line, name.split()[0]) for line, names in lines for name in names.split(",")]


def modules(directory: str) -> list[Path]:
    return sorted((ROOT / directory).rglob("*.py")) or [ROOT / f"{directory}.py"]


def test_every_package_has_a_rule() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(ALLOWED)


@pytest.mark.parametrize("directory", ALLOWED)
def test_modules_import_what_their_directory_may(directory) -> None:
    ours = set(ALLOWED) | SCRIPTS  # a script is importable by its bare name if its directory is on sys.path
    wrong = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in modules(directory)
        for line, name in imports(path)
        if name.split(".")[0] in ours - ALLOWED[directory] or name.startswith(".")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("directory", sorted(set(ALLOWED) - {"xbrl", "tests"}))
def test_core_and_scripts_do_not_name_the_case(directory) -> None:
    wrong = []
    for path in modules(directory):
        if OF_THE_CASE.fullmatch(str(path.relative_to(ROOT))):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if CASE.search(line):
                wrong.append(f"{path.relative_to(ROOT)}, line {number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_programs_import_ours_before_transformers() -> None:
    """`common` then filters the messages of the libraries that transformers imports."""
    for path in [path for directory in ALLOWED if directory != "tests" for path in modules(directory)]:
        names = [name.split(".")[0] for _, name in imports(path)]
        if "__main__" in path.read_text(encoding="utf-8") and "transformers" in names:
            assert set(names[: names.index("transformers")]) & CORE, path


UNPICKLES = re.compile(
    r"\bpickle\b|\b(dill|cloudpickle|joblib|shelve|marshal)\b|torch\.load\b|allow_pickle|weights_only=False"
)


@pytest.mark.parametrize("directory", sorted(set(ALLOWED) - {"tests"}))
def test_no_module_unpickles_a_file(directory) -> None:
    """distributed/checkpoint_index.py alone reads a pickle, and resolves none of its names."""
    wrong = []
    for path in modules(directory):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line.strip() for line in code.splitlines() if UNPICKLES.search(line)]
        if path.name == "checkpoint_index.py":
            assert not [line for line in lines if re.search(r"pickle\.loads?\b|super\(\)\.find_class", line)]
            continue
        wrong += [f"{path.relative_to(ROOT)}: {line}" for line in lines if "memory_rank_" not in line]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["answers", "desk", "read", "rules"])
def test_invented_banks_are_not_imported_elsewhere(room) -> None:
    """The desk judges real banks. `xbrl/corpus` invents banks and their training examples."""
    wrong = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in modules(f"xbrl/{room}")
        for line, name in imports(path)
        if name.startswith("xbrl.corpus")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_desk_loads_no_invented_bank() -> None:
    names = [
        f"xbrl.desk.{path.stem}" for path in modules("xbrl/desk") if path.stem not in ("__init__", "model_answers")
    ]
    code = f"import sys, {', '.join(names)}\nprint([name for name in sys.modules if name.startswith('xbrl.corpus')])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
