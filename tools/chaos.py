"""Kill a tiny run again and again until it has finished, and compare it with one that nobody killed. scripts/chaos.py is the command.

The run has what could go wrong in a resume: a mixture, EWC, validation, a save after every second step.
"""

import json
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from distributed.checkpoint_directory import complete_checkpoints, read_manifest
from tools.launched import Launch, kill, torchrun

PATIENCE = 90.0  # seconds in which the other processes must end after one was killed
LONGEST = 600.0  # seconds of a launch
START_SECONDS, SAVE_SECONDS = 15.0, 0.06  # of a launch and of a save of the tiny model: random delays are below them
# Curves that measure this machine at this moment, and rows about a process: the row of a save that was cut off is rightly missing.
MEASURED = {"train/tokens_per_second", "train/mfu", "train/memory_gib", "ewc/time"}
OF_A_PROCESS = {"save", "start"}


class Failed(Exception):
    """A run did not end as it must; the message says how."""


# ---- the run -----------------------------------------------------------------------------------------------------------

CONFIG = """\
from configs.config import EWC, Batch, Config, Data, Model, Optimizer, Run, Source

config = Config(
    model=Model(path="{0}/model", compute_dtype="fp32"),
    data=Data(
        train=("{0}/train.jsonl",),
        validation=("{0}/validation.jsonl",),
        mix=(Source("general", ("{0}/general.jsonl",), 0.2, ("{0}/general-validation.jsonl",)),),
        sequence_length=256,
        cache="{0}/tokens",
    ),
    batch=Batch(global_examples=4, micro_batch=1),  # 120 examples are 30 steps
    optimizer=Optimizer(learning_rate=1e-3, epochs={1}, max_steps={2}, warmup_steps=3),
    ewc=EWC(strength=1.0, data=("{0}/general.jsonl",), documents=16, batch=4),
    run=Run(name="run", directory="{0}/runs", save_every=2, eval_every=5, keep_last=2),
)
"""
WORDS = (
    "bank",
    "capital",
    "ratio",
    "limit",
    "report",
    "loan",
    "reserve",
    "margin",
    "rate",
    "exceeds",
    "covers",
    "holds",
)


