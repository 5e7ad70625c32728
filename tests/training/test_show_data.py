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
from training.show_data import choose, examples_of, find

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


def data_of(folder, **settings):
    files = (str(folder / "a.jsonl"), str(folder / "b.jsonl"))
    return Data(files, mix=(Source("extra", (str(folder / "extra.jsonl"),), 0.05),), **settings)


def test_an_index_counts_over_all_files(folder):
    data = data_of(folder)
    index, where, example = find(data, "main", 13)
    assert (index, where) == (13, f"{folder}/b.jsonl, line 2")
    assert example["messages"][0]["content"].startswith("Report 1: ")
    assert find(data, "extra", 0)[1] == f"{folder}/extra.jsonl, line 1"
    with pytest.raises(UserError, match="data.train has 20 examples, so --index must be 0 to 19, not 20"):
        find(data, "main", 20)
    with pytest.raises(UserError, match="the config has no source law; choose one of main, extra"):
        find(data, "law", 0)


def test_a_random_choice_is_even_and_in_order(folder):
    data = data_of(folder)
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


def test_the_command_shows_a_summary_and_one_example_without_the_weights(folder):
    done = run_python(*SCRIPT, folder / "config.py", "data.too_long=truncate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("data.train:\n  20 examples") and "source extra:\n  1 example" in done.stdout
    assert "length in tokens:" in done.stdout and re.search(
        r"steps: [\d,]+ to [\d,]+ tokens in all 5 steps", done.stdout
    )
    shown = re.search(r"=== example (\d+) of data.train \((.*)\)\n", done.stdout)
    assert shown, done.stdout
    again = run_python(*SCRIPT, folder / "config.py", "--index", shown[1], "data.too_long=truncate")
    assert again.returncode == 0 and done.stdout.endswith(again.stdout)
    assert "\x1b" not in done.stdout and "⟦" in again.stdout and shown[2] in again.stdout


def test_control_characters_of_the_data_do_not_reach_the_terminal(folder):
    done = run_python(*SCRIPT, folder / "config.py", "--source", "extra", "--random", 3)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "⟨U+001B⟩[31m" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--index", 20), "so --index must be 0 to 19, not 20"),
        (("--index", -1), "--index must be 0 or more, not -1"),
        (("--random", 0), "--random must be 1 or more, not 0"),
        (("--source", "law", "--index", 0), "has no source law"),
        (("data.train=none.jsonl", "--index", 0), "none.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, message):
    done = run_python(*SCRIPT, folder / "config.py", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
