"""Every script, and every command of a script, prints its --help when it is started outside of the repository."""

import re

import pytest

from tests.processes import ROOT, run_python

SCRIPTS = sorted(path for folder in ("scripts", "xbrl/scripts") for path in (ROOT / folder).glob("[!_]*.py"))
COMMANDS = re.compile(r"main_of\(__doc__, (.*)\)\)")
MOVED = "import moved"  # in the file of a command that has another path now
# All of them in one process, because each process would import the same libraries. Each is started like by Python.
DRIVER = """
import os, runpy, sys
root, *words = sys.argv[1:]
for word in words:
    script, *command = word.split()
    sys.argv = [os.path.join(root, script), *command, "--help"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        print(f"\\n{word}: {left.code}")
"""


@pytest.mark.slow
def test_help(tmp_path) -> None:
    started = []
    for path in SCRIPTS:
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if MOVED not in text:
            match = COMMANDS.search(text)
            started += [name] + [f"{name} {command}" for command in match[1].split(", ")] if match else [name]
    assert {"scripts/data.py clean", "scripts/measure.py forgetting", "xbrl/scripts/regulator.py cpt"} <= set(started)
    (tmp_path / "driver.py").write_text(DRIVER)
    done = run_python(tmp_path / "driver.py", ROOT, *started, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in started:
        usage = word.rpartition("/")[2]
        assert f"usage: {usage} " in done.stdout and f"\n{word}: 0\n" in done.stdout, done.stderr


def test_moved_commands_name_their_new_path() -> None:
    moved = [path for path in SCRIPTS if MOVED in path.read_text()]
    assert moved
    for path in moved:
        done = run_python(path, "--out", "x")
        new = re.search(r"is now (\S+);", done.stderr)
        assert done.returncode == 2 and new and (ROOT / new[1]).exists()
