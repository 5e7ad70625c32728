"""Sinks of curves, with fakes that have the API of wandb and mlflow: rows once, also after a resume, and failures."""

import json
import shlex
import sys
import threading
from types import SimpleNamespace

import pytest

import training.sinks
from common.errors import UserError
from training.launch import before_imports, launcher_note
from training.log import Log
from training.sinks import check_sinks

CONFIG = {"run": {"name": "r"}, "optimizer": {f"key{i}": i for i in range(120)}}


class FakeWandB:
    """The part of `wandb` that train.py uses. `rows` has the rows that the server would show, by run."""

    def __init__(self) -> None:
        self.runs, self.inits, self.metrics = {}, [], []

    def init(self, *, project, name, id, resume, dir, config):  # noqa: A002
        assert resume == "allow"
        self.inits.append((project, name, dir, config))
        rows = self.runs.setdefault(id, [])
        define = lambda name, step_metric=None: self.metrics.append((name, step_metric))  # noqa: E731
        return SimpleNamespace(log=rows.append, define_metric=define, finish=lambda: rows.append("finished"))

    @staticmethod
    def Html(data):  # noqa: N802
        return ("html", data)


class FakeMLflow:
    """What train uses of `mlflow`."""

    def __init__(self) -> None:
        self.started, self.params, self.rows, self.texts, self.ended = [], {}, [], {}, 0

    def start_run(self, run_id=None, run_name=None):
        self.started.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new-run"))

    def log_dict(self, dictionary, artifact_file):
        self.config = (artifact_file, dictionary)

    def log_params(self, params):
        assert len(params) <= 100 and not params.keys() & self.params.keys()
        self.params |= params

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_text(self, text, artifact_file):
        self.texts[artifact_file] = text

    def end_run(self):
        self.ended += 1


@pytest.fixture
def services(monkeypatch):
    wandb, mlflow = FakeWandB(), FakeMLflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return wandb, mlflow


def write(run, ranks, start_step, steps, names=("wandb", "mlflow"), evaluated=None):
    log = Log(run, ranks, names, CONFIG).open(start_step, evaluated or {}, 9)
    for step, row in steps.items():
        log.row(step, row)
    log.sync()
    log.close()
    return log


def test_services_get_each_row_once(tmp_path, ranks, services):
    wandb, mlflow = services
    run = tmp_path / "trial"
    write(run, ranks, 0, {1: {"train/loss": 1.0}, 2: {"train/loss": 2.0}, 3: {"train/loss": 3.0}})
    write(run, ranks, 2, {3: {"train/loss": 3.5, "train/mfu": 0.5}, 4: {"train/loss": 4.0}})  # step 3 was lost
    (rows,) = wandb.runs.values()  # the second start has continued the run of the first
    assert rows.count("finished") == mlflow.ended == 2
    shown = [row for row in rows if row != "finished"]
    losses = [{"step": step, "train/loss": float(step)} for step in (1, 2, 3, 4)]
    assert shown == [*losses[:3], {"step": 3, "train/mfu": 0.5}, losses[3]]
    assert shown == [{"step": step, **metrics} for step, metrics in mlflow.rows]
    assert wandb.inits == [("full-fine-tuning", "trial", str(run), CONFIG)] * 2
    assert ("*", "step") in wandb.metrics
    assert mlflow.started == [(None, "trial"), ("new-run", "trial")]
    assert len(mlflow.params) == 121 and mlflow.params["optimizer.key7"] == "7"
    assert mlflow.config == ("config.json", CONFIG)
    assert json.loads((run / "remote_runs.json").read_text()) == {"wandb": next(iter(wandb.runs)), "mlflow": "new-run"}
    assert not (run / "tensorboard").exists()


