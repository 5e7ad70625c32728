"""Mistakes in a config file end in one sentence that names the file and, where possible, the line."""

import pytest

from common.errors import UserError
from configs.load import load_config

GOOD = """from configs.config import *
config = Config(
    model=Model("m"),
    data=Data(("a.jsonl",)),
    batch=Batch(global_examples=8),
    optimizer=Optimizer(1e-4),
    run=Run("r"),
)
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("Batch(", "Bach(", "bad.py, line 5: Bach is not defined; did you mean Batch?"),
        ("import *", "import Config, Modle", "bad.py, line 1: Modle is not defined; did you mean Model?"),
        ('Model("m")', 'Model("m", compute_dtype=bf16)', "bad.py, line 3: bf16 is not defined; a string needs quotes"),
        ("1e-4", "1 / 0", "bad.py, line 6: ZeroDivisionError: division by zero"),
        (
            "import *",
            "import *\nimport no_such_module",
            "line 2: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "import *",
            "import *\nraise SystemExit(3)",
            "line 2: the file ends the program (SystemExit: 3); let it end with `config = Config(...)`",
        ),
        (
            "import *",
            "import *\nimport sys\nsys.exit()",
            "line 3: the file ends the program (SystemExit: 0); let it end with `config = Config(...)`",
        ),
        ('    run=Run("r"),\n', "", "bad.py, line 2: Config needs a value for 'run'"),
        ('Model("m")', '"m"', "bad.py: model must be Model(...), not 'm'"),
        ('("a.jsonl",)', '("a.jsonl")', "data.train must be a tuple of strings, not 'a.jsonl'; write ('a.jsonl',)"),
        ('("a.jsonl",)', '["a.jsonl"]', "data.train must be a tuple of strings, not ['a.jsonl']"),
        ("1e-4", '"1e-4"', "optimizer.learning_rate must be a number, not '1e-4'"),
    ],
)
def test_a_mistake_gives_a_one_line_error(tmp_path, old, new, message) -> None:
    path = tmp_path / "bad.py"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


def test_a_directory_is_not_a_config_file(tmp_path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    with pytest.raises(UserError, match=r"is a directory; available: .*good\.py"):
        load_config(tmp_path)


def test_an_unknown_override_does_not_list_all_keys(tmp_path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    with pytest.raises(UserError, match=r"^unknown key qqq\.zzz; configs/config\.py describes all keys$"):
        load_config(tmp_path / "good.py", ["qqq.zzz=1"])
