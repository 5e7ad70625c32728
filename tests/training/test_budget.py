"""A budget for forgetting: the weights that a run exports under it, and its certificate, on 1 and 2 ranks."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.sha256 import sha256
from configs.config import EWC, Batch, Config, Data, Eval, Forgetting, LoRA, Model, Optimizer, Run
from data.encoding import ExampleEncoder
from data.sources import Corpus, as_corpus
from data.tokens import load_tokenizer
from eval.forgetting import FEWEST_PROMPTS, TASK_TOKENS, task_prompts
from eval.general_text import CERTIFICATE, SELECTION, held_out_texts, training_texts
from eval.questions import read_questions
from eval.upper_bound import BETS, BoundedMean, bounded_mean
from model.architectures import read_model_config
from model.language_model import NEW_ROWS, build_on_meta, load_weights, trained_parameters
from model.lora import add_adapters, init_adapters
from model.weights import tensors_of_checkpoint
from scripts.verify.files import Differs, check_files, read_record
from tests.distributed.launch import ENVIRONMENT, WORKER, launch, rows, run_of, weights, workplace, write_plan
from tests.distributed.test_record import forge_export
from tests.distributed.test_vocabulary import NEW, extend
from tests.in_memory import chats, texts, vowels
from tests.processes import run_python
from tests.tiny import write_chat_file
from training import budget
from training.budget import (
    CAP,
    DROP,
    TOLERANCE,
    Line,
    certificate_lines,
    largest_alpha,
    means_of,
    trained_on,
    used,
)
from training.checkpoint_export import read_export, write_export
from training.checkpointer import RunRecord
from training.ending import check_recorded
from training.inputs import Questions
from training.model_card import read_results
from training.questions import KEPT_TOKENS, prompts_to_keep

MAX_KL = "forgetting.max_kl=0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, the same with new tokens, data and the config of 4 steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("budget")
    workplace(
        folder,
        16,
        6,
        model={"layers": 1, "hidden": 32},
        data="",
        micro_batch=8,
        rate=2e-2,
        run="eval_general=True, save_every=2, keep_last=2, log_to=()",
    )
    extend(folder / "model", folder / "extended", NEW)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    """`straight` and `killed` on 1 rank, `signalled`, `extended`, `kept` (prompts alone), `scored` (by a
    metric that fails, then by another) and, in bf16, `narrow` on 2, `scored-alone` on 1 rank. `large` has no budget at its end; `large-export` is its
    export under a large one. `strict` is `straight` with another budget, judged by text of the task."""
    runs, task, keep = folder / "runs", folder / "certificate.jsonl", folder / "keep.jsonl"
    write_chat_file(keep, 25, seed=3)
    write_chat_file(folder / "others.jsonl", 16, seed=2)
    words = [json.loads(line)["messages"][1]["content"] for line in (folder / "others.jsonl").read_text().splitlines()]
    trained = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    task.write_text("".join(json.dumps({"kind": "task", "text": text}) + "\n" for text in [*words, trained]))
    first = [
        run_of(folder, "large", "forgetting.max_kl=1e9"),
        run_of(folder, "straight", MAX_KL),
        run_of(folder, "killed", MAX_KL, plant="kill_at_alpha:4"),
    ]
    killed = run_python(WORKER, write_plan(folder, "first", first), **ENVIRONMENT)
    assert killed.returncode and not (runs / "killed" / "export").exists(), killed.stdout + killed.stderr
    shutil.copytree(runs / "large" / "export", runs / "large-export")
    shutil.copytree(runs / "straight", runs / "strict")
    shutil.rmtree(runs / "strict" / "checkpoints" / "step-000002")  # one candidate is enough
    strict = ("forgetting.max_kl=0.11", "forgetting.strict=True")
    drop = f"forgetting.keep={keep}", "forgetting.max_drop=0.5", "eval.max_new_tokens=8", "optimizer.max_steps=2"
    second = [
        run_of(folder, "killed", MAX_KL),
        run_of(folder, "large"),
        run_of(folder, "strict", *strict, plant=f"certificate:{task}", expect=3),
        run_of(folder, "strict", *strict, expect=3),
        run_of(folder, "scored-alone", *drop, "eval.metric=tests.in_memory:vowels"),
    ]
    launch(folder, "second", 0, second)
    extended = f"model.path={folder / 'extended'}", "optimizer.max_steps=2", "run.keep_last=1"
    two = [
        run_of(folder, "signalled", MAX_KL, "run.keep_last=1", "forgetting.strict=True", plant="signal_at_alpha:4"),
        run_of(folder, "signalled", MAX_KL),
        run_of(folder, "extended", MAX_KL, *extended),
        run_of(folder, "narrow", MAX_KL, "optimizer.memory=8N", *extended[1:]),
        run_of(folder, "kept", MAX_KL, f"forgetting.keep={keep}", "forgetting.general_text=False", *extended[1:]),
        run_of(folder, "scored", *drop, "eval.metric=tests.in_memory:fails_at_the_end", expect=2),
        run_of(folder, "scored", *drop, "eval.metric=tests.in_memory:vowels", MAX_KL),
    ]
    launch(folder, "two", 2, two)
    return runs


def certificate(run: Path) -> dict:
    return json.loads((run / "export" / "certificate.json").read_text())


def options_of(**changes: object) -> Namespace:
    """The command line of scripts/export.py."""
    defaults = {"step": None, "best": False, "average_with_base": None, "merge_lora": False}
    return Namespace(**defaults | {"dtype": "auto"} | changes)


def test_bisection_returns_the_largest_alpha():
    for limit in (0.9, 0.5, 0.2, 0.01, 0.0):
        tried = []
        alpha = largest_alpha(lambda alpha, tried=tried, limit=limit: tried.append(alpha) or 0.8 * alpha**2 <= limit)
        right = min(1.0, math.sqrt(limit / 0.8))
        assert right - TOLERANCE < alpha <= right and (alpha < 1 or tried == [1.0])
        assert len(tried) <= 1 - math.log2(TOLERANCE)
    # If all pieces of a kind but one are trained on, no budget is met.
    for left in (0, 1):
        kl = {"prose": BoundedMean(0.1, 0.1, 99, 0), "code": bounded_mean(np.zeros(left), cap=4.0)}
        assert not used(kl, Forgetting(max_kl=1.0), "bound") <= 1.0
    # A drop has its own budget.
    drop = {DROP: BoundedMean(-0.1, 0.04, 99, 0)}
    assert used(drop, Forgetting(max_drop=0.05), "bound") == pytest.approx(0.8)
    assert used(drop | {"prose": BoundedMean(0.1, 0.2, 99, 0)}, Forgetting(max_kl=0.1, max_drop=0.05)) > 0.99


@pytest.mark.parametrize(
    ("selection", "judged", "max_kl", "tested", "alpha", "misses"),
    [
        (1.0, 0.9, 0.5, 4, math.sqrt(0.5), []),
        (1.0, 1.2, 0.5, 3, 0.569, []),  # the third of four alphas, 0.638, fails
        (1.0, 4.0, 0.5, 1, 0.5, ["its KL is too large"]),  # half of the budget, on the selection text
        (math.nan, 0.0, 0.5, 1, 0.0, ["alpha 0 is the base"]),
        (1.0, 0.9, 0.0, 1, 0.0, ["alpha 0 is the base"]),
        (0.1, 0.9, 1.0, 1, 1.0, ["its gain is too small"]),
    ],
)
def test_best_checkpoint_is_judged_by_certificate_text(
    selection, judged, max_kl, tested, alpha, misses, ranks, monkeypatch, tmp_path
):
    """KL grows with alpha squared, on the selection text by 1 or 4 (steps 2 and 4). Bounds are a tenth above it."""
    here = SimpleNamespace(step=0, alpha=None, tested=[])

    class Texts:
        def __init__(self, path: Path, *arguments: object) -> None:
            self.path, self.sha256 = path, {path.name: "0123"}

        def measure(self, alpha: float) -> dict[str, BoundedMean]:
            here.alpha = alpha
            here.tested.append(alpha) if self.path == CERTIFICATE else None
            of_step = judged if self.path == CERTIFICATE else selection * {2: 1, 4: 4}[here.step]
            kl = of_step * alpha**2
            return {kind: BoundedMean(kl, 1.1 * kl, 80, 0) for kind in "ab"}

        def measured(self, kl: dict) -> list[dict]:
            return [{"file": self.path.name}]

    def load(path: Path) -> None:
        here.step = int(path.name.removeprefix("step-"))

    def score(*arguments: object) -> dict:
        return {"value": {2: 3.0, 4: 4.0}[here.step] - here.alpha, "low": None, "high": None}

    def go(alpha: float) -> None:
        here.alpha = alpha

    stand_ins = {"Texts": Texts, "Line": lambda *arguments: SimpleNamespace(load=load, go=go), "_score": score}
    stand_ins["complete_checkpoints"] = lambda folder: [folder / "step-000002", folder / "step-000004"]
    stand_ins["fingerprint_of_base"] = str
    stand_ins["marks_of"] = lambda path: {"checkpoint": str(path), "identity": str(path)}
    stand_ins["start_tokens"] = lambda tokenizer: [0]
    stand_ins["certificate_lines"] = stand_ins["means_of"] = lambda *arguments: []
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(budget, name, stand_in)
    monkeypatch.setattr(budget.forgetting, "start_forgetting", lambda *_: SimpleNamespace(line=str))
    model, data = torch.nn.Linear(1, 1), SimpleNamespace(train=None, validation=None, dealer=None, first_new_row=None)
    data.keep = None
    data.files = {"the weights": {"model.safetensors": "0123"}}
    monkeypatch.setattr(budget, "hash_weights", lambda path: {"model.safetensors": "4567"})
    stop = SimpleNamespace(ranks=ranks)
    run = budget.AgainstBase(model, torch.bfloat16, SimpleNamespace(decode=str), data, stop, lambda line: None)  # pyright: ignore
    evaluations = SimpleNamespace(functions={"forgetting": run}, best_by="validation/loss", best_step=2)
    # At alpha 0 and 1 the checkpoint of step 2 has 3 and 2; the best evaluation is below, if a floor of the gain is tested.
    evaluations.base_value, evaluations.best_value = None, -1.0 if alpha == 1 else 2.0
    floor = 0.3 if alpha == 1 else 0.0
    config = SimpleNamespace(forgetting=Forgetting(max_kl=max_kl, min_gain=floor), model=SimpleNamespace(path="base"))
    training = SimpleNamespace(config=config, directory=tmp_path, model_config=None)
    record = RunRecord(tmp_path, Corpus(()), ranks)
    record.append("certificate")  # of an earlier budget
    asked = training, 4, evaluations, record, torch.float32
    with pytest.raises(UserError, match="the weights in base have changed since this start; put them back"):
        budget.keep_budget(*asked)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(budget, "hash_weights", lambda path: data.files["the weights"])
    said = budget.keep_budget(*asked)  # pyright: ignore[reportArgumentType]
    assert said and (said["readings"], said["dtype"]) == (2, "bfloat16")  # the model's weights are fp32
    assert (said["step"], said["weights"], said["met"]) == (2, "best", not misses)
    assert said["misses"] == misses
    assert said["alpha"] == pytest.approx(alpha, abs=TOLERANCE) and len(here.tested) == tested
    assert said["averaged"] == (None if alpha == 1 else {"share_of_tuned": said["alpha"], "base": "base"})
    assert said["value"] == 3.0 - said["alpha"] and said["bound"] == pytest.approx(1.1 * judged * said["alpha"] ** 2)
    assert said["gain"] == pytest.approx((3.0 - said["value"]) / (3.0 - evaluations.best_value))
    assert [text["file"] for text in said["texts"]] == [CERTIFICATE.name]
    assert (said["level"], said["cap"], said["start"]) == (0.95, CAP * max_kl, "[0]")
    assert (here.step, here.alpha) == (2, said["alpha"])  # the export has the weights that the model holds


@pytest.mark.parametrize("name", ["straight", "signalled", "extended"])
def test_export_lies_between_base_and_checkpoint(folder, runs, ranks, name):
    found, base = weights(runs / name), folder / ("extended" if name == "extended" else "model")
    said, alpha = certificate(runs / name), certificate(runs / name)["alpha"]
    assert 0.1 < alpha < 0.9 and said["met"]
    tuned = tensors_of_checkpoint(runs / name / "checkpoints" / f"step-{said['step']:06d}")
    old = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for tensor, value in found.items():
        b, t = old[tensor].double(), tuned.read(tensor)[: len(value)].double()
        expected = b + alpha * (t - b)
        if name == "extended" and tensor == "model.embed_tokens.weight":
            expected[384:] = t[384:]
            assert len(value) == 384 + len(NEW) and not torch.equal(b[384:], t[384:])
        largest = torch.maximum(b.abs(), t.abs())
        assert ((value.double() - expected).abs() <= 2**-23 * largest).all(), tensor
    record = json.loads((runs / name / "export" / "export.json").read_text())
    assert (record["step"], record["averaged"]["share_of_tuned"]) == (said["step"], alpha)
    assert (record["asked"]["budget"]["max_kl"], record["validation_loss"]) == (0.1, said["value"])


def test_kill_and_signal_in_search_change_nothing(folder, runs):
    said = [certificate(runs / name) for name in ("straight", "killed")]
    assert [name for name in said[0] if said[0][name] != said[1][name]] in ([], ["checkpoint"])  # that of other files
    before, after = weights(runs / "straight"), weights(runs / "killed")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "stopped by a signal before the export; start again to continue" in (folder / "two.out").read_text()
    one, two = certificate(runs / "straight"), certificate(runs / "signalled")
    assert (one["step"], one["weights"]) == (two["step"], two["weights"])
    assert abs(one["alpha"] - two["alpha"]) <= TOLERANCE


def test_certificate_agrees_with_the_exported_files(folder, runs):
    """KL, the numbers of its tokens, the score and the choice, from the files alone."""
    content = certificate(runs / "straight")
    (judged,) = (text["kl"] for text in content["texts"])
    pieces = [json.loads(line) for line in CERTIFICATE.read_text().splitlines()]
    assert {kind: of["count"] for kind, of in judged.items()} == {"prose": 80, "code": 80, "questions": 80}
    for kind, of in judged.items():
        chosen = [piece["text"] for piece in pieces if piece["kind"] == kind]
        sums = np.array([kl_of(folder / "model", runs / "straight" / "export", text) for text in chosen])
        expected = bounded_mean(sums[:, 0] / sums[:, 1], cap=0.4)
        assert (of["mean"], of["bound"]) == pytest.approx((expected.mean, expected.bound), rel=1e-3)
    assert content["bound"] == max(of["bound"] for of in judged.values()) <= 0.1
    assert [candidate["step"] for candidate in content["candidates"]] == [2, 4]
    assert all(0.95 < candidate["used"] <= 1 for candidate in content["candidates"])  # no larger alpha is within it
    chosen = next(candidate for candidate in content["candidates"] if candidate["step"] == content["step"])
    assert 0.7 * chosen["alpha"] < content["alpha"] <= chosen["alpha"]
    assert content["low"] < content["value"] < content["high"]


MODELS: dict[Path, torch.nn.Module] = {}


def kl_of(base: Path, tuned: Path, text: str | list[int], targets: int | None = None) -> tuple[float, int]:
    """(KL over the last `targets` tokens in nats, their number), by transformers, in fp64."""
    ids = load_tokenizer(str(base)).encode("\n" + text) if isinstance(text, str) else text
    targets = targets or len(ids) - 1
    logs = []
    for path in (base, tuned):
        if path not in MODELS:
            MODELS[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logs.append(MODELS[path](torch.tensor([ids])).logits[0, :-1][-targets:].double().log_softmax(-1))
    p, q = logs
    return (p.exp() * (p - q)).sum().item(), len(p)


def test_budget_on_prompts_to_keep(folder, runs):
    """KL on the base's own greedy answers, from the files alone. Each fifth prompt selects."""
    content = certificate(runs / "kept")
    (text,) = content["texts"]
    assert (text["file"], text["sha256"]) == ("forgetting.keep", sha256(folder / "keep.jsonl"))
    tokenizer = load_tokenizer(str(folder / "model"))
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    stops, values = {tokenizer.eos_token_id, *tokenizer.encode("<|im_end|>")}, []
    for number, line in enumerate((folder / "keep.jsonl").read_text().splitlines()):
        if number % 5 == 0:
            continue
        question = json.loads(line)["messages"][:1]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        answer = greedy(base, ids, KEPT_TOKENS, stops)
        nats, targets = kl_of(folder / "model", runs / "kept" / "export", ids + answer, len(answer))
        values.append(nats / targets)
    kl, expected = text["kl"]["forgetting.keep"], bounded_mean(np.array(values), cap=0.4)
    assert (kl["mean"], kl["bound"]) == pytest.approx((expected.mean, expected.bound), rel=1e-3)
    assert kl["count"] == 20 and 0.02 < kl["mean"] < 0.1 < kl["bound"] == content["bound"] and not content["met"]