def test_fresh_start_begins_a_new_service_run(tmp_path, ranks, services, monkeypatch):
    wandb, mlflow = services
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    write(tmp_path, ranks, 0, {1: {"train/loss": 1.0}}, ("wandb",))
    write(tmp_path, ranks, 0, {1: {"train/loss": 1.5}, 2: {"train/loss": 2.0}}, ("wandb",))  # it left no checkpoint
    assert [rows[:-1] for rows in wandb.runs.values()] == [
        [{"step": 1, "train/loss": 1.0}],
        [{"step": 1, "train/loss": 1.5}, {"step": 2, "train/loss": 2.0}],
    ]
    assert {directory for _, _, directory, _ in wandb.inits} == {"elsewhere"}
    write(tmp_path, ranks, 1, {2: {"train/loss": 2.0}}, ("mlflow",))
    # Only rows that it has not received before.
    assert mlflow.rows == [(1, {"train/loss": 1.0 + 0.5}), (2, {"train/loss": 2.0})]


def test_texts_are_shown_as_texts(tmp_path, ranks, services):
    wandb, mlflow = services
    write(tmp_path, ranks, 0, {4: {"validation/f1": 0.5, "validation/sample": "**a**\n\n    <b>"}})
    (rows,) = wandb.runs.values()
    assert rows[0]["validation/sample"] == ("html", "<pre>**a**\n\n    &lt;b&gt;</pre>")
    assert mlflow.rows == [(4, {"validation/f1": 0.5})]
    assert mlflow.texts == {"validation/sample/step-000004.md": "**a**\n\n    <b>"}


@pytest.mark.parametrize("when", ["init", "log"])
def test_failed_service_is_one_warning(tmp_path, ranks, services, monkeypatch, capsys, when):
    wandb, mlflow = services

    def fail(*arguments, **options):
        raise ConnectionError("no route\nto host")

    if when == "init":
        monkeypatch.setattr(wandb, "init", fail)
    else:
        monkeypatch.setattr(wandb, "Html", fail)
    write(tmp_path, ranks, 0, {step: {"train/loss": 1.0, "validation/sample": "text"} for step in range(1, 5)})
    output = capsys.readouterr().out
    assert output.count("warning: ") == 1
    assert "the run goes on without wandb, which has failed (ConnectionError: no route to host)" in output
    assert len(mlflow.rows) == 4
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_silent_service_does_not_delay_the_end(tmp_path, ranks, services, monkeypatch, capsys):
    answers, init = threading.Event(), services[0].init
    monkeypatch.setattr(services[0], "init", lambda **options: answers.wait() and init(**options))
    monkeypatch.setattr(training.sinks, "CLOSE_SECONDS", 0.0)
    log = write(tmp_path, ranks, 0, {1: {"train/loss": 1.0}}, ("wandb",))
    assert "warning: wandb has not taken all curves within 0 s; metrics.jsonl has them" in capsys.readouterr().out
    answers.set()
    log.sinks[0].thread.join()


def test_missing_package_is_one_sentence(services):
    for name in ("wandb", "mlflow"):
        sys.modules[name].__spec__ = object()  # pyright: ignore[reportAttributeAccessIssue]
        check_sinks([name])
        del sys.modules[name]
    with pytest.raises(UserError, match="run.log_to=wandb: the package wandb is not installed; install it or remove"):
        check_sinks(["tensorboard", "wandb"])


def test_missing_package_is_said_before_the_imports(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/quickstart.py", "run.log_to=wandb"])
    with pytest.raises(SystemExit) as ended:
        before_imports("train.py", "")
    assert ended.value.code == 2 and "the package wandb is not installed" in capsys.readouterr().err


def test_last_line_explains_the_traceback_of_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launcher_note(is_signal=True) == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launcher_note(is_signal=False) == ""
    assert "torchrun's own, and no error" in launcher_note(is_signal=True)


def test_the_last_line_says_where_the_curves_are(tmp_path, ranks, services):
    assert write(tmp_path / "a", ranks, 0, {}, ()).where() == f"curves: {tmp_path / 'a' / 'metrics.jsonl'}"
    both_places = write(tmp_path / "b", ranks, 0, {}, ("wandb", "tensorboard")).where()
    assert both_places == f"curves: tensorboard --logdir {tmp_path / 'b' / 'tensorboard'} and wandb"
    spaced = write(tmp_path / "two words", ranks, 0, {}, ("tensorboard",)).where()  # a shell takes it as it is
    assert shlex.split(spaced)[2:] == ["--logdir", str(tmp_path / "two words" / "tensorboard")]
