import json

import pytest

from common.errors import UserError
from eval.comparison import measured
from eval.comparison.arms import Source, find_base, parse_arms, tokens_of
from eval.comparison.measured import Measuring, measure_arms
from tests.comparisons import general, row, task, write_run

RESULT = task([row(["A"], ["A"], "x")])


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("{}\n")
    return path


def measuring(data, **options):
    return Measuring(
        **{"data": data, "train": None, "base": None, "general": False, "out": data.parent / "out"} | options
    )


def test_arms_are_named_and_have_seeds(tmp_path, data):
    first, second = (write_run(tmp_path / name, RESULT, general(), data) for name in ("one", "two"))
    runs = tmp_path / "one", tmp_path / "two"
    assert parse_arms([f"full={runs[0]},{runs[1]}", f"{runs[1]}"]) == {
        "full": [Source(runs[0], "run"), Source(runs[1], "run")],
        "two": [Source(runs[1], "run")],
    }
    assert parse_arms([str(runs[0] / "export"), str(second)]) == {
        "one": [Source(runs[0], "run")],
        "two": [Source(second, "result")],  # named after its run
    }
    assert first.is_file() and tokens_of(Source(runs[0], "run")) == tokens_of(Source(first, "result")) == 1000


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["one"], "two arms or more"),
        (["a=one", "a=two"], "two arms have the name a"),
        (["a=", "b=one"], "names no run"),
        (["a=missing", "b=one"], "missing is neither .* it does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, data, monkeypatch, texts, sentence):
    for name in ("one", "two"):
        write_run(tmp_path / name, RESULT, general(), data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        parse_arms(texts)


def test_a_run_that_is_not_finished_is_refused(tmp_path, data):
    for name in ("one", "two"):
        write_run(tmp_path / name, RESULT, general(), data)
    arms = [str(tmp_path / "one"), str(tmp_path / "two")]
    with (tmp_path / "two" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": 1.0}\n{"st')
    with pytest.raises(UserError, match="two is not finished: its export is of step 2, and it has trained to step 3"):
        parse_arms(arms)
    (tmp_path / "two" / "export" / "export.json").unlink()
    with pytest.raises(
        UserError, match="two is not finished: it has no complete export; start its train.py command again"
    ):
        parse_arms(arms)


def test_the_base_is_that_of_the_runs(tmp_path, data):
    for name, base in (("one", "m"), ("two", "m"), ("three", "other")):
        write_run(tmp_path / name, RESULT, general(), data)
        (tmp_path / name / "config.json").write_text(json.dumps({"config": {"model": {"path": base}}}))
    assert find_base(parse_arms([str(tmp_path / "one"), str(tmp_path / "two")])) == "m"
    with pytest.raises(UserError, match="m .*one.* and other .*three.*; name it with --base"):
        find_base(parse_arms([str(tmp_path / "one"), str(tmp_path / "three")]))


def test_results_are_used_if_they_are_of_the_same_data_and_weights(tmp_path, data, monkeypatch):
    launched = []

    def launch(processes, script, *options):
        launched.append((processes, script, *options))
        path = options[options.index("--json") + 1]
        made = (
            RESULT | {"data_sha256": how.data_sha256, "weights": "new"}
            if script == "scripts/evaluate.py"
            else general(weights="new")
        )
        path.write_text(json.dumps(made))

    monkeypatch.setattr(measured, "launch", launch)
    monkeypatch.setattr(
        measured, "fingerprint_of_base", lambda path: "b" if path == "base" else weights[path.parent.name]
    )
    stored = [write_run(tmp_path / name, RESULT, general(), data) for name in ("one", "two")]
    weights = {"one": "one", "two": "two"}
    sources = parse_arms([str(tmp_path / "one"), str(tmp_path / "two")])
    how = measuring(data, base="base", general=True, train=data, processes=2)
    arms = measure_arms(sources, how)
    assert launched == [] and [arm.seeds[0].tokens for arm in arms] == [1000, 1000]

    weights["two"] = "new"  # the run was trained on
    arms = measure_arms(sources, how)
    export = tmp_path / "two" / "export"
    assert launched == [
        (2, "scripts/evaluate.py", export, "--data", data, "--json", stored[1], "--show", 0, "--train", data),
        (2, "scripts/measure.py", "forgetting", "base", export, "--json", stored[1].with_name("general.json")),
    ]
    assert arms[1].seeds[0].general["weights"]["tuned"] == "new"
    measure_arms(sources, how)
    assert len(launched) == 2  # kept

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    sources = parse_arms([str(tmp_path / "one"), f"a model={tmp_path / 'model'}"])
    weights[tmp_path.name] = "new"
    measure_arms(sources, measuring(data))
    assert launched[2][6] == tmp_path / "out" / "eval" / f"a_model-1-test-{how.data_sha256[:8]}.json"
    assert not list((tmp_path / "model").glob("eval*")) and len(launched) == 3


def test_results_that_do_not_belong_together_are_refused(tmp_path, data):
    first, second = (write_run(tmp_path / name, RESULT, general(), data) for name in ("one", "two"))
    sources = parse_arms([str(first), str(second)])
    arms = measure_arms(sources, measuring(data))
    assert arms[0].seeds[0].general and arms[0].seeds[0].tokens == 1000
    stored = json.loads(second.read_text())

    def refused(result, sentence):
        second.write_text(json.dumps(result))
        with pytest.raises(UserError, match=sentence):
            measure_arms(sources, measuring(data))

    refused(stored | {"n_examples": 5}, "different examples .n_examples differs.* same --limit")
    refused(stored | {"answers": [row(["B"], ["A"], "x")]}, "do not agree on the true answers")
    refused(stored | {"data_sha256": "1" * 64}, "was measured on other data .test.jsonl. than")
    second.write_text(json.dumps(stored))
    other = second.with_name("general.json")
    other.write_text(json.dumps(general(weights="two") | {"text": "news"}))
    with pytest.raises(UserError, match="the general text, or the base model, of .* differs"):
        measure_arms(sources, measuring(data))
    for text in ("{", "{}", "[]"):
        other.write_text(text)
        with pytest.raises(UserError, match="general.json is damaged"):
            measure_arms(sources, measuring(data))
