"""A run's identity: a resume refuses every change that decides the weights, by name, and no other change."""

import dataclasses
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest

import common.sha256
from common.errors import UserError
from common.sha256 import sha256
from configs.config import DECIDES, FREE, READ, Batch, Config, Data, Model, Optimizer, Run, Source
from data.dealing import length_as_cost
from data.tokens import load_tokenizer
from model import weight_digests
from model.architectures import read_model_config
from model.weight_digests import remembered_sha256
from model.weight_files import hash_weights
from tests.distributed.launch import flip_bit, launch, run_of, workplace
from tests.processes import ROOT
from tests.tiny import write_chat_file, write_tiny_model
from training import identity
from training.identity import (
    check_identity,
    code_of,
    code_of_row,
    differences,
    digest_of_row,
    fingerprint,
    free_settings,
    hash_files,
    identity_of,
    scores_module,
)
from training.inputs import read_inputs

OFF = {"the code": {"train.py": "1"}, "the scores' code": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    write_tiny_model(folder / "model")
    write_chat_file(folder / "train.jsonl", 20, seed=0)
    write_chat_file(folder / "other.jsonl", 20, seed=1)
    return folder


def config_of(folder: Path) -> Config:
    return Config(
        Model(str(folder / "model"), compute_dtype="fp32"),
        Data((str(folder / "train.jsonl"),), sequence_length=256, cache=None),
        Batch(global_examples=4),
        Optimizer(1e-3, epochs=2),
        Run("r"),
    )


def with_value(config: Config, name: str, value: object) -> Config:
    section, _, key = name.partition(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})


@pytest.fixture
def of(tmp_path, monkeypatch):
    """Config -> (identity, free settings), from real files."""
    monkeypatch.setattr(weight_digests, "MEMORY", tmp_path / "sha256")

    def made(config: Config, code: dict = OFF) -> tuple[dict, dict]:
        path = config.model.path
        model, tokenizer = read_model_config(path), load_tokenizer(path, config.data.chat_template)
        inputs = read_inputs(config, tokenizer, model.vocab_size, length_as_cost, 1, show_progress=False)
        inputs = dataclasses.replace(inputs, files={"the weights": hash_weights(path), **code})
        return identity_of(config, inputs, model, tokenizer), free_settings(config, inputs, 1, "cpu in float32")

    return made


def test_every_config_key_is_classified() -> None:
    keys = {
        f"{name}.{field.name}"
        for name, section in typing.get_type_hints(Config).items()
        for field in dataclasses.fields(section)
    }
    groups = [*DECIDES, *READ, *FREE]
    assert keys - set(groups) == set(), "say in configs/config.py whether a new key decides the weights"
    assert set(groups) == keys and len(set(groups)) == len(groups)


OTHER = {
    "model.compute_dtype": "bf16",
    "model.router_aux": 0.01,
    "data.sequence_length": 128,
    "data.packing": False,
    "batch.global_examples": 5,
    "optimizer.learning_rate": 1e-5,
    "optimizer.warmup_ratio": 0.1,
    "optimizer.warmup_steps": 3,
    "optimizer.min_lr_ratio": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": (0.9, 0.99),
    "optimizer.eps": 1e-6,
    "optimizer.max_grad_norm": 2.0,
    "optimizer.skip_spikes": 6.0,
    "optimizer.memory": "8N",
    "sharding.reduce_dtype": "bf16",
    "lora.rank": 4,
    "run.seed": 1,
}


def test_changed_deciding_settings_are_refused_by_name(folder, of) -> None:
    config = config_of(folder)
    first, _ = of(config)
    assert first == json.loads(json.dumps(first))  # as a manifest gives it back
    for name, value in OTHER.items():
        phrases = differences(first, of(with_value(config, name, value))[0])
        expected = [f"{name}={first['settings'][name]}, now it is {json.loads(json.dumps(value))}"]
        if name == "lora.rank":
            expected.insert(0, "lora.alpha=None, now it is 8.0")
        assert [difference for difference in phrases if "=" in difference] == expected
    rest = ("ewc.", "forgetting.", "lora.", "model.part", "model.rope_", "data.chat_date", "batch.global_tokens")
    assert set(DECIDES) == {*OTHER, *(name for name in DECIDES if name.startswith(rest))}


