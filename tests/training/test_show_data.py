"""The data of a config as its run reads it: which example is shown, and the command with its mistakes."""

import json
import random
import re

import pytest

from common.errors import UserError
from configs.config import Data, Source
from data.store import STORE_FILE
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model
from training.show_data import choose, examples_of, find, show_data

SCRIPT = ("scripts/data.py", "show")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    write_chat_file(folder / "a.jsonl", 12)
    write_chat_file(folder / "b.jsonl", 8, seed=1)
    (folder / "extra.jsonl").write_text(json.dumps({"text": "own funds \x1b[31m"}) + "\n")
    (write_tiny_model(folder / "model") / "model.safetensors").unlink()  # not needed
    (folder / "config.py").write_text(
        f"""
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Source

config = Config(
    model=Model("{folder}/model"),
    data=Data(
        ("{folder}/a.jsonl", "{folder}/b.jsonl"), sequence_length=120,
        mix=(Source("extra", ("{folder}/extra.jsonl",), 0.05),), cache=None,
    ),
    batch=Batch(4),
    optimizer=Optimizer(1e-4, epochs=1),
    run=Run("r", directory="{folder}/runs"),
)
"""
    )
    return folder


def test_index_counts_over_all_files(folder):
    files = (str(folder / "a.jsonl"), str(folder / "b.jsonl"))
    data = Data(files, mix=(Source("extra", (str(folder / "extra.jsonl"),), 0.05),))
    index, where, example = find(data, "main", 13)
    assert (index, where) == (13, f"{folder}/b.jsonl, line 2")
    assert example["messages"][0]["content"].startswith("Report 1: ")
    assert find(data, "extra", 0)[1] == f"{folder}/extra.jsonl, line 1"
    # A random choice is even and in order.
    rng, seen = random.Random(0), [0] * 20
    for _ in range(60):
        chosen = choose(data, "main", 5, rng)
        indices = [index for index, _, _ in chosen]
        assert len(set(indices)) == 5 and indices == sorted(indices)
        assert all(find(data, "main", i)[1] == where for i, where, _ in chosen[:1])
        for index in indices:
            seen[index] += 1
    assert min(seen) >= 5 and max(seen) <= 28  # 15 on average, standard deviation 3.4
    assert [index for index, _, _ in choose(data, "main", 50, rng)] == list(range(20))


def test_a_token_store_has_no_examples(folder, tmp_path):
    (tmp_path / STORE_FILE).write_text("{}")
    with pytest.raises(UserError, match="is a token store, which keeps no examples"):
        next(examples_of(Data((str(tmp_path),))))


def test_command_needs_no_weights(folder, capfd):
    done = run_python(*SCRIPT, folder / "config.py", "data.too_long=truncate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("data.train:\n  20 examples") and "source extra:\n  1 example" in done.stdout
    assert "length in tokens:" in done.stdout
    shown = re.search(r"=== example (\d+) of data.train \((.*)\)\n", done.stdout)
    assert shown, done.stdout
    show_data(str(folder / "config.py"), ("data.too_long=truncate",), int(shown[1]), None)
    again = capfd.readouterr().out
    assert done.stdout.endswith(again) and "⟦" in again and shown[2] in again


def test_control_characters_are_escaped(folder, capfd):
    show_data(str(folder / "config.py"), (), None, 3, "extra")
    shown = capfd.readouterr().out
    assert "\x1b" not in shown and "⟨U+001B⟩[31m" in shown


def test_mistakes_are_one_sentence(folder):
    config = str(folder / "config.py")
    for overrides, index, source, message in (
        ((), 20, "main", "data.train has 20 examples, so --index must be 0 to 19, not 20"),
        ((), 0, "law", "the config has no source law; choose one of main, extra"),
        (("data.train=none.jsonl",), 0, "main", "none.jsonl does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            show_data(config, overrides, index, None, source)