def greedy(model: torch.nn.Module, prompt: list[int], limit: int, stops: set[int]) -> list[int]:
    """The greedy answer by transformers, with the token that ends it."""
    answer: list[int] = []
    while len(answer) < limit and not (answer and answer[-1] in stops):
        with torch.no_grad():
            answer.append(model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
    return answer


def test_drop_of_scores_is_bounded(folder, runs):
    """The scores of base and export, from the files alone. Both numbers of ranks agree."""
    tokenizer = load_tokenizer(str(folder / "model"))
    stops = {tokenizer.eos_token_id, *tokenizer.encode("<|im_end|>")}
    for name, max_kl in (("scored", 0.1), ("scored-alone", None)):
        content = certificate(runs / name)
        drop = content["texts"][-1]["drop"]
        scores = []
        for path in (folder / "model", runs / name / "export"):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for number, line in enumerate((folder / "keep.jsonl").read_text().splitlines()):
                if number % 5:
                    question = json.loads(line)["messages"][:1]
                    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
                    answer = tokenizer.decode(greedy(model, prompt, 8, stops), skip_special_tokens=True).strip()
                    scores.append(vowels([answer], [])["vowels"])
        base, tuned = np.array(scores).reshape(2, 20)
        expected = bounded_mean(base - tuned, 1.0, BETS)
        assert (drop["mean"], drop["bound"]) == pytest.approx((expected.mean, expected.bound), abs=1e-6)
        assert (drop["base"], drop["count"]) == (pytest.approx(base.mean()), 20) and np.any(base != tuned)
        assert (content["max_kl"], content["max_drop"], content["texts"][-1]["file"]) == (
            max_kl,
            0.5,
            "forgetting.keep",
        )
        assert len(content["texts"]) == 1 + (max_kl is not None) and (content["bound"] is None) == (max_kl is None)
        assert drop["metric"] == "tests.in_memory:vowels" and drop["bound"] <= 0.5
        assert content["met"] == (max_kl is None or content["bound"] <= max_kl)
        lines = "\n".join(certificate_lines(content))
        assert f"the mean score on forgetting.keep is at most {drop['bound']:.4g} below the base's; chosen" in lines
        assert f"tests.in_memory:vowels on forgetting.keep: {tuned.mean():.4g}, the base's {base.mean():.4g};" in lines
        list(check_files(runs / name, read_record(runs / name), None))
    out = (folder / "second.out").read_text()
    assert "budget: forgetting.max_drop=0.5 is met with 95% confidence: the mean score on forgetting.keep is" in out


def test_failing_metric_ends_all_ranks(folder, runs):
    """The last run of `scored` exports what the first has trained."""
    out = (folder / "two.out").read_text()
    sentence = "error: eval.metric=tests.in_memory:fails_at_the_end fails: ValueError: no score"
    assert out.count(sentence) == 1 and "Traceback" not in out  # one line of the node, and exit code 2 of both ranks


def test_prompts_to_keep_end_in_one_sentence(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder / "model"))
    encoder = ExampleEncoder(tokenizer)
    lines = (folder / "keep.jsonl").read_text().splitlines()
    path = tmp_path / "keep.jsonl"

    def read(metric: str | None = None, **settings: object) -> tuple[Questions, str]:
        parts = Model(str(folder / "model")), Data(()), Batch(4), Optimizer(1e-3), Run("r")
        kept = Forgetting(keep=str(path), **settings)  # pyright: ignore[reportArgumentType]
        return prompts_to_keep(Config(*parts, forgetting=kept, eval=Eval(metric)), encoder, is_first=True)

    for content, words in (
        (
            lines[:18] + lines[:5],
            "keep.jsonl has 18 different prompts, which is too few: even if .* is 1.005 times the",
        ),
        ([*lines, '{"text": "a"}'], "line 26 is no chat; rows of forgetting.keep need `messages`"),
        (
            [json.dumps({"messages": [{"role": "user", "content": "a " * 600}]})],
            "line 1: its 1,2.* leave no room for an",
        ),
    ):
        path.write_text("\n".join(content))
        with pytest.raises(UserError, match=words):
            read()
    alone = [json.dumps({"messages": json.loads(line)["messages"][:1]}) for line in lines[:20]]
    path.write_text("\n".join(alone))
    bare, digest = read()
    assert digest == sha256(path)
    path.write_text("\n".join(lines[:20]))
    kept, _ = read()
    assert kept.prompts == bare.prompts  # a final answer is not read
    with pytest.raises(UserError, match="20 different prompts, which is too few: .* bound is 6.768 times the budget"):
        read(max_drop=0.05)
    asked, _ = read(max_drop=0.5)
    assert asked.line == "answers for forgetting.keep at the end: 20 prompts"
    assert asked.ideal == {"exact_match": 1.0} and asked.examples[0]["messages"][-1]["role"] == "assistant"
    for metric, words in (
        ("tests.in_memory:no_metric", "eval.metric=tests.in_memory:no_metric: .* has no function no_metric"),
        ("math:hypot", "eval.metric=math:hypot fails: TypeError"),
    ):
        with pytest.raises(UserError, match=words):
            read(metric, max_drop=0.5)
    path.write_text("\n".join(alone))
    with pytest.raises(UserError, match="line 1 does not end with an answer; forgetting.max_drop scores it as the"):
        read(max_drop=0.5)