def test_an_anchor_and_its_weight_decide(folder, of) -> None:
    config, mix = config_of(folder), Source("base", (str(folder / "other.jsonl"),), 0.1)
    plain, heavier = with_value(config, "data.mix", (mix,)), with_value(config, "forgetting.anchor_weight", 2.0)
    assert fingerprint(of(config)[0]) == fingerprint(of(heavier)[0])  # nothing is anchored
    anchored = with_value(plain, "data.mix", (dataclasses.replace(mix, anchor=True),))
    first = of(anchored)[0]
    assert "another data.mix" in differences(of(plain)[0], first)
    phrases = differences(first, of(with_value(anchored, "forgetting.anchor_weight", 2.0))[0])
    assert phrases == ["forgetting.anchor_weight=1.0, now it is 2.0"]


def test_free_settings_are_listed_and_not_refused(folder, of) -> None:
    config = with_value(config_of(folder), "data.validation", (str(folder / "other.jsonl"),))
    first, settings = of(config)
    values = {"optimizer.epochs": 3, "optimizer.max_steps": 7, "data.validation": (str(folder / "train.jsonl"),)}
    write_chat_file(folder / "keep.jsonl", 24)
    values |= {
        "forgetting.keep": str(folder / "keep.jsonl"),
        "batch.micro_batch": 2,
        "data.cache": str(folder / "tokens"),
        "run.log_to": (),
    }
    for name in FREE:
        section, _, key = name.partition(".")
        now = getattr(getattr(config, section), key)
        if name in ("run.eval_generate", "run.best_by", "eval.metric", "eval.max_new_tokens", "model.layer_class"):
            continue  # they need others, or are a name that is looked up
        changed_value = not now if isinstance(now, bool) else now + 1 if isinstance(now, int | float) else "other"
        value = values.get(name, changed_value)
        changed, listed = of(with_value(config, name, value))
        assert differences(first, changed) == [], name
        assert fingerprint(changed) == fingerprint(first)
        saved = {"identity": first, "settings": settings, "step": 4}
        _, lines = check_identity(Path("c"), saved, changed, listed, "auto")
        assert lines[0] == "changed since step 4 was saved:"
        assert any(line.startswith(f"    {name}: ") for line in lines), (name, lines)


def test_file_contents_decide_and_not_names(folder, of, tmp_path) -> None:
    config = config_of(folder)
    first, settings = of(config)

    def found(**changes: object) -> list[str]:
        changed = config
        for name, value in changes.items():
            changed = with_value(changed, name.replace("__", "."), value)
        return differences(first, of(changed)[0])

    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "train.jsonl", tmp_path / "renamed.jsonl")
    same = {"model__path": str(tmp_path / "model"), "data__train": (str(tmp_path / "renamed.jsonl"),)}
    assert found(**same, data__format="messages", data__on_bad="skip") == []
    with (tmp_path / "renamed.jsonl").open("a") as file:
        file.write((folder / "other.jsonl").read_text().splitlines()[0] + "\n")
    assert found(**same) == ["other data in data.train"]
    mix = (Source("replay", (str(folder / "other.jsonl"),), 0.2),)
    assert found(data__mix=mix) == ["another data.mix"]
    # One bit of the base's weights; the shape and the tokenizer of the base.
    weights = tmp_path / "model" / "model.safetensors"
    flip_bit(weights)
    assert found(model__path=str(tmp_path / "model")) == ["other weights in model.path (model.safetensors)"]
    shape = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 0.5, "dtype": "bfloat16"}))
    shutil.copy(folder / "model" / "model.safetensors", weights)
    (difference,) = found(model__path=str(tmp_path / "model"))
    assert difference == f"rms_norm_eps of config.json={shape['rms_norm_eps']}, now it is 0.5"
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert found(data__chat_template=str(tmp_path / "template"))[-1] == "another tokenizer in model.path"
    # What the data were made with is named beside them.
    now, listed = of(with_value(config, "data.sequence_length", 256))
    now["the data"] = now["the data"] | {"data.train": "x"}
    listed["data.too_long"] = "truncate"
    said = "other data in data.train; it may come from data.too_long: drop -> truncate; set it"
    with pytest.raises(UserError, match=said):
        check_identity(Path("c"), {"identity": first, "settings": settings, "step": 4}, now, listed, "auto")


