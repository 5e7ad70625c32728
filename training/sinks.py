"""The sinks of a run's curves beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. On rank 0 alone.

Weights & Biases and MLflow are services. Each needs its package, takes project, server and offline mode from its own
environment variables, and runs in its own thread.
"""

import html
import importlib.util
import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from common.durable_files import fsync, write_json
from common.errors import UserError

EVENT_FILES = "events.out.tfevents.*"
REMOTE_RUNS = "remote_runs.json"  # in runs/NAME: service -> the id of its run, which a resume continues
CLOSE_SECONDS = 60.0  # the longest wait for a service at the end of a run
_MAX_CLOCK_SKEW = 5.0  # seconds

Say = Callable[[str], None]
Values = Mapping[str, float | str]
"""A row of curves by name; a text is in Markdown."""
Opened = tuple[str, Callable[[int, Values], None], Callable[[], None]]
"""An open service: the id of its run, a function that logs the row of a step, and one that ends the run after the last row."""


def check_sinks(names: Sequence[str]) -> None:
    """Raise UserError if the package of a sink (run.log_to) is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.log_to={name}: the package {name} is not installed; install it or remove it there")


def open_sinks(
    names: Sequence[str], directory: Path, start_step: int, config: dict, sent: Collection[tuple[int, str]], say: Say
) -> "list[TensorBoard | Service]":
    """Open and return the sinks of a run that continues at `start_step`; 0 starts anew.

    sent: (step, curve) of the rows that an earlier start has written after that step. The services have these rows already and
    cannot delete them.
    """
    if start_step == 0:
        (directory / REMOTE_RUNS).unlink(missing_ok=True)
    known = _remote_runs(directory)
    return [
        TensorBoard(directory / "tensorboard", start_step, say)
        if name == "tensorboard"
        else Service(name, directory, config, known.get(name), sent if name in known else (), say)
        for name in names
    ]


class TensorBoard:
    """TensorBoard's event files. From the step at which a run continues, TensorBoard ignores the rows of earlier files."""

    def __init__(self, folder: Path, start_step: int, say: Say) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only on rank 0

        self.folder, self.say, self.failed = folder, say, False
        if start_step == 0:
            for path in folder.glob(EVENT_FILES):
                path.unlink()
        # TensorBoard reads event files in the order of their names, which begin with the second of their creation.
        newest = max((int(path.name.split(".")[3]) for path in folder.glob(EVENT_FILES)), default=0)
        time.sleep(min(max(0.0, newest + 1 - time.time()), _MAX_CLOCK_SKEW))
        self.writer = SummaryWriter(folder, purge_step=start_step or None)
        hook = threading.excepthook  # it would print a traceback of the error that `_try` reports
        threading.excepthook = lambda args: type(args.thread).__name__ == "_AsyncWriterThread" or hook(args)

    def plot(self, step: int, values: Values) -> None:
        """Add scalars and texts. TensorBoard sorts them into groups by the part of their names before the slash.

        It opens on the first group, and capitals come first, so train/loss is shown as Loss/train, beside Loss/validation.
        """
        for name, value in values.items():
            tag = re.sub(r"^(train|validation)/loss", r"Loss/\1", name)
            self._try(self.writer.add_text if isinstance(value, str) else self.writer.add_scalar, tag, value, step)

    def flush(self) -> None:
        """Flush the events to disk."""
        self._try(self.writer.flush)
        for path in sorted(self.folder.glob(EVENT_FILES))[-1:]:
            self._try(fsync, path)

    def close(self) -> None:
        """Close the file."""
        self._try(self.writer.close)

    def _try(self, call: Callable[..., object], *arguments: object) -> None:
        """Call the writer unless it has failed. Its thread raises an error only at the next call."""
        try:
            if not self.failed:
                call(*arguments)
        except OSError as error:
            self.failed = True
            self.say(_without("tensorboard", error))