def test_large_budget_changes_no_export(runs):
    said = json.loads((runs / "large-export" / "export.json").read_text())
    plain = json.loads((runs / "large" / "export" / "export.json").read_text())
    del said["files"]["certificate.json"]
    assert said["files"] == plain["files"] and "model.safetensors" in plain["files"]
    assert (said["asked"]["budget"]["max_kl"], said["averaged"]) == (1e9, None)
    assert "asked" not in plain and not (runs / "large" / "export" / "certificate.json").exists()


def test_unmet_budget_is_exit_code_3_if_strict(folder, runs):
    said, out = certificate(runs / "strict"), (folder / "second.out").read_text()
    (judged,) = (text["kl"] for text in said["texts"])
    assert not said["met"] and said["bound"] == judged["task"]["bound"] > 0.11
    assert [text["left_out"] for text in said["texts"]] == [1]
    assert (said["readings"], certificate(runs / "straight")["readings"]) == (2, 1)
    assert "this run has read the certificate's text 2 times, and the level holds for the first" in out
    assert "warning: 1 pieces of it are left out: the training data have them" in out
    assert all(candidate["used"] <= 1 for candidate in said["candidates"]) and (runs / "strict" / "export").is_dir()
    assert out.count("budget: forgetting.max_kl=0.11 is NOT met: its KL is too large; the KL to") == 1
    assert out.count("error: forgetting.max_kl=0.11 is NOT met") == 2 and "already finished: 4 steps" in out
    # The exit code takes no line away. Output and errors come in any order.
    lines = [line for line in out.splitlines() if f"to {runs / 'strict' / 'export'}" in line]
    assert len(lines) == 1 and lines[0].startswith("exported the last weights")