def test_resume_changed_leaves_its_own_fingerprint(folder, of) -> None:
    """tests/distributed/test_durable_runs.py tests the messages."""
    config = config_of(folder)
    (first, settings), (changed_identity, _) = of(config), of(with_value(config, "optimizer.learning_rate", 1e-5))
    saved = {"identity": first, "settings": settings, "step": 4}
    assert check_identity(Path("step-000004"), saved, first, settings, "changed") == (first, [])
    merged, _ = check_identity(Path("step-000004"), saved, changed_identity, settings, "changed")
    assert len({fingerprint(each) for each in (first, changed_identity, merged)}) == 3
    # The next start of the changed run is that run; its history stays.
    saved = {"identity": merged, "settings": settings, "step": 6}
    assert check_identity(Path("step-000006"), saved, changed_identity, settings, "auto") == (merged, [])
    back, _ = check_identity(Path("step-000006"), saved, first, settings, "changed")
    assert [change["step"] for change in back["changed"]] == [4, 6]


# ---- the code ------------------------------------------------------------------------------------------------------------

FILES = {
    "train.py": "import json\nif TYPE_CHECKING:\n    import eval.types\nfrom room.loss import chunked\n\ndef main():\n    from room import late\n    from training import answers\n",
    "room/__init__.py": "",
    "room/loss.py": 'def chunked(x):\n    """Doc."""\n    return x * 2  # twice\n',
    "room/late.py": "from . import near\n",
    "room/near.py": "x = 1\n",
    "room/unused.py": "x = 1\n",
    "training/answers.py": "import eval.generate\n\ndef own():\n    import eval.metric\n",
    "eval/generate.py": "from room.loss import chunked\n",
    "eval/metric.py": "x = 1\n",
    "eval/types.py": "x = 1\n",
    "elsewhere/mine.py": "import helper\n",
    "elsewhere/helper.py": "x = 1\n",
    "elsewhere/kit/__init__.py": "x = 1\n",
    "elsewhere/kit/rows.py": "from . import near\n",
    "elsewhere/kit/near.py": "x = 1\n",
    "elsewhere/bare/loss.py": "import helper\n",  # in a package without an __init__.py
}


LOOP = ("train.py", "main of train.py")


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in after if after[name] != before[name]]


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))  # as PYTHONPATH does; undone with the next line
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
    return tmp_path


