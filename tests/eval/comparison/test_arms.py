"""The arms of a comparison from the command line, and the measurement of missing results."""

import json

import pytest

from common.errors import UserError
from eval.comparison import measured
from eval.comparison.arms import Source, final_validation, find_base, parse_arms, validation_data
from eval.comparison.measured import Measuring
from tests.comparisons import general, row, task, write_run

RESULT = task([row(["A"], ["A"], "x")])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write the test file into the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "test.jsonl"
    path.write_text("{}\n")
    return path


@pytest.fixture
def runs(tmp_path, data):
    """Write the runs `one` and `two`. Return the paths of their results."""
    return [write_run(tmp_path / name, RESULT, general(), data) for name in ("one", "two")]


def measuring(data, **options):
    known = {"data": data, "train": None, "base": None, "general": False, "out": data.parent / "out"}
    return Measuring(**known | options)


def test_arms_are_named_and_have_seeds(tmp_path, runs):
    one, two = (Source(tmp_path / name, "run") for name in ("one", "two"))
    assert parse_arms([f"full={one.path},{two.path}", f"{two.path}"]) == {"full": [one, two], "two": [two]}
    result = Source(runs[1], "result")
    # An export is named after its run.
    assert parse_arms([str(one.path / "export"), str(runs[1])]) == {"one": [one], "two": [result]}
    assert one.tokens == result.tokens == 1000 and Source(tmp_path / "x.json", "result").tokens is None


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["one"], "two arms or more"),
        (["a=one", "a=two"], "two arms have the name a"),
        (["a=", "b=one"], "names no run"),
        (["a=missing", "b=one"], "missing is neither .* it does not exist"),
        (["a=adapter", "b=one"], "adapter is an adapter; name the merged weights"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, runs, texts, sentence):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        parse_arms(texts)