def test_remedies_of_training_are_named():
    corpus = SimpleNamespace(names=("main", "a", "b"), anchored=("b",))
    config = SimpleNamespace(forgetting=SimpleNamespace(anchor_weight=0.5), lora=LoRA(rank=2), ewc=EWC(strength=10.0))
    expected = "data.mix of a, forgetting.anchor_weight=0.5 on b, ewc.strength=10 (ewc.estimator=model), lora.rank=2"
    assert ", ".join(means_of(config, corpus)) == expected  # pyright: ignore


def test_text_is_trained_on_by_its_middle(ranks):
    corpus = as_corpus(texts([40, 60, 5]))
    one, two = corpus.get(0)[0].tolist(), corpus.get(1)[0].tolist()
    other = [7 * i % 83 for i in range(40)]
    asked = [one, two[10:40], other[:9] + two[20:32] + other[:9], two[20:31], other, [], one[::-1]]
    assert trained_on(asked, corpus, ranks).tolist() == [True, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("name", "by"), [("straight", 2**-18), ("extended", 2**-18), ("narrow", 2**-7), ("by hand", 2**-7)]
)
def test_average_of_other_weights_is_named(runs, ranks, tmp_path, name, by):
    """The run's own exports, and one in bf16 of scripts/export.py."""
    run = Path(shutil.copytree(runs / ("straight" if name == "by hand" else name), tmp_path / "run"))
    if name == "by hand":
        options = options_of(step=2, average_with_base=0.3, dtype="bf16")
        write_export(tmp_path / "out", read_export(run, options, ranks), "")
    said = [line for line in check_files(run, read_record(run), None) if line.startswith("export ")]
    assert len(said) == 1 + (name == "by hand") and all("averages of the base and 0." in line for line in said)
    path = run / "export" / "certificate.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"met": ', b'"met" :'))
    with pytest.raises(Differs, match="certificate.json is not what"):
        list(check_files(run, read_record(run), None))
    path.write_bytes(whole)
    forge_export(run, by)
    with pytest.raises(Differs, match="model.norm.weight is not what .*checkpoints/step-00000"):
        list(check_files(run, read_record(run), None))


