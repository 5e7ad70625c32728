"""Forgetting compared with its definition: the logits of transformers, one document at a time, in fp64."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.tokens import load_tokenizer
from eval.compare_models import ModelAndTokenizer, compare_distributions, shared_ids
from eval.forgetting import kl_divergence
from eval.questions import encode_options, read_questions, right_answers, start_tokens
from model.architectures import read_model_config
from model.language_model import load_for_evaluation
from tests.processes import run_ranks
from tests.tiny import SENTENCES, tiny_tokenizer, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 5
METRICS = ("perplexity_per_byte", "kl", "agreement", "questions")
PHASES = ("KL and agreement", "perplexity of base", "perplexity of tuned", "questions to base", "questions to tuned")
CASES = ("base full", "base none", "untied full offload", "extended full")
# Six documents of very different lengths, for two ranks.
TEXTS = [*SENTENCES, "The bank", "Own funds of\n\nthe bank – 8% é."]


def tune(source: Path, target: Path, seed: int) -> None:
    """Write the same model with noise added to all weights, as if it had been trained."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    noisy = {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(noisy, target / "model.safetensors", metadata={"format": "pt"})


def extend(source: Path, target: Path) -> None:
    """Write the model with NEW_TOKENS more tokens, as scripts/extend_vocabulary.py does."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    first = len(tiny_tokenizer())
    name = "model.embed_tokens.weight"
    rows = 0.3 * torch.randn(NEW_TOKENS, tensors[name].shape[1], generator=torch.Generator().manual_seed(9))
    tensors[name] = torch.cat([tensors[name][:first], rows])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"vocab_size": first + NEW_TOKENS}
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


def run(world_size: int, *arguments: object) -> str:
    done = run_ranks(world_size, *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple[int, int], dict]:
    """The worker's results by (world size, rank)."""
    for world_size in (1, 2):
        run(world_size, Path(__file__).with_name("forgetting_worker.py"), folder)
    return {(w, r): json.loads((folder / f"{w}.{r}.json").read_text()) for w, r in ((1, 0), (2, 0), (2, 1))}