def test_a_run_that_is_not_finished_is_refused(tmp_path, runs):
    with (tmp_path / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": 1.0}\n{"st')
    with pytest.raises(UserError, match="two is not finished: its export is of step 2, and it has trained to step 3"):
        parse_arms(["one", "two"])
    (tmp_path / "two" / "export" / "export.json").unlink()
    with pytest.raises(UserError, match="two is not finished: it has no complete export; start its train.py command"):
        parse_arms(["one", "two"])


def test_the_base_is_that_of_the_runs(tmp_path, data):
    for name, base in (("one", "m"), ("two", "m"), ("three", "other")):
        write_run(tmp_path / name, RESULT, general(), data)
        (tmp_path / name / "config.json").write_text(json.dumps({"config": {"model": {"path": base}}}))
    assert find_base(parse_arms(["one", "two"])) == "m"
    with pytest.raises(UserError, match="m .one. and other .three.; name it with --base"):
        find_base(parse_arms(["one", "three"]))


def test_results_of_same_data_and_weights_are_used(tmp_path, data, runs, monkeypatch):
    launched = []

    def launch(processes, script, *options):
        launched.append((processes, script, *options))
        path, sha = options[options.index("--json") + 1], json.loads(runs[0].read_text())["data_sha256"]
        made = RESULT | {"data_sha256": sha, "weights": "new"}
        path.write_text(json.dumps(made if script == "scripts/evaluate.py" else general(weights="new")))

    def fingerprint(path):
        return "b" if path == "base" else weights[path.parent.name]

    monkeypatch.setattr(measured, "launch", launch)
    monkeypatch.setattr(measured, "fingerprint_of_base", fingerprint)
    weights = {"one": "one", "two": "two", tmp_path.name: "new"}
    sources = parse_arms([str(tmp_path / name) for name in ("one", "two")])
    how = measuring(data, base="base", general=True, train=data, processes=2)
    assert [arm.seeds[0].tokens for arm in how.arms(sources)] == [1000, 1000] and launched == []

    weights["two"] = "new"  # the run was trained on
    arms, export = how.arms(sources), tmp_path / "two" / "export"
    assert launched == [
        (2, "scripts/evaluate.py", export, "--data", data, "--json", runs[1], "--show", 0, "--train", data),
        (2, "scripts/measure.py", "forgetting", "base", export, "--json", runs[1].with_name("general.json")),
    ]
    assert arms[1].seeds[0].general["weights"]["tuned"] == "new"
    how.arms(sources)
    assert len(launched) == 2  # kept

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    measuring(data).arms(parse_arms([str(tmp_path / "one"), f"a model={tmp_path / 'model'}"]))
    assert launched[2][6] == tmp_path / "out" / "eval" / f"a_model-1-{runs[0].name}"
    assert not list((tmp_path / "model").glob("eval*")) and len(launched) == 3

    measuring(data, task="mine").arms(sources)
    assert [options[-2:] for options in launched[3:]] == [("--task", "mine")] * 2


def test_results_that_do_not_belong_together_are_refused(data, runs):
    sources, second = parse_arms([*map(str, runs)]), runs[1]
    arms = measuring(data).arms(sources)
    assert arms[0].seeds[0].general and arms[0].seeds[0].tokens == 1000
    stored, other = json.loads(second.read_text()), second.with_name("general.json")

    def refused(path, text, sentence):
        before = path.read_text()
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            measuring(data).arms(sources)
        path.write_text(before)

    for change, sentence in (
        ({"n_examples": 5}, "different examples .n_examples differs.* same --limit"),
        ({"answers": [row(["B"], ["A"], "x")]}, "do not agree on the true answers"),
        ({"data_sha256": "1" * 64}, "was measured on other data .test.jsonl. than"),
    ):
        refused(second, json.dumps(stored | change), sentence)
    refused(
        other, json.dumps(general(weights="two") | {"text": "news"}), "the general text, or the base model, of .* dif"
    )
    for text in ("{", "{}", "[]"):
        refused(other, text, "general.json is not the JSON of an evaluation .*; remove it, and it is measured again")


def test_results_of_any_name_in_a_run_are_used(tmp_path, data, runs, monkeypatch):
    monkeypatch.setattr(measured, "launch", lambda *options: pytest.fail(f"measured: {options}"))
    monkeypatch.setattr(measured, "fingerprint_of_base", lambda path: path.parent.name)
    runs[0].rename(tmp_path / "one" / "after.json")
    quick = json.loads(runs[1].read_text()) | {"n_examples": 1, "n_in_file": 9}
    runs[1].with_name("quick.json").write_text(json.dumps(quick))  # of few examples, so it is no result of the file
    sources = parse_arms(["one", "two"])
    stored = measuring(data).stored(sources)
    assert stored.missing == [] and stored.limit is None
    assert [seed.task["n_in_file"] for arm in measuring(data).arms(sources, stored) for seed in arm.seeds] == [1, 1]


def test_nothing_is_measured_before_all_checks(tmp_path, data, runs, monkeypatch):
    """The first run has no result yet, and the stored result of the second one is refused."""
    launched = []
    monkeypatch.setattr(measured, "launch", lambda *options: launched.append(options))
    runs[0].unlink()
    runs[1].write_text(json.dumps(json.loads(runs[1].read_text()) | {"data_sha256": "1" * 64}))
    with pytest.raises(UserError, match="was measured on other data"):
        measuring(data).arms(parse_arms(["one", str(runs[1])]))
    assert launched == []


def test_missing_results_have_the_limit_of_stored_ones(tmp_path, data, runs, monkeypatch):
    launched = []

    def launch(processes, script, *options):
        launched.append(options)
        options[options.index("--json") + 1].write_text(limited)

    monkeypatch.setattr(measured, "launch", launch)
    monkeypatch.setattr(measured, "fingerprint_of_base", lambda path: path.parent.name)
    limited = json.dumps(json.loads(runs[1].read_text()) | {"n_in_file": 9})
    runs[1].write_text(limited)
    runs[0].unlink()
    measuring(data).arms(parse_arms(["one", str(runs[1])]))
    assert launched[0][-2:] == ("--limit", 1)


def write_config(run, **settings):
    (run / "config.json").write_text(json.dumps({"config": {"data": {"train": ["a.jsonl"], **settings}}}))


def test_configs_name_the_validation_file(tmp_path, data, runs):
    for name in ("one", "two"):
        write_config(tmp_path / name, validation=["test.jsonl"], format="messages", fields={"messages": "chosen"})
        with (tmp_path / name / "metrics.jsonl").open("a") as file:  # run.eval_generate adds a text
            file.write(json.dumps({"step": 2, "validation/sample": "an answer"}) + "\n")
    sources = parse_arms(["one", "two"])
    assert validation_data(sources) == ("test.jsonl", "messages", {"messages": "chosen"})
    assert final_validation(sources) == {"validation/loss": {"one": [1.5], "two": [1.5]}}
    write_config(tmp_path / "two", validation=["other.jsonl"])
    with pytest.raises(UserError, match="one has test.jsonl; two has other.jsonl.*--data FILE"):
        validation_data(sources)
    for name in ("one", "two"):
        write_config(tmp_path / name, validation=[], validation_share=0.1)
    with pytest.raises(UserError, match="one, .*two: none, because validation was a share"):
        validation_data(parse_arms(["one", "two"]))
    write_config(tmp_path / "one", validation=["test.jsonl"])
    assert final_validation(sources) == {}