def test_export_script_follows_the_budget(runs, ranks, tmp_path):
    export, said = read_export(runs / "straight", options_of(), ranks), certificate(runs / "straight")
    assert (export.contents["step"], export.contents["averaged"]) == (said["step"], said["averaged"])
    for name, value in weights(runs / "straight").items():
        assert torch.allclose(export.weights.read(name), value, rtol=2**-23, atol=0)
    assert read_results(runs / "out", export).certificate == tuple(certificate_lines(said))
    assert certificate_lines(said)[-1] == "    trained with no remedy; measured in float32; each text begins with '\\n'"
    write_export(runs / "released", export, "")
    released = json.loads((runs / "released" / "export.json").read_text())["files"]
    assert released["certificate.json"] == sha256(runs / "straight" / "export" / "certificate.json")
    other = read_export(runs / "straight", options_of(step=2), ranks)
    assert other.contents["averaged"] is None and read_results(runs / "out", other).certificate == ()
    run = Path(shutil.copytree(runs / "straight", tmp_path / "straight"))
    shutil.copytree(runs / "released", tmp_path / "moved")
    check_recorded(run, tmp_path / "moved")
    for file in (tmp_path / "moved" / "export.json", run / "export" / "certificate.json"):
        file.write_text(file.read_text().replace("0.", "0.0", 1))
        with pytest.raises(UserError, match=f"{file.parent} is not what {run}/record.jsonl says of an export"):
            check_recorded(run, tmp_path / "moved")
            read_export(run, options_of(), ranks)
        shutil.copyfile(runs / "released" / "export.json", tmp_path / "moved" / "export.json")
    shutil.rmtree(run / "export")  # an export without it is not one without a budget
    with pytest.raises(UserError, match="has no export under its budget for forgetting: start it again to its end"):
        read_export(run, options_of(), ranks)
    assert read_export(run, options_of(step=4), ranks).contents["averaged"] is None