def test_code_is_compared_by_syntax_tree(code, monkeypatch) -> None:
    before, scores = code_of(code / "train.py")
    assert list(before) == [*(f"room/{name}.py" for name in ("__init__", "late", "loss", "near")), *LOOP] and not scores
    rewritten = '"""A module."""\n\n\ndef chunked(\n    x,\n):\n    "Another."\n    return (x) * 2\n'
    (code / "room" / "loss.py").write_text(rewritten)
    (code / "room" / "unused.py").write_text("x = 2\n")
    assert code_of(code / "train.py")[0] == before
    (code / "room" / "loss.py").write_text(FILES["room/loss.py"].replace("x * 2", "x * 3"))
    assert changed(before, code_of(code / "train.py")[0]) == ["room/loss.py"]
    for start, module in (("import mine\n", "mine.py"), ("from bare.loss import mine\n", "bare/loss.py")):
        (code / "room" / "loss.py").write_text(start + FILES["room/loss.py"])
        (code / "elsewhere" / "helper.py").write_text("x = 1\n")
        first = code_of(code / "train.py")[0]
        assert first.keys() - before.keys() == {f"elsewhere/{module}", "elsewhere/helper.py"}  # of PYTHONPATH
        (code / "elsewhere" / "helper.py").write_text("x = 2\n")
        assert changed(first, code_of(code / "train.py")[0]) == ["elsewhere/helper.py"]
    # So is a package that is installed as editable: edits do not change its version.
    (code / "kit").mkdir()
    (code / "kit" / "losses.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(code / "kit"))
    (code / "room" / "loss.py").write_text("import losses\n" + FILES["room/loss.py"])
    assert code_of(code / "train.py")[0].keys() - before.keys() == {"kit/losses.py"}
    # What is installed has a version, and is not read.
    (code / "room" / "loss.py").write_text("import torch, pytest, json\n" + FILES["room/loss.py"])
    assert code_of(code / "train.py")[0].keys() == before.keys()


def test_row_function_belongs_to_code_and_data(code, folder, monkeypatch) -> None:
    """Its module with all imports. The digest names the tokenised data, so that an edit tokenises them again."""
    before, digest = code_of_row("mine:convert"), digest_of_row("mine:convert")
    assert list(before) == ["elsewhere/helper.py", "elsewhere/mine.py"] and digest
    (code / "elsewhere" / "helper.py").write_text("x = 2\n")
    after = code_of_row("mine:convert")
    assert changed(before, after) == ["elsewhere/helper.py"]
    assert digest_of_row("mine:convert") != digest and digest_of_row(None) == ""
    assert code_of_row(None) == code_of_row("nowhere:f") == {}
    assert list(code_of_row("kit.rows:convert")) == [
        f"elsewhere/kit/{name}.py" for name in ("__init__", "near", "rows")
    ]
    beside = code / "own loop"  # a copy of train.py elsewhere, whose folder is the first of sys.path
    beside.mkdir()
    (beside / "hooks.py").write_text("import near\n")
    (beside / "near.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(beside))
    assert code_of_row("hooks:convert").keys() == {"own loop/hooks.py", "own loop/near.py"}
    mixed = (Source("a", ("a.jsonl",), 0.1, row="mine:convert"),)
    files = hash_files(with_value(config_of(folder), "data.mix", mixed), str(code / "train.py"), print)
    assert files["the code"]["elsewhere/mine.py"] == after["elsewhere/mine.py"]


def test_scores_count_where_they_choose_the_weights(code, folder) -> None:
    config = with_value(with_value(config_of(folder), "run.eval_generate", 8), "run.best_by", "f1")
    own = with_value(config, "eval.metric", "mine:f1")
    best = {name: with_value(own, "run.best_by", name) for name in ("nll", "validation/loss", "forgetting/kl")}
    assert scores_module(own) is None
    assert scores_module(with_value(own, "run.stop_after_no_gain", 2)) == "mine"
    assert scores_module(with_value(config, "run.export", "best")) == "eval.metric"
    chosen_by = {name: scores_module(with_value(config, "run.export", "best")) for name, config in best.items()}
    assert chosen_by == {"nll": None, "validation/loss": None, "forgetting/kl": "eval.forgetting"}
    first, scores = code_of(code / "train.py", "mine")
    # The metric with its imports, and the code that generates answers; not the scores that the metric replaces.
    generate = ["eval/generate.py", "training/answers.py"]
    assert list(scores) == ["elsewhere/helper.py", "elsewhere/mine.py", *generate]
    assert first == code_of(code / "train.py")[0]
    (code / "elsewhere" / "helper.py").write_text("x = 2\n")
    (code / "eval" / "generate.py").write_text("x = 2\n")
    edited = code_of(code / "train.py", "mine")[1]
    assert changed(scores, edited) == ["elsewhere/helper.py", "eval/generate.py"]
    assert code_of(code / "train.py", "nowhere.at_all")[1].keys() == set(generate)  # it is refused before a step
    parts = ("settings", "config.json", "versions", "the data", "the weights", "the tokenizer", "the code")
    saved, now = ({part: {} for part in parts} | {"the scores' code": each} for each in (scores, edited))
    assert differences(saved, now)[0].startswith("other code in ")
    assert differences(saved, now | {"the scores' code": {}}) == []  # run.export=last now


def test_the_projects_own_scores_are_found(folder, monkeypatch) -> None:
    monkeypatch.setattr(identity, "_text_of", lambda tree: "")  # the names count
    config = with_value(with_value(config_of(folder), "run.eval_generate", 8), "run.export", "best")
    code, scores = code_of(ROOT / "train.py", scores_module(with_value(config, "run.best_by", "f1")))
    assert {"train.py", "model/loss.py", "data/mixing.py", "distributed/optimizer.py"} <= code.keys()
    assert {"eval/metric.py", "eval/generate.py", "training/answers.py", "training/questions.py"} <= scores.keys()
    assert not code.keys() & scores.keys()


@pytest.mark.slow
def test_edited_loss_is_refused(tmp_path) -> None:
    workplace(tmp_path, 20, optimizer="max_steps=2", run="log_to=()")
    text = (ROOT / "train.py").read_text()
    edited = text.replace('reduction="none")', 'reduction="none") * 2')
    assert edited != text
    scripts = {}
    for name, content in (("plain", text), ("commented", f"# a comment\n{text}"), ("edited", edited)):
        scripts[name] = tmp_path / name / "train.py"
        scripts[name].parent.mkdir()
        scripts[name].write_text(content)
    longer, changed = "optimizer.max_steps=3", "run.resume=changed"
    starts = [run_of(tmp_path, "r", script=scripts[name]) for name in ("plain", "commented")]
    starts += [run_of(tmp_path, "r", longer, script=scripts["edited"], expect=2)]
    starts += [run_of(tmp_path, "r", longer, changed, script=scripts["edited"])]
    output = launch(tmp_path, "starts", 0, starts)
    assert output.count("exported the last weights (step 2") == output.count("already finished: 2 steps") == 1
    assert "step-000002 was made with other code in token_losses of train.py; set it back" in output
    assert "run.resume=changed continues with what is set now" in output
    assert "optimizer.max_steps: 2 -> 3" in output and "exported the last weights (step 3" in output


# ---- large files ---------------------------------------------------------------------------------------------------------


def test_large_file_is_hashed_once(tmp_path, monkeypatch) -> None:
    file, memory, read = tmp_path / "weights", tmp_path / "memory" / "sha256", []
    file.write_bytes(b"a" * 100)
    whole = sha256(file)
    monkeypatch.setattr(common.sha256, "sha256", lambda path: read.append(path) or sha256(path))
    for _ in range(3):
        assert remembered_sha256([file], memory=memory) == {file: whole}
    assert read == [file]
    with monkeypatch.context() as patched:  # hundreds of processes would queue for the lock
        patched.setattr(weight_digests, "node_lock", lambda *arguments: pytest.fail("waited for the lock"))
        assert remembered_sha256([file], memory=memory) == {file: whole}
    file.write_bytes(b"b" * 100)  # as many bytes
    assert remembered_sha256([file], memory=memory)[file] != whole and len(read) == 2
    for place in memory.iterdir():
        if place.name != "lock":
            place.write_text("torn")
    assert remembered_sha256([file], memory=memory)[file] != whole and len(read) == 3
    lines: list[str] = []
    monkeypatch.setattr(weight_digests, "LONG", 99)
    blocked = tmp_path / "weights" / "sha256"  # below a file: no folder can be made
    assert remembered_sha256([file], lines.append, blocked)[file] == sha256(file)
    assert "cannot be made" in lines[0] and "GiB, once for these files" in lines[1]
