"""Services that show a run's curves: Weights & Biases and MLflow, each in a thread of its own. On rank 0 alone."""

import html
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from common.durable_files import write_json
from training.sinks import Say, Sink, Values

REMOTE_RUNS = "remote_runs.json"  # in the run directory: service -> the id of its run, by which a resume continues it
CLOSE_SECONDS = 60.0  # that the end of a run waits for a service


def open_services(
    names: Sequence[str], directory: Path, is_resumed: bool, config: dict, sent: Collection[tuple[int, str]], say: Say
) -> list[Sink]:
    """The services called `names`. sent: (step, curve) that they have already; none of them can take a row back."""
    file, lock = directory / REMOTE_RUNS, threading.Lock()
    known = json.loads(file.read_text(encoding="utf-8")) if is_resumed and file.is_file() else {}
    services: list[Sink] = []
    for name in names:
        kind = {"wandb": WandB, "mlflow": MLflow}[name]

        def remember(run_id: str, name: str = name) -> None:
            with lock:  # every service has a thread of its own
                known[name] = run_id
                write_json(file, known)

        def connect(kind: type = kind, run_id: str | None = known.get(name), remember: Say = remember) -> Sink:
            return kind(directory, config, run_id, remember)

        services.append(Background(name, connect, sent if name in known else (), say))
    return services


class WandB:
    """Weights & Biases: https://docs.wandb.ai/models/track/log. Rows have their own x-axis, `step`."""

    def __init__(self, directory: Path, config: dict, run_id: str | None, remember: Say) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.html, run_id = wandb.Html, run_id or secrets.token_hex(4)
        remember(run_id)
        project = os.environ.get("WANDB_PROJECT", "full-fine-tuning")
        self.run = wandb.init(
            project=project, name=directory.name, id=run_id, resume="allow", dir=str(directory), config=config
        )
        # W&B's own step never goes back, and a save that ends later belongs to an earlier step.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def plot(self, step: int, values: Values) -> None:
        """Log a row."""
        shown = {n: self.html(f"<pre>{html.escape(v)}</pre>") if isinstance(v, str) else v for n, v in values.items()}
        self.run.log({"step": step} | shown)

    def flush(self) -> None:
        """Nothing: W&B's own process has the rows."""

    def close(self) -> None:
        """Wait until the rows are sent."""
        self.run.finish()


class MLflow:
    """MLflow: https://mlflow.org/docs/latest/python_api/mlflow.html. Texts are artifacts."""

    def __init__(self, directory: Path, config: dict, run_id: str | None, remember: Say) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self.mlflow = mlflow
        run = mlflow.start_run(run_id=run_id, run_name=directory.name)
        if run_id is None:
            remember(run.info.run_id)
            mlflow.log_dict(config, "config.json")
            flat = [(f"{part}.{key}", str(value)) for part, keys in config.items() for key, value in keys.items()]
            for first in range(0, len(flat), 100):  # which is what a request may have
                mlflow.log_params(dict(flat[first : first + 100]))

    def plot(self, step: int, values: Values) -> None:
        """Log a row."""
        self.mlflow.log_metrics({n: v for n, v in values.items() if not isinstance(v, str)}, step=step)
        for name, text in values.items():
            if isinstance(text, str):
                self.mlflow.log_text(text, f"{name}/step-{step:06d}.md")

    def flush(self) -> None:
        """Nothing: every row is sent at once."""

    def close(self) -> None:
        """Mark the run as finished."""
        self.mlflow.end_run()


class Background:
    """A service in a thread of its own: training does not wait for it, and goes on without it when it fails."""

    def __init__(self, name: str, connect: Callable[[], Sink], sent: Collection[tuple[int, str]], say: Say) -> None:
        self.name, self.connect, self.sent, self.say = name, connect, set(sent), say
        self.rows: queue.SimpleQueue[tuple[int, Values] | None] = queue.SimpleQueue()
        self.failed = False
        self.thread = threading.Thread(target=self._run, name=f"curves to {name}", daemon=True)
        self.thread.start()

    def plot(self, step: int, values: Values) -> None:
        """Queue what has not been sent before."""
        new = {name: value for name, value in values.items() if (step, name) not in self.sent}
        if new and not self.failed:
            self.rows.put((step, new))

    def flush(self) -> None:
        """Nothing: metrics.jsonl has the rows."""

    def close(self) -> None:
        """Wait for the queue, but not for a service that does not answer."""
        self.rows.put(None)
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            self.say(
                f"warning: {self.name} has not taken all curves within {CLOSE_SECONDS:.0f} s; metrics.jsonl has them"
            )

    def _run(self) -> None:
        try:
            sink = self.connect()
            while (row := self.rows.get()) is not None:
                sink.plot(*row)
            sink.close()
        except (Exception, SystemExit) as error:
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(
                f"warning: the run goes on without {self.name}, which has failed ({reason}); metrics.jsonl has all curves"
            )
