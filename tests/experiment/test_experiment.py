"""The experiment: its steps in order, what validation chooses, interruption and continuation, and its tables."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from experiment import run
from experiment.launch import Ended, Interrupted, Job
from experiment.report import comparison_job, write_results
from experiment.run import list_steps, run_experiment, write_subsets
from experiment.setup import SIZES, Experiment
from experiment.steps import all_steps, choose_steps, read_choices
from experiment.sweep import owned

LOSSES = {  # validation loss by learning rate
    "1.5e-4": 0.5,
    "3e-4": 0.2,
    "6e-4": 0.3,
    "5e-4": 0.3,
    "1e-3": 0.25,
    "2e-3": 0.24,
    "4e-3": 0.26,
}
VALIDATION_F1 = {"0.5": 0.60, "0.7": 0.795, "0.85": 0.80}  # of the averages; the tuned model has 0.8


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 20), ("validation", 2), ("test", 4)):
        text = "".join(f'{{"id": {i}}}\n' for i in range(count))
        (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return Experiment(SIZES["quickstart"], tmp_path / "out", data, seeds=2)


class Machine:
    """Stands in for the children: writes what each would write. `failing`: name of a step -> its last words."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.names = experiment, []
        self.failing: dict[str, str] = {}
        self.interrupt_at: str | None = None

    def __call__(self, jobs: list[Job], parallel: int, on_end) -> None:  # noqa: ANN001
        assert len(jobs) == parallel
        steps = all_steps(self.experiment)
        for job in jobs:  # none of them may need another one
            assert next(step for step in steps if step.job == job).is_ready
        for job in jobs:
            self.run(job, on_end)

    def run(self, job: Job, on_end) -> None:  # noqa: ANN001
        step = next(step for step in all_steps(self.experiment) if step.job == job)
        self.names.append(step.name)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        if step.name == self.interrupt_at:
            raise Interrupted(15)
        if step.name in self.failing:
            job.log.write_text(f"\n$ x\nerror: {self.failing[step.name]}\n", encoding="utf-8")
            on_end(Ended(job, 2, False, 1.0))
            return
        step.output.parent.mkdir(parents=True, exist_ok=True)
        if job.script == "train.py":
            options = dict(option.split("=", 1) for option in job.options[1:])
            rate = options["optimizer.learning_rate"]
            rows = [
                {"step": 50, "train/tokens": 1000, "train/tokens_per_second": 100.0, "train/memory_gib": 2.0},
                {"step": 50, "validation/loss": LOSSES.get(rate, 0.4)},
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (step.output.parents[1] / "metrics.jsonl").write_text(text, encoding="utf-8")
            (step.output.parents[1] / "checkpoints").mkdir(exist_ok=True)
            step.output.write_text('{"step": 50}', encoding="utf-8")
            step.output.with_name("config.json").write_text("{}", encoding="utf-8")
        elif job.script == "scripts/evaluate.py":
            alpha = next((alpha for alpha in VALIDATION_F1 if f"average-a{alpha}-" in job.options[0]), None)
            f1 = VALIDATION_F1[alpha] if alpha else 0.8
            step.output.write_text(json.dumps(scores(f1)), encoding="utf-8")
        else:
            step.output.write_text(json.dumps(general()), encoding="utf-8")
        on_end(Ended(job, 0, False, 10.0))


def scores(f1: float) -> dict:
    violations = {"micro": {"f1": f1}, "baselines": {"engine": {"f1": 0.69}}}
    return {"violations": violations, "rouge_l": {"f": 0.5}, "facts": {"f1": 0.7}, "loss": {"mean": 0.05}}


def general() -> dict:
    return {
        "perplexity_per_byte": {"tuned": {"value": 2.1}, "base": {"value": 1.9}},
        "kl": {"value": 0.3},
        "questions": {"all": {"tuned": {"value": 0.75}, "base": {"value": 0.8}}},
    }


@pytest.fixture
def machine(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(experiment)
    monkeypatch.setattr(run, "run_jobs", machine)
    return machine


def test_it_runs_every_step_once_in_order_and_then_nothing(experiment, machine) -> None:
    run_experiment(experiment)
    names = [step.name for step in all_steps(experiment)]
    assert sorted(machine.names) == sorted(names)
    assert all(step.is_done for step in all_steps(experiment))
    first_test = next(i for i, name in enumerate(machine.names) if name.startswith("test "))
    swept = [f"full-lr{rate}-s0" for rate in ("1.5e-4", "3e-4", "6e-4")] + [
        f"lora-lr{rate}-s0" for rate in ("5e-4", "1e-3", "2e-3", "4e-3")
    ]
    assert set(swept) <= set(machine.names[:first_test])  # every choice of a rate comes before any test
    ran = len(machine.names)
    run_experiment(experiment)
    assert len(machine.names) == ran


def test_rates_and_the_average_are_chosen_on_validation(experiment, machine) -> None:
    run_experiment(experiment)
    choices = read_choices(experiment)
    assert choices.rates == {"full": "3e-4", "lora": "2e-3"}
    assert choices.alpha == "0.7"  # the smallest that loses at most a point: 0.795 of 0.8
    assert choices.steps == 50
    low = next(arm for arm in experiment.arms() if arm.low)
    assert experiment.rate_of(low, "3e-4") == "1.5e-4"  # its first seed is a run of the sweep
    assert experiment.rate_of(low, "1.5e-4") == "5e-05"
    assert machine.names.count("full-lr1.5e-4-s0") == machine.names.count("full-lr1.5e-4-s1") == 1
    assert "test full-lr1.5e-4-s1" in machine.names
    assert "test average-a0.7-s1" in machine.names
    assert "full-10pc-lr3e-4-s1" in machine.names


def test_no_choice_is_made_as_long_as_a_run_is_missing(experiment, machine) -> None:
    machine.interrupt_at = "full-lr6e-4-s0"
    with pytest.raises(Interrupted):
        run_experiment(experiment)
    assert read_choices(experiment).rates == {}
    waiting = [step for step in all_steps(experiment) if step.job is None]
    assert "train full, seed 0" in [step.name for step in waiting]
    listed = list_steps(experiment)
    assert "waits for a choice\n" in listed and "waits for a choice: of a learning rate" in listed


def test_no_time_is_named_before_a_step_has_run(experiment) -> None:
    listed = list_steps(experiment)
    assert "left: about" not in listed and "steps of kinds that have not run yet, so their time is not known" in listed


def test_an_interrupted_experiment_continues_with_the_same_step(experiment, machine) -> None:
    machine.interrupt_at = "general lora-lr2e-3-s0"
    with pytest.raises(Interrupted):
        run_experiment(experiment)
    before, machine.interrupt_at = len(machine.names), None
    run_experiment(experiment)
    assert machine.names[before] == "general lora-lr2e-3-s0"
    assert [name for name in set(machine.names) if machine.names.count(name) > 1] == ["general lora-lr2e-3-s0"]


def test_a_rate_that_diverges_is_a_result_and_any_other_failure_stops(experiment, machine) -> None:
    machine.failing = {"full-lr6e-4-s0": "loss or gradient norm was not finite in 5 steps in a row"}
    run_experiment(experiment)
    assert read_choices(experiment).rates["full"] == "3e-4"
    assert "inf" in write_results(experiment)
    gone = experiment.run(experiment.arms()[0], "3e-4", 1) / "eval" / "general.json"
    gone.unlink()
    machine.failing = {"general full-lr3e-4-s1": "no memory"}
    with pytest.raises(UserError, match="general full-lr3e-4-s1 failed: no memory; its log is"):
        run_experiment(experiment)


def test_other_settings_of_a_run_are_refused(experiment, machine) -> None:
    run_experiment(experiment)
    run_of = experiment.run(experiment.arms()[0], "3e-4", 0)
    config = {"optimizer": {"epochs": 7}}
    (run_of / "config.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    with pytest.raises(UserError, match=r"optimizer\.epochs=7, now it is 1"):
        all_steps(experiment)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_other_data_are_refused_in_the_middle(experiment, machine, split) -> None:
    machine.interrupt_at = "lora-lr5e-4-s0"
    with pytest.raises(Interrupted):
        run_experiment(experiment)
    machine.interrupt_at, before = None, len(machine.names)
    with experiment.split(split).open("a", encoding="utf-8") as file:
        file.write('{"id": 99}\n')
    with pytest.raises(UserError, match=f"{split}.jsonl has changed since .* was begun; put it back"):
        run_experiment(experiment)
    assert len(machine.names) == before


def test_checkpoints_are_kept_only_where_an_average_needs_them(experiment, machine) -> None:
    run_experiment(experiment)
    kept = {path.parent.name.partition("-")[0] for path in experiment.out.glob("*/checkpoints")}
    assert kept == {"full"}


def test_a_larger_share_of_the_examples_contains_the_smaller(experiment) -> None:
    write_subsets(experiment)
    small, large = (experiment.subset(share).read_text(encoding="utf-8").splitlines() for share in (0.1, 0.3))
    assert (len(small), len(large)) == (2, 6)
    assert large[:2] == small


def test_the_tables_have_means_and_the_value_of_each_seed(experiment, machine) -> None:
    run_experiment(experiment)
    seed_1 = experiment.run(experiment.arms()[0], "3e-4", 1)
    [file] = (seed_1 / "eval").glob("test-*.json")
    file.write_text(json.dumps(scores(0.9)), encoding="utf-8")
    text = write_results(experiment)
    assert "| full | 3e-4 | 0.2000 | chosen |" in text
    assert "| without a model: engine |  | 0.690 |" in text
    assert "| base, 4 examples before the prompt |  | 0.800 | 0.700 | 0.500 | 0.0500 | 1.900 | 0.000 | 80.0 |" in text
    assert "| full fine-tuning, lr 3e-4 | 2 | 0.850 (0.800, 0.900) |" in text
    assert "| LoRA, rank 64 on all linear layers, lr 2e-3 | 1,000 | 10 s | 100 | 2.0 |" in text
    assert "| full fine-tuning | 0.800 (0.800, 0.800) | 0.800 (0.800, 0.800) | 0.850 (0.800, 0.900) |" in text


def test_the_list_says_what_is_left_from_the_times_of_the_same_kind(experiment, machine) -> None:
    machine.interrupt_at = "lora-lr5e-4-s0"
    with pytest.raises(Interrupted):
        run_experiment(experiment)
    last = list_steps(experiment).splitlines()[-1]
    left = [step for step in all_steps(experiment) if not step.is_done]
    trainings = [step for step in left if step.kind.startswith("train ")]
    assert f"left: about {10 * len(trainings) / 60:.0f} min" in last


def test_only_takes_words_of_step_names(experiment) -> None:
    steps = all_steps(experiment)
    assert [step.name for step in choose_steps(steps, ["topics", "self"])][:2] == ["topics", "self"]
    with pytest.raises(UserError, match="--only nothing: no step has this in its name"):
        choose_steps(steps, ["nothing"])


def test_everything_that_was_scored_is_compared_with_full_first(experiment, machine) -> None:
    assert comparison_job(experiment) is None
    run_experiment(experiment)
    job = comparison_job(experiment)
    assert job
    names = [option.partition("=")[0] for option in job.options if "=" in option]
    assert names == [
        *("full", "lora", "vocabulary", "replay-topics", "replay-self", "replay-ewc", "low-lr", "average"),
        *("base, fewshot", "base, constrained"),
    ]
    files = [file for option in job.options if "=" in option for file in option.partition("=")[2].split(",")]
    assert len(files) == 2 * 8 + 2
    assert all(Path(file).is_file() for file in files)


def test_steps_run_at_once_only_if_none_needs_another(experiment, machine) -> None:
    run_experiment(experiment, parallel=3)
    assert sorted(machine.names) == sorted(step.name for step in all_steps(experiment))
    assert read_choices(experiment).rates == {"full": "3e-4", "lora": "2e-3"}


def test_without_a_rate_that_trains_nothing_is_scored(experiment, machine) -> None:
    machine.failing = {
        f"lora-lr{rate}-s0": "loss was not finite in 5 steps" for rate in ("5e-4", "1e-3", "2e-3", "4e-3")
    }
    with pytest.raises(UserError, match="every learning rate of lora diverged, so none can be chosen; add lower ones"):
        run_experiment(experiment)
    assert read_choices(experiment).rates == {"full": "3e-4"}
    assert not any("lora" in name for name in machine.names if name.startswith(("test ", "general ")))


def test_two_experiments_cannot_share_a_directory(experiment, machine) -> None:
    with owned(experiment.out), pytest.raises(UserError, match="another experiment is running in"):
        run_experiment(experiment)
    assert machine.names == []


def test_a_word_of_only_may_name_a_step_that_a_choice_renames(experiment, machine) -> None:
    run_experiment(
        experiment, ["s0", "reports", "topics", "self", "vocabulary", "average, seed 0", "averages on validation"]
    )
    assert "test average-a0.7-s0" in machine.names
