import subprocess
import sys

import pytest

from common.command_line import add_number, check_new, main_of, new_parser
from common.errors import UserError
from tests.processes import ROOT


def parse(*words, **settings):
    parser = new_parser("A docstring.")
    add_number(parser, "--count", "how many", **settings)
    return parser.parse_args(words).count


def test_number_option_has_type_and_minimum():
    assert parse("--count", "3", default=1, least=1) == 3 and parse(default=1, least=1) == 1 and parse() is None
    assert parse("--count", "0.5", default=1.0) == parse("--count", "0.5", kind=float) == 0.5
    with pytest.raises(UserError, match="--count must be 1 or more, not 0"):
        parse("--count", "0", default=4, least=1)
    with pytest.raises(UserError, match="--count must be 0 or more, not nan"):
        parse("--count", "nan", default=1.0, least=0)
    for word in ("0.5", "32k"):
        with pytest.raises(UserError, match=f"^--count must be a whole number in digits, not {word}$"):
            parse("--count", word, default=1)
    with pytest.raises(UserError, match="^--count must be a number in digits, not 24GB$"):
        parse("--count", "24GB", kind=float)


def test_first_word_selects_the_subcommand(monkeypatch, capsys):
    def show(parser):
        """Show something.

        At length.
        """
        parser.add_argument("what")
        return {"three": 3}[parser.parse_args().what]

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["scripts/tool.py", *words])
        return main_of("A tool.", show)()

    assert run("show", "three") == 3
    for words, text in ((["--help"], "show         Show something."), (["show", "--help"], "At length.")):
        with pytest.raises(SystemExit) as left:
            run(*words)
        assert left.value.code == 0 and text in capsys.readouterr().out
    for words in ([], ["shwo"]):
        with pytest.raises(SystemExit) as left:
            run(*words)
        assert left.value.code == 2 and "usage: tool.py [-h] {show}" in capsys.readouterr().err
    with pytest.raises(UserError, match="unrecognized arguments: four .tool.py show --help."):
        run("show", "three", "four")


def test_an_existing_output_is_refused(tmp_path):
    check_new(tmp_path / "new")
    with pytest.raises(UserError, match="exists; remove it or choose another --out"):
        check_new(tmp_path)


def test_closed_pipe_is_no_error():
    program = """
from common.command_line import reader_may_leave
with reader_may_leave():
    for _ in range(100_000):
        print("a line")
"""
    lines = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert lines.stdout.readline() == b"a line\n"
    lines.stdout.close()
    assert lines.stderr.read() == b"" and lines.wait() == 0
