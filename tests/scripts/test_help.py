"""Every script, and every command of a script, prints its --help when it is started outside of the repository."""

import re

import pytest

from tests.processes import ROOT, run_python

SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("[!_]*.py"))
COMMANDS = re.compile(r"main_of\(__doc__, (.*)\)\)")
# All of them in one process, because each process would import the same libraries. Each is started like by Python.
DRIVER = """
import os, runpy, sys
root, *words = sys.argv[1:]
for word in words:
    script, *command = word.split()
    sys.path[0] = os.path.join(root, "scripts")
    sys.argv = [os.path.join(sys.path[0], script), *command, "--help"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as left:
        print(f"\\n{word}: {left.code}")
"""


@pytest.mark.slow
def test_help(tmp_path) -> None:
    started = list(SCRIPTS)
    for name in SCRIPTS:
        found = COMMANDS.search((ROOT / "scripts" / name).read_text())
        started += [f"{name} {command}" for command in found[1].split(", ")] if found else []
    assert {"data.py clean", "measure.py forgetting", "regulator.py law"} <= set(started)
    (tmp_path / "driver.py").write_text(DRIVER)
    done = run_python(tmp_path / "driver.py", ROOT, *started, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in started:
        assert f"usage: {word} " in done.stdout and f"\n{word}: 0\n" in done.stdout, done.stderr
