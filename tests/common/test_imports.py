"""Which directory may import which, checked in the syntax tree of every module."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
CORE = {"common", "configs", "data", "distributed", "eval", "model", "training", "train"}
# Directory, or module in the root -> which of them its modules may import. Nothing may import scripts. The core depends on
# nothing else: what surrounds it starts train.py as a child, or imports from the core.
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
    "experiment": {"common", "configs", "eval", "experiment"},
    "tools": CORE | {"tools"},
    "scripts": CORE | {"experiment", "tools", "xbrl"},
    "tests": CORE | {"experiment", "tests", "tools", "xbrl"},
}


@functools.cache
def imports(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, including those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}, line {node.lineno}: relative import"
            # `from a import b` may import the module a.b.
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def modules(directory: str) -> list[Path]:
    return sorted((ROOT / directory).rglob("*.py")) or [ROOT / f"{directory}.py"]


def test_every_package_has_a_rule() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(ALLOWED)


@pytest.mark.parametrize("directory", ALLOWED)
def test_a_module_imports_only_what_its_directory_may_import(directory) -> None:
    ours = set(ALLOWED) | SCRIPTS  # a script is importable by its bare name if its directory is on sys.path
    wrong = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in modules(directory)
        for line, name in imports(path)
        if name.split(".")[0] in ours - ALLOWED[directory]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_test_loads_a_script_by_its_path() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in modules("tests")
        for line, name in imports(path)
        if name.split(".")[0] in ("importlib", "runpy") and not name.startswith("importlib.metadata")
    ]
    assert not wrong, "\n".join(wrong)
