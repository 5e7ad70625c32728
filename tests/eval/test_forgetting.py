"""Forgetting against its definition: transformers' logits, one document at a time, in fp64."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data.tokens import load_tokenizer
from eval.forgetting import divergence
from eval.questions import beginning, encode_options, read_questions, right_answers
from tests.tiny import SENTENCES, tiny_tokenizer, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
NEW = 5
FIGURES = ("perplexity_per_byte", "kl", "agreement", "questions")
CASES = ("base full", "base grad_op", "base none", "base full offload", "untied full", "extended full")
TEXTS = [*SENTENCES, "The bank", "Own funds of\n\nthe bank – 8% é."]  # seven documents for two ranks, very unequal


def tune(source: Path, target: Path, seed: int) -> None:
    """The same model with noise on all weights, as if it had been trained."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    noisy = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(noisy, target / "model.safetensors", metadata={"format": "pt"})


def extend(source: Path, target: Path) -> None:
    """NEW tokens, as scripts/extend_vocabulary.py leaves them: rows, tokenizer and new_tokens.json."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    first = len(tiny_tokenizer())
    name = "model.embed_tokens.weight"
    rows = 0.3 * torch.randn(NEW, tensors[name].shape[1], generator=torch.Generator().manual_seed(9))
    tensors[name] = torch.cat([tensors[name][:first], rows])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": first + NEW}
    (target / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(source))
    tokenizer.add_tokens([" own funds", " total risk", " of the bank", "zz1", "zz2"])
    tokenizer.save_pretrained(target)
    (target / "new_tokens.json").write_text(json.dumps({"first_id": first}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting")
    write_tiny_model(folder / "base")
    write_tiny_model(folder / "untied", family="qwen2", tied=False, vocab_size=391)
    extend(folder / "base", folder / "extended")
    for i, name in enumerate(("base", "untied", "extended")):
        tune(folder / name, folder / f"{name}-tuned", i)
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    return folder


def torchrun(world_size: int, *arguments: object) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple[int, int], dict]:
    """By (world size, rank)."""
    for world_size in (1, 2):
        torchrun(world_size, Path(__file__).with_name("forgetting_worker.py"), folder)
    return {(w, r): json.loads((folder / f"{w}.{r}.json").read_text()) for w, r in ((1, 0), (2, 0), (2, 1))}


def log_p(path: Path, ids: list[int], first: int, tokens: int | None = None) -> torch.Tensor:
    """log-probabilities, fp64 `(targets, tokens)`, of what follows the first `first` tokens; of the first `tokens` tokens."""
    if path not in MODELS:
        MODELS[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = MODELS[path](torch.tensor([ids])).logits[0, first - 1 : -1]
    return logits[:, :tokens].double().log_softmax(-1)


MODELS: dict[Path, torch.nn.Module] = {}


def nats(path: Path, ids: list[int], first: int) -> float:
    return -log_p(path, ids, first).gather(1, torch.tensor(ids[first:])[:, None]).sum().item()


def by_hand(base: Path, tuned: Path, words_of: Path, shared: int, every: int = 1) -> dict[str, float]:
    """All four figures, text by text and token by token."""
    tokenizer = load_tokenizer(str(words_of))
    own = load_tokenizer(str(tuned))
    kl, same, tokens, loss = 0.0, 0, 0, 0.0
    for text in TEXTS:
        first = beginning(tokenizer)
        ids = first + tokenizer.encode(text, add_special_tokens=False)
        p, q = (log_p(path, ids, len(first), shared) for path in (base, tuned))
        kl += (p.exp() * (p - q)).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += len(p)
        first = beginning(own)
        loss += nats(tuned, first + own.encode(text, add_special_tokens=False), len(first))
    questions = read_questions()[::every]
    options = [nats(tuned, ids, flags.index(True)) for ids, flags in encode_options(own, questions)]
    right = right_answers(questions, options)
    return {
        "perplexity_per_byte": math.exp(loss / sum(len(text.encode()) for text in TEXTS)),
        "kl": kl / tokens,
        "agreement": same / tokens,
        "questions": sum(right) / len(right),
    }


@pytest.mark.parametrize("name", ["base", "untied", "extended"])
def test_during_training_the_figures_equal_the_definition(folder, results, name):
    # Of an extended vocabulary only the old tokens are compared, of the others all that the tokenizer has.
    shared = len(tiny_tokenizer(391 if name == "untied" else 384))
    expected = by_hand(folder / name, folder / f"{name}-tuned", folder / name, shared, every=4)
    assert expected["kl"] > 0.01 and 0.1 < expected["agreement"] < 1
    if name == "extended":  # over all rows it would be another figure
        every_row = by_hand(folder / name, folder / f"{name}-tuned", folder / name, shared + NEW, every=4)
        assert abs(every_row["kl"] - expected["kl"]) > 1e-3
    for case in (case for case in CASES if case.startswith(name)):
        for result in results.values():
            for figure in FIGURES:
                found = result[case]["tuned"][f"forgetting/{figure}"]
                assert found == pytest.approx(expected[figure], abs=1e-5), (case, figure)


def test_the_base_has_forgotten_nothing(results):
    for result in results.values():
        for case in CASES:
            assert 0 <= result[case]["unchanged"]["forgetting/kl"] < 1e-6
            assert result[case]["unchanged"]["forgetting/agreement"] == 1.0


def test_one_and_two_ranks_agree_under_every_strategy(results):
    reference = results[1, 0]["base full"]["tuned"]
    for key, result in results.items():
        assert result == result | {case: results[key[0], 0][case] | host(result[case]) for case in CASES}, (
            "ranks differ"
        )
        for case in CASES:
            assert result[case]["sharded"], case
            for figure, value in result[case]["tuned"].items():
                assert value == pytest.approx(results[1, 0][case]["tuned"][figure], abs=1e-5)
                if case.startswith("base"):
                    assert value == pytest.approx(reference[figure], abs=1e-5)


def host(result: dict) -> dict:
    """What belongs to a rank alone."""
    return {"host_bytes": result["host_bytes"], "line": result["line"]}


def test_the_base_is_kept_once_over_all_ranks(results):
    tokens = sum(len(tiny_tokenizer().encode(text)) for text in TEXTS)
    whole = tokens * (2 * len(tiny_tokenizer()) + 8)
    assert results[1, 0]["base full"]["host_bytes"] == whole
    assert [results[2, r]["base full"]["host_bytes"] for r in (0, 1)] != [whole, 0]
    assert sum(results[2, r]["base full"]["host_bytes"] for r in (0, 1)) == whole


def test_a_signal_on_one_rank_ends_it_on_all(results):
    for result in results.values():
        assert result["stopped"] is None
        assert result["stopped at the start"] is None


def test_divergence_is_exact_and_survives_rounding():
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(50, 4000, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert divergence(p.float(), q.float()) == pytest.approx(exact.float(), rel=1e-4)
    assert divergence(p.half(), q.float()) == pytest.approx(exact.float(), rel=2e-3)
    itself = divergence(p.half(), p.float())
    assert itself.min() > -1e-6 and itself.max() < 1e-5


# --- From the command line: two model directories. --------------------------------------------------------------------


def evaluate(world_size: int, folder: Path, base: str, tuned: str, *options: object) -> dict:
    out = folder / f"{base}-{tuned}-{world_size}.json"
    script = ROOT / "scripts" / "evaluate_forgetting.py"
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = (folder / base, folder / tuned, "--texts", folder / "texts.jsonl", "--dtype", "fp32", "--json", out)
    printed = torchrun(world_size, script, *arguments, *options)
    assert printed.count("questions answered rightly") == 1  # rank 0 alone prints
    return json.loads(out.read_text())


def test_before_and_after_equal_the_definition_with_another_vocabulary(folder):
    """The base against a tuned model that has more tokens: its own words for bytes, the base's for KL."""
    found = {ranks: evaluate(ranks, folder, "base", "extended-tuned") for ranks in (1, 2)}
    shared = len(tiny_tokenizer())
    expected = by_hand(folder / "base", folder / "extended-tuned", folder / "base", shared)
    before = by_hand(folder / "base", folder / "base", folder / "base", shared)
    for result in found.values():
        assert result["shared_tokens"] == shared
        assert result["compared_targets"] == result["targets"] == sum(len(tiny_tokenizer().encode(t)) for t in TEXTS)
        assert result["kl"]["value"] == pytest.approx(expected["kl"], abs=1e-5)
        assert result["agreement"]["value"] == pytest.approx(expected["agreement"], abs=1e-5)
        for name, figures in (("base", before), ("tuned", expected)):
            assert result["perplexity_per_byte"][name]["value"] == pytest.approx(
                figures["perplexity_per_byte"], abs=1e-4
            )
            assert result["questions"]["all"][name]["value"] == pytest.approx(figures["questions"], abs=1e-5)
        change = result["perplexity_per_byte"]["change"]
        assert change["low"] < change["value"] < change["high"]
    assert found[1]["kl"] == {name: pytest.approx(value, abs=1e-6) for name, value in found[2]["kl"].items()}
    assert found[1]["processes"], found[2]["processes"] == (1, 2)