def write_workload(directory: Path, steps: int) -> Path:
    """Write a model, its data and a config of `steps` steps to `directory`; return the config. Runs go to `directory`/runs."""
    write_model(directory / "model")
    for name, examples in {"train": 120, "validation": 6, "general": 40, "general-validation": 4}.items():
        rng = random.Random(name)
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(examples):
                question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(3, 16))) for _ in range(2))
                chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": chat}) + "\n")
    config = directory / "config.py"
    config.write_text(CONFIG.format(directory, -(-steps // 30), steps), encoding="utf-8")
    return config


def write_model(directory: Path, dtype: str = "float32", **shape: int) -> None:
    """Save a random Llama model, tiny unless `shape` overrides its config, and a tokenizer of bytes with a chat template."""
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    settings = {"initializer_range": 0.1, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("llama", **(small | shape), **settings, pad_token_id=2, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(directory)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    ).save_pretrained(directory)


# ---- the kills ---------------------------------------------------------------------------------------------------------


class Chaos:
    """Runs of one config, which are killed. Its methods raise Failed.

    folder: has the config, and gets the runs. ranks: of a run. rng: decides victims and moments.
    """

    def __init__(self, folder: Path, steps: int, ranks: int, overrides: list[str], rng: random.Random) -> None:
        self.folder, self.ranks, self.overrides, self.rng = folder, ranks, overrides, rng
        self.config, self.launches = write_workload(folder, steps), 0
        self.hits: Counter[str] = Counter()

    def start(self, name: str) -> Launch:
        """Start or continue the run of this name."""
        self.launches += 1
        command = torchrun(self.ranks, self.config, f"run.name={name}", *self.overrides)
        output = self.folder / f"{name}.{self.launches}.out"
        # One thread per rank: on matrices this small, threads only wait for each other.
        return Launch(command, output, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

    def finish(self, name: str) -> None:
        """Start or continue a run, and wait until it has ended well."""
        with self.start(name) as launch:
            code = launch.wait(LONGEST)
            if code != 0:
                said = "\n".join(launch.text().splitlines()[-15:])
                raise Failed(f"{name} ended with exit code {code}, and nobody killed it:\n{said}")

    def kill_once(self, name: str) -> str | None:
        """Start or continue a run, and kill somebody. Returns a line about it; None if the run ended well before that."""
        checkpoints = self.folder / "runs" / name / "checkpoints"
        with self.start(name) as launch:
            aim = self._await_moment(checkpoints, launch)
            ranks, code, temporary = launch.ranks(), launch.wait(0), _temporary(checkpoints)
            doing = f"in {', '.join(temporary)}" if temporary else "not in a save"
            if code == 0:
                return None
            if code is not None:
                said = "\n".join(launch.text().splitlines()[-15:])
                raise Failed(f"{name} ended with exit code {code}, and nobody killed it:\n{said}")
            victim = self.rng.choice(
                ["rank", "rank", "all", "launcher", "signal"] if ranks else ["all", "launcher", "signal"]
            )
            begin = time.monotonic()
            if victim == "rank":
                rank = self.rng.choice(sorted(ranks))
                victim = f"rank {rank}"
                kill(ranks[rank])
            elif victim == "all":
                launch.kill_all()
            else:
                kill(launch.process.pid, signal.SIGKILL if victim == "launcher" else signal.SIGTERM)
            while launch.wait(0.01) is None or launch.ranks():
                if time.monotonic() - begin > PATIENCE:
                    raise Failed(f"{name}: {PATIENCE:.0f} s after the kill ({victim}) the other processes still run")
            ended = time.monotonic() - begin
        left = _temporary(checkpoints)
        self.hits.update([victim] + ["in a save"] * bool(temporary) + ["cut off a save"] * bool(left))
        for folder in complete_checkpoints(checkpoints):
            for file, stated in read_manifest(folder)["files"].items():
                if not (folder / file).is_file() or (folder / file).stat().st_size != stated["size"]:
                    raise Failed(f"{folder / file} is missing or has another size, and the checkpoint looks complete")
        latest = (checkpoints / "latest").read_text() if (checkpoints / "latest").is_file() else "none"
        what = f"; left {', '.join(left)}" if left else ""
        return f"{victim:8} | aimed at {aim:5} | {doing:24} | latest {latest:11} | all ended after {ended:.1f} s{what}"

    def _await_moment(self, checkpoints: Path, launch: Launch) -> str:
        """Wait for a random moment, or for the end: half of them in a save or just after it, a third between steps."""
        aim = self.rng.choice(["save"] * 3 + ["steps"] * 2 + ["start"])
        begin, started = time.monotonic(), time.time_ns()
        if aim == "start":
            launch.wait(self.rng.uniform(0, START_SECONDS))
            return aim
        saves, seen = self.rng.randint(1, 5) if aim == "save" else 1, set()
        while len(seen) < saves and launch.process.poll() is None and time.monotonic() - begin < LONGEST:
            for path in checkpoints.glob("step-*.tmp" if aim == "save" else "latest"):
                with suppress(OSError):  # renamed meanwhile
                    seen |= {path.name} if path.stat().st_ctime_ns > started else set()
            time.sleep(0.001)
        launch.wait(self.rng.uniform(0, SAVE_SECONDS if aim == "save" else 1.0))
        return aim


def _temporary(checkpoints: Path) -> list[str]:
    """Temporary names: of a save, or of the removal of an old checkpoint. After a kill they prove that it was cut off."""
    return sorted(path.name for path in checkpoints.glob("step-*.tmp"))


# ---- the comparison ----------------------------------------------------------------------------------------------------


def differences(run: Path, reference: Path) -> list[str]:
    """What differs between two finished runs, one line each: exported weights, to the bit, and every row of the curves."""
    found, expected = exported(run), exported(reference)
    if not found or found.keys() != expected.keys():
        return [f"export/ has {len(found)} tensors, expected {len(expected)}"]
    changed = [
        name for name in found if found[name].dtype != expected[name].dtype or not found[name].equal(expected[name])
    ]
    problems = [f"export/: {name} differs" for name in changed]
    rows, wanted = read_rows(run), read_rows(reference)
    problems += [f"metrics.jsonl: {key} is there twice" for key, count in Counter(map(_key, rows)).items() if count > 1]
    compared = [{_key(row): row for row in some if _key(row)[1] not in OF_A_PROCESS} for some in (rows, wanted)]
    for key in sorted(compared[0].keys() | compared[1].keys()):
        found, expected = (
            {name: value for name, value in some.get(key, {}).items() if name not in MEASURED} for some in compared
        )
        problems += [
            f"metrics.jsonl: {key}: {name} is {found.get(name)}, expected {expected.get(name)}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
    return problems + _tensorboard(run, rows)


def exported(run: Path) -> dict[str, torch.Tensor]:
    """All exported tensors of a run by name."""
    return {name: value for path in (run / "export").glob("*.safetensors") for name, value in load_file(path).items()}


def read_rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl in file order."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _key(row: dict) -> tuple[int, str]:
    """The step, and train, validation, forgetting, save or start: the first word of the row's curves."""
    return row["step"], next(name for name in row if name != "step").partition("/")[0]


def _tensorboard(run: Path, rows: list[dict]) -> list[str]:
    """Whether TensorBoard shows exactly these rows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = Counter(
        (name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)
    )
    wanted = Counter(
        (name, row["step"], torch.tensor(value, dtype=torch.float32).item())
        for row in rows
        for name, value in row.items()
        if name != "step"
    )
    return [
        f"tensorboard: {point} is in only one of the two, or twice" for point in (shown - wanted) + (wanted - shown)
    ]