def _wandb(directory: Path, config: dict, run_id: str | None) -> Opened:
    """Open Weights & Biases (https://docs.wandb.ai/models/track/log). Rows have their own x-axis, `step`."""
    import wandb  # pyright: ignore[reportMissingImports]

    run_id, project = run_id or secrets.token_hex(4), os.environ.get("WANDB_PROJECT", "full-fine-tuning")
    files = os.environ.get("WANDB_DIR", str(directory))
    run = wandb.init(project=project, name=directory.name, id=run_id, resume="allow", dir=files, config=config)
    # W&B's own step never decreases, but a save in the background ends after later steps.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def plot(step: int, values: Values) -> None:
        texts = {n: wandb.Html(f"<pre>{html.escape(v)}</pre>") for n, v in values.items() if isinstance(v, str)}
        run.log({"step": step, **values, **texts})

    return run_id, plot, run.finish


def _mlflow(directory: Path, config: dict, run_id: str | None) -> Opened:
    """Open MLflow (https://mlflow.org/docs/latest/python_api/mlflow.html). Texts are artifacts."""
    import mlflow  # pyright: ignore[reportMissingImports]

    own_id = mlflow.start_run(run_id=run_id, run_name=directory.name).info.run_id
    if run_id is None:
        mlflow.log_dict(config, "config.json")
        flat = [(f"{part}.{key}", str(value)) for part, keys in config.items() for key, value in keys.items()]
        for first in range(0, len(flat), 100):  # the limit of a request
            mlflow.log_params(dict(flat[first : first + 100]))

    def plot(step: int, values: Values) -> None:
        mlflow.log_metrics({n: v for n, v in values.items() if not isinstance(v, str)}, step=step)
        for name, text in values.items():
            if isinstance(text, str):
                mlflow.log_text(text, f"{name}/step-{step:06d}.md")

    return own_id, plot, mlflow.end_run


class Service:
    """A service in its own thread: training never waits for it, and goes on without it if it fails."""

    _remembering = threading.Lock()  # all services write one file

    def __init__(
        self,
        name: str,
        directory: Path,
        config: dict,
        run_id: str | None,
        sent: Collection[tuple[int, str]],
        say: Say,
    ) -> None:
        """run_id: the service's run to continue. sent: (step, curve) of the values that the service already has."""
        self.name, self.sent, self.say, self.failed = name, set(sent), say, False
        self.rows: queue.SimpleQueue[tuple[int, Values] | None] = queue.SimpleQueue()
        start = (directory, config, run_id)
        self.thread = threading.Thread(target=self._run, args=start, name=f"curves to {name}", daemon=True)
        self.thread.start()

    def plot(self, step: int, values: Values) -> None:
        """Queue the values that have not been sent before."""
        new = {name: value for name, value in values.items() if (step, name) not in self.sent}
        if new and not self.failed:
            self.rows.put((step, new))

    def flush(self) -> None:
        """Do nothing: metrics.jsonl holds the rows that a service has not received yet."""

    def close(self) -> None:
        """Wait until the queue is sent, for at most CLOSE_SECONDS."""
        self.rows.put(None)
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            self.say(
                f"warning: {self.name} has not taken all curves within {CLOSE_SECONDS:.0f} s; metrics.jsonl has them"
            )

    def _run(self, directory: Path, config: dict, run_id: str | None) -> None:
        try:
            run_id, plot, finish = {"wandb": _wandb, "mlflow": _mlflow}[self.name](directory, config, run_id)
            with self._remembering:
                write_json(directory / REMOTE_RUNS, _remote_runs(directory) | {self.name: run_id})
            while (row := self.rows.get()) is not None:
                plot(*row)
            finish()
        except (Exception, SystemExit) as error:
            self.failed = True
            self.say(_without(self.name, error))


def _without(name: str, error: BaseException) -> str:
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return f"warning: the run goes on without {name}, which has failed ({why}); metrics.jsonl has all curves"


def _remote_runs(directory: Path) -> dict[str, str]:
    file = directory / REMOTE_RUNS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