def test_tokens_are_matched_by_their_string(folder, tmp_path):
    """The same model with other ids for its tokens has forgotten nothing; a text is compared up to a token it lacks."""
    from eval.compare_models import Loaded, _compare, shared_ids
    from model.architectures import read_model_config
    from model.language_model import build_on_meta, load_weights

    def loaded(path: Path) -> Loaded:
        model = build_on_meta(read_model_config(str(path))).eval()
        load_weights(model, str(path), torch.device("cpu"))
        return Loaded(model, load_tokenizer(str(path)))

    class Alone:
        rank, world_size, device, flags = 0, 1, torch.device("cpu"), None

    base, other = loaded(folder / "base"), loaded(folder / "base")
    lacking = tiny_tokenizer().encode(" own", add_special_tokens=False)[-1]
    order = torch.randperm(len(base.tokenizer), generator=torch.Generator().manual_seed(0)).tolist()
    vocabulary = base.tokenizer.get_vocab()

    class Renamed:
        """The tokenizer with id `order[i]` for token i, and none for one of them."""

        def get_vocab(self) -> dict[str, int]:
            return {token: order[i] for token, i in vocabulary.items() if i != lacking}

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [order[i] for i in base.tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    with torch.no_grad():
        rows = other.model.causal_lm.get_input_embeddings().weight
        rows[torch.tensor(order)] = rows[: len(order)].clone()
    other = Loaded(other.model, Renamed())
    assert len(shared_ids(base, other)[0]) == len(order) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.all_reduce", lambda *arguments, **options: None)
        kl, same, compared, shared = _compare(base, other, TEXTS, Alone, lambda done: None)
    assert shared == len(order) - 1
    tokens = [base.tokenizer.encode(text) for text in TEXTS]
    assert compared.tolist() == [ids.index(lacking) + 1 if lacking in ids else len(ids) for ids in tokens]
    assert sum(map(len, tokens)) > compared.sum() > 0
    assert same.tolist() == compared.tolist()
    assert abs(kl).max() < 1e-4


def test_a_chat_is_no_general_text(folder, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("evaluate_forgetting", ROOT / "scripts" / "evaluate_forgetting.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    arguments = ["x", str(folder / "base"), str(folder / "base"), "--texts", str(folder / "chat.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(UserError, match=r"chat.jsonl, line 1 is a chat"):
        module.main()
    monkeypatch.setattr(sys, "argv", [*arguments[:3], "--max-bytes", "0"])
    with pytest.raises(UserError, match="--max-bytes must be 1 or more"):
        module.main()