def log_p(path: Path, ids: list[int], start: int, num_tokens: int | None = None) -> torch.Tensor:
    """Log-probabilities of what follows the first `start` tokens, fp64 `(targets, num_tokens)`.

    They are over the first `num_tokens` tokens of the vocabulary. Default: over all.
    """
    if path not in MODELS:
        MODELS[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = MODELS[path](torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits[:, :num_tokens].double().log_softmax(-1)


MODELS: dict[Path, torch.nn.Module] = {}


def nats(path: Path, ids: list[int], start: int) -> float:
    return -log_p(path, ids, start).gather(1, torch.tensor(ids[start:])[:, None]).sum().item()


def definition(base: Path, tuned: Path, tokenizer_of: Path, shared: int, every: int = 1) -> dict[str, float]:
    """All four metrics, text by text. KL and agreement use the tokens of `tokenizer_of`, the rest those of `tuned`."""
    tokenizer = load_tokenizer(str(tokenizer_of))
    tuned_tokenizer = load_tokenizer(str(tuned))
    kl, agreements, tokens, loss = 0.0, 0, 0, 0.0
    for text in TEXTS:
        start = start_tokens(tokenizer)
        ids = start + tokenizer.encode(text, add_special_tokens=False)
        p, q = (log_p(path, ids, len(start), shared) for path in (base, tuned))
        kl += (p.exp() * (p - q)).sum().item()
        agreements += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += len(p)
        start = start_tokens(tuned_tokenizer)
        loss += nats(tuned, start + tuned_tokenizer.encode(text, add_special_tokens=False), len(start))
    questions = read_questions()[::every]
    options = [nats(tuned, ids, flags.index(True)) for ids, flags in encode_options(tuned_tokenizer, questions)]
    right = right_answers(questions, options)
    return {
        "perplexity_per_byte": math.exp(loss / sum(len(text.encode()) for text in TEXTS)),
        "kl": kl / tokens,
        "agreement": agreements / tokens,
        "questions": sum(right) / len(right),
    }


@pytest.mark.parametrize("name", ["base", "untied", "extended"])
def test_during_training_the_metrics_equal_the_definition(folder, results, name):
    # With an extended vocabulary only the old tokens are compared, otherwise all tokens of the tokenizer.
    shared = len(tiny_tokenizer(391 if name == "untied" else 384))
    expected = definition(folder / name, folder / f"{name}-tuned", folder / name, shared, every=4)
    assert expected["kl"] > 0.01 and 0.1 < expected["agreement"] < 1
    if name == "extended":  # over all rows the KL is different
        every_row = definition(folder / name, folder / f"{name}-tuned", folder / name, shared + NEW_TOKENS, every=4)
        assert abs(every_row["kl"] - expected["kl"]) > 1e-3
    for case in (case for case in CASES if case.startswith(name)):
        for result in results.values():
            for metric in METRICS:
                value = result[case]["tuned"][f"forgetting/{metric}"]
                assert value == pytest.approx(expected[metric], abs=1e-5), (case, metric)


def test_the_base_has_forgotten_nothing(results):
    for result in results.values():
        for case in CASES:
            assert 0 <= result[case]["unchanged"]["forgetting/kl"] < 1e-6
            assert result[case]["unchanged"]["forgetting/agreement"] == 1.0


def test_one_and_two_ranks_agree_under_every_strategy(results):
    reference = results[1, 0]["base full"]["tuned"]
    for key, result in results.items():
        assert result == result | {case: results[key[0], 0][case] | per_rank(result[case]) for case in CASES}, (
            "ranks differ"
        )
        for case in CASES:
            assert result[case]["sharded"], case
            for metric, value in result[case]["tuned"].items():
                assert value == pytest.approx(results[1, 0][case]["tuned"][metric], abs=1e-5)
                if case.startswith("base"):
                    assert value == pytest.approx(reference[metric], abs=1e-5)


def per_rank(result: dict) -> dict:
    """The entries that differ between ranks."""
    return {"host_bytes": result["host_bytes"], "line": result["line"]}


def test_each_distribution_of_the_base_is_kept_on_one_rank(results):
    tokens = sum(len(tiny_tokenizer().encode(text)) for text in TEXTS)
    total = tokens * (2 * len(tiny_tokenizer()) + 8)
    assert results[1, 0]["base full"]["host_bytes"] == total
    assert [results[2, r]["base full"]["host_bytes"] for r in (0, 1)] != [total, 0]
    assert sum(results[2, r]["base full"]["host_bytes"] for r in (0, 1)) == total


def test_a_signal_on_one_rank_stops_all_ranks(results):
    for result in results.values():
        assert result["stopped"] is None
        assert result["stopped at the start"] is None


def test_kl_divergence_is_exact_and_tolerates_rounding():
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(50, 4000, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert kl_divergence(p.float(), q.float()) == pytest.approx(exact.float(), rel=1e-4)
    assert kl_divergence(p.half(), q.float()) == pytest.approx(exact.float(), rel=2e-3)
    itself = kl_divergence(p.half(), p.float())
    assert itself.min() > -1e-6 and itself.max() < 1e-5


# --- Two model directories, from the command line ---------------------------------------------------------------------


def evaluate(world_size: int, folder: Path, base: str, tuned: str, *options: object) -> dict:
    out = folder / f"{base}-{tuned}-{world_size}.json"
    script = (ROOT / "scripts" / "measure.py", "forgetting")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = (folder / base, folder / tuned, "--texts", folder / "texts.jsonl", "--dtype", "fp32", "--json", out)
    done = run_ranks(world_size, *script, *arguments, *options)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("questions answered correctly") == 1  # only rank 0 prints
    # Every bar ends at 100%, whatever share of the documents rank 0 has.
    assert set(re.findall(r"([\w ]+)(?: \(rank 0 of \d\))?: 100% after", done.stderr)) == set(PHASES)
    return json.loads(out.read_text())


def test_two_models_with_different_vocabularies_equal_the_definition(folder):
    """The base and a tuned model with more tokens: perplexity uses each model's own tokens, KL those of the base."""
    found = {ranks: evaluate(ranks, folder, "base", "extended-tuned", "--sharding", "full") for ranks in (1, 2)}
    shared = len(tiny_tokenizer())
    expected = definition(folder / "base", folder / "extended-tuned", folder / "base", shared)
    before = definition(folder / "base", folder / "base", folder / "base", shared)
    for result in found.values():
        assert result["shared_tokens"] == shared
        assert result["compared_targets"] == result["targets"] == sum(len(tiny_tokenizer().encode(t)) for t in TEXTS)
        assert result["kl"]["value"] == pytest.approx(expected["kl"], abs=1e-5)
        assert result["agreement"]["value"] == pytest.approx(expected["agreement"], abs=1e-5)
        for name, metrics in (("base", before), ("tuned", expected)):
            assert result["perplexity_per_byte"][name]["value"] == pytest.approx(
                metrics["perplexity_per_byte"], abs=1e-4
            )
            assert result["questions"]["all"][name]["value"] == pytest.approx(metrics["questions"], abs=1e-5)
        change = result["perplexity_per_byte"]["change"]
        assert change["low"] < change["value"] < change["high"]
    assert found[1]["kl"] == {name: pytest.approx(value, abs=1e-6) for name, value in found[2]["kl"].items()}
    assert (found[1]["processes"], found[2]["processes"]) == (1, 2)
    assert (found[1]["sharding"], found[2]["sharding"]) == ("none", "full")


def test_tokens_are_matched_by_their_string(folder, tmp_path):
    """The same model with permuted token ids forgot nothing. A text is compared up to its first missing token."""

    def load(path: Path) -> ModelAndTokenizer:
        model = load_for_evaluation(read_model_config(str(path)), str(path), torch.float32, torch.device("cpu"))
        return ModelAndTokenizer(model, load_tokenizer(str(path)))

    class NoSignal:
        class ranks:  # noqa: N801  as in StopSignal
            rank, world_size, device, flags = 0, 1, torch.device("cpu"), None

        @staticmethod
        def agreed() -> bool:
            return False

    base, other = load(folder / "base"), load(folder / "base")
    missing = tiny_tokenizer().encode(" own", add_special_tokens=False)[-1]
    order = torch.randperm(len(base.tokenizer), generator=torch.Generator().manual_seed(0)).tolist()
    vocabulary = base.tokenizer.get_vocab()

    class PermutedTokenizer:
        """The tokenizer with id `order[i]` for token i, and without the token `missing`."""

        def get_vocab(self) -> dict[str, int]:
            return {token: order[i] for token, i in vocabulary.items() if i != missing}

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [order[i] for i in base.tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    with torch.no_grad():
        rows = other.model.causal_lm.get_input_embeddings().weight
        rows[torch.tensor(order)] = rows[: len(order)].clone()
    other = ModelAndTokenizer(other.model, PermutedTokenizer())
    assert len(shared_ids(base, other)[0]) == len(order) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.all_reduce", lambda *arguments, **options: None)
        kl, agreements, compared, num_shared = compare_distributions(base, other, TEXTS, NoSignal)
    assert num_shared == len(order) - 1
    tokens = [base.tokenizer.encode(text) for text in TEXTS]
    assert compared.tolist() == [ids.index(missing) + 1 if missing in ids else len(ids) for ids in tokens]
    assert sum(map(len, tokens)) > compared.sum() > 0
    assert agreements.tolist() == compared.tolist()
    assert abs(kl).max() < 1e-4