@pytest.mark.parametrize(("base", "first_new_row"), [("model", None), ("extended", 384)])
def test_alpha_multiplies_the_adapters(folder, base, first_new_row):
    settings, path = LoRA(rank=2), str(folder / base)
    model = build_on_meta(read_model_config(path))
    add_adapters(model.causal_lm, settings, path)
    load_weights(model, path, torch.device("cpu"))
    trained = trained_parameters(model)
    init_adapters(trained, seed=0)
    rows = {name: parameter.detach().clone() for name, parameter in trained.items() if name.endswith(NEW_ROWS)}
    for parameter in trained.values():
        parameter.data.add_(0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    forgetting = SimpleNamespace(model=model, stop=None, data=SimpleNamespace(first_new_row=first_new_row))
    config = SimpleNamespace(model=SimpleNamespace(path=path), lora=settings)
    line = Line(forgetting, config, torch.bfloat16)  # pyright: ignore[reportArgumentType]
    line.tuned = {name: parameter.detach().clone() for name, parameter in line.moved.items()}
    for alpha in (0.25, 0.0, 1.0):
        line.go(alpha)
        for name, parameter in model.named_parameters():  # frozen parameters, too
            assert torch.equal(parameter, before[name] * (alpha if ".lora_B." in name else 1)), name
    line.to_base()
    assert len(rows) == (base == "extended") and all(torch.equal(trained[name], rows[name]) for name in rows)


def test_measured_weights_are_rounded_as_exported(folder):
    """Training in fp32 from a base in bf16: the weights before that rounding have another KL, and are not exported."""
    path = str(folder / "model")
    model = build_on_meta(read_model_config(path))
    load_weights(model, path, torch.device("cpu"))
    forgetting = SimpleNamespace(model=model, stop=None, data=SimpleNamespace(first_new_row=None))
    config = SimpleNamespace(model=SimpleNamespace(path=path), lora=LoRA())
    line = Line(forgetting, config, torch.bfloat16)  # pyright: ignore[reportArgumentType]
    base = {name: parameter.detach().clone() for name, parameter in line.moved.items()}
    line.tuned = {name: value + 0.01 for name, value in base.items()}
    for alpha in (0.3, 1.0):
        line.go(alpha)
        for name, parameter in line.moved.items():
            found, expected = parameter.detach(), base[name] + alpha * 0.01
            assert torch.equal(found, found.bfloat16().float()) and not torch.equal(found, expected), name
            assert torch.allclose(found, expected, rtol=2**-8, atol=1e-6), name


def test_texts_of_budgets_share_nothing():
    def spans(found: list[str]) -> set[str]:
        flat = [" ".join(text.lower().split()) for text in found]
        return {text[i : i + 40] for text in flat for i in range(len(text) - 39)}

    parts = [[json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (SELECTION, CERTIFICATE)]
    questions = [question.prompt + option for question in read_questions() for option in question.options]
    parts += [[*held_out_texts(), *training_texts()], questions]
    known = [spans(part) for part in parts]
    for number, one in enumerate(known):
        for other in known[number + 1 : 4 if number < 2 else 0]:
            assert not one & other


def test_task_prompts_are_bounded_and_spread():
    assert task_prompts(texts([30] * 5)) is None
    short = chats([20] * 4)
    prompts = task_prompts(short)
    assert prompts is not None and len(prompts) == 4
    for item in range(4):  # the prompt, and the first token of the answer
        ids, is_target = prompts.get(item)
        assert ids.tolist() == short.get(item)[0][:11].tolist() and is_target.tolist() == [False] + [True] * 10
    for lengths in ([60] * 500, [3000] * 40, [50] * 20):
        prompts = task_prompts(chats(lengths))
        assert prompts is not None and len(prompts) >= FEWEST_PROMPTS
        assert TASK_TOKENS // 4 < prompts.targets.sum() <= TASK_TOKENS
        assert all(prompts.get(item)[1][-1] for item in range(len(prompts)))


def test_task_curve_is_the_kl_on_prompts(folder, runs):
    tokenizer, sums = load_tokenizer(str(folder / "model")), np.zeros(2)
    for line in (folder / "validation.jsonl").read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
        sums += kl_of(folder / "model", runs / "large-export", [*prompt, tokenizer.encode(answer["content"])[0]])
    rows_by_step = rows(runs / "large", "forgetting/task_kl")
    assert rows_by_step[4]["forgetting/task_kl"] == pytest.approx(sums[0] / sums[1], rel=1e-3)
    assert 0 <= rows_by_step[0]["forgetting/task_kl"] < 1e-5
