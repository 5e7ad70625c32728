"""Forgetting against its definition, the logits of transformers in fp64, text by text; and evaluations on 1 and 3 ranks, whole and sharded."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.tokens import load_tokenizer
from eval.compare_models import ModelAndTokenizer, compare_distributions, shared_ids
from eval.generate import greedy_answers
from eval.questions import encode_options, read_questions, right_answers, start_tokens
from model.architectures import read_model_config
from model.language_model import load_for_evaluation
from tests.processes import run_ranks
from tests.tiny import SENTENCES, tiny_tokenizer, write_tiny_model

NEW_TOKENS = 5
METRICS = ("perplexity_per_byte", "kl", "agreement", "questions")
PHASES = ("KL and agreement", "perplexity of base", "perplexity of tuned", "questions to base", "questions to tuned")
CASES = ("base full", "base none", "untied full offload", "extended full")
MODELS = ("base", "untied")
# Six documents of very different lengths.
TEXTS = [*SENTENCES, "The bank", "Own funds of\n\nthe bank – 8% é."]


def tune(source: Path, seed: int) -> None:
    """Write the same model with noise added to all weights, as if it had been trained, beside it."""
    target = shutil.copytree(source, source.with_name(f"{source.name}-tuned"))
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
    edit_config(target, vocab_size=first + NEW_TOKENS)
    tokenizer = load_tokenizer(str(source))
    tokenizer.add_tokens([" own funds", " total risk", " of the bank", "zz1", "zz2"])
    tokenizer.save_pretrained(target)
    (target / "new_tokens.json").write_text(json.dumps({"first_id": first}))


def edit_config(path: Path, **changes: object) -> None:
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting")
    write_tiny_model(folder / "base")
    write_tiny_model(folder / "untied", family="qwen2", tied=False, vocab_size=391)
    write_tiny_model(folder / "padded", "qwen3", vocab_size=391)
    edit_config(folder / "padded", make_vocab_size_divisible_by=64)
    extend(folder / "base", folder / "extended")
    for i, name in enumerate(("base", "untied", "extended", "padded")):
        tune(folder / name, i)
    shutil.copytree(folder / "base", folder / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in MODELS:  # the third token after one prompt ends answers, so that they have different lengths
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        (folder / f"{name}.stops").write_text(str(greedy_answers(model, [[0, 1, 2]], set(), 3)[0][-1]))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[int, list[dict]]:
    """World size -> the results of each rank."""
    found = {}
    for world in (1, 3):
        done = run_ranks(world, Path(__file__).with_name("ranks_worker.py"), folder)
        assert done.returncode == 0, done.stderr[-6000:]
        found[world] = [json.loads((folder / f"{world}.{rank}.json").read_text()) for rank in range(world)]
    return found


LOADED: dict[Path, torch.nn.Module] = {}


def log_p(path: Path, ids: list[int], start: int, num_tokens: int | None = None) -> torch.Tensor:
    """Log-probabilities of what follows the first `start` tokens, fp64 `(targets, num_tokens)`.

    They are over the first `num_tokens` tokens of the vocabulary. Default: over all.
    """
    if path not in LOADED:
        LOADED[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = LOADED[path](torch.tensor([ids])).logits[0, start - 1 : -1]
    return logits[:, :num_tokens].double().log_softmax(-1)


def nats(path: Path, ids: list[int], start: int) -> float:
    return -log_p(path, ids, start).gather(1, torch.tensor(ids[start:])[:, None]).sum().item()


def definition(base: Path, tuned: Path, shared: int, every: int = 1) -> dict[str, float]:
    """All four metrics, text by text. KL and agreement use the tokens of the base, the rest those of `tuned`."""
    tokenizer, tuned_tokenizer = load_tokenizer(str(base)), load_tokenizer(str(tuned))
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
    per_byte = math.exp(loss / sum(len(text.encode()) for text in TEXTS))
    return dict(zip(METRICS, (per_byte, kl / tokens, agreements / tokens, sum(right) / len(right)), strict=True))


def test_forgetting_in_training_equals_its_definition(folder, results):
    for case in CASES:
        name = case.split()[0]
        # With an extended vocabulary only the old tokens are compared, otherwise all tokens of the tokenizer.
        shared = len(tiny_tokenizer(391 if name == "untied" else 384))
        expected = definition(folder / name, folder / f"{name}-tuned", shared, every=16)
        assert expected["kl"] > 0.01 and 0.1 < expected["agreement"] < 1
        if name == "extended":  # over all rows the KL is different
            every_row = definition(folder / name, folder / f"{name}-tuned", shared + NEW_TOKENS, every=16)
            assert abs(every_row["kl"] - expected["kl"]) > 1e-3
        expected = {f"forgetting/{metric}": pytest.approx(value, abs=1e-5) for metric, value in expected.items()}
        for of_world in results.values():
            found = [rank["training"][case] for rank in of_world]
            assert all(one["tuned"] == found[0]["tuned"] for one in found)  # to the bit on all ranks
            assert found[0]["tuned"] == expected, case
            # The base has forgotten nothing.
            assert 0 <= found[0]["unchanged"]["forgetting/kl"] < 1e-6
            assert found[0]["unchanged"]["forgetting/agreement"] == 1.0


def test_base_distributions_are_split_over_ranks(results):
    tokens = sum(len(tiny_tokenizer().encode(text)) for text in TEXTS)
    held = {world: [rank["training"]["base full"]["host_bytes"] for rank in results[world]] for world in results}
    assert held[1] == [tokens * (2 * len(tiny_tokenizer()) + 8)] and sum(held[3]) == held[1][0] and 0 not in held[3]


# --- Two model directories ---------------------------------------------------------------------------------------------


def test_forgetting_of_different_vocabularies_equals_its_definition(folder):
    """The base and a tuned model with more tokens: perplexity uses each model's own tokens, KL those of the base."""
    out, tuned = folder / "forgetting.json", folder / "extended-tuned"
    options = ("--texts", folder / "texts.jsonl", "--dtype", "fp32", "--sharding", "full", "--json", out)
    done = run_ranks(2, "scripts/measure.py", "forgetting", folder / "base", tuned, *options)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("questions answered correctly") == 1  # only rank 0 prints
    # Every bar ends at 100%, whatever share of the documents rank 0 has.
    assert set(re.findall(r"([\w ]+) \(rank 0 of 2\): 100% after", done.stderr)) == set(PHASES)
    result, shared = json.loads(out.read_text()), len(tiny_tokenizer())
    assert (result["processes"], result["sharding"], result["shared_tokens"]) == (2, "full", shared)
    assert result["compared_targets"] == result["targets"] == sum(len(tiny_tokenizer().encode(t)) for t in TEXTS)
    expected, before = definition(folder / "base", tuned, shared), definition(folder / "base", folder / "base", shared)
    for metric in ("kl", "agreement"):
        assert result[metric]["value"] == pytest.approx(expected[metric], abs=1e-5)
    for name, metrics in (("base", before), ("tuned", expected)):
        per_byte = result["perplexity_per_byte"][name]["value"]
        assert per_byte == pytest.approx(metrics["perplexity_per_byte"], abs=1e-4)
        assert result["questions"]["all"][name]["value"] == pytest.approx(metrics["questions"], abs=1e-5)
    change = result["perplexity_per_byte"]["change"]
    assert change["low"] < change["value"] < change["high"]


def test_tokens_are_matched_by_their_string(folder, monkeypatch):
    """The same model with permuted token ids forgot nothing. A text is compared up to its first missing token."""

    def load(path: Path) -> ModelAndTokenizer:
        model = load_for_evaluation(read_model_config(str(path)), str(path), torch.float32, torch.device("cpu"))
        return ModelAndTokenizer(model, load_tokenizer(str(path)))

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
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *arguments, **options: None)
    monkeypatch.setattr("eval.over_ranks.signal_on_any", lambda stop: False)
    one_rank = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), flags=None)
    stop = SimpleNamespace(ranks=one_rank, agreed=lambda: False)
    kl, agreements, compared, num_shared = compare_distributions(base, other, TEXTS, stop)
    assert num_shared == len(order) - 1
    tokens = [base.tokenizer.encode(text) for text in TEXTS]
    assert compared.tolist() == [ids.index(missing) + 1 if missing in ids else len(ids) for ids in tokens]
    assert sum(map(len, tokens)) > compared.sum() > 0
    assert agreements.tolist() == compared.tolist() and abs(kl).max() < 1e-4


# --- A sharded model gives the results of a whole one, and each rank holds its part of the parameters ---------------------


def same(one: object, other: object) -> bool:
    """Equal, with numbers to 1e-5."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == (pytest.approx(other, rel=1e-5, abs=1e-5) if isinstance(other, float) else other)


def check_same(found: dict, reference: dict, count: int | None = None) -> None:
    assert found["answers"] == reference["answers"][:count]
    assert found["losses"] == pytest.approx(reference["losses"][:count], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sharded_answers_and_losses_equal_whole_ones(results, name):
    reference = results[1][0][f"{name} whole"]
    assert len({len(answer) for answer in reference["answers"]}) > 1
    for rank in results[3]:
        for kind in ("whole", "sharded"):
            check_same(rank[f"{name} {kind}"], reference)


def test_ranks_without_examples_take_part(results):
    for rank in results[3]:
        for kind in ("whole", "sharded"):
            check_same(rank[f"few {kind}"], results[1][0]["few whole"])
        check_same(rank["one sharded"], results[1][0]["base whole"], 1)


def test_ranks_end_answers_at_different_times(results):
    """One rank ends 50 tokens before another, and one rank has no prompt."""
    parts = [rank["unequal answers"] for rank in results[3]]
    assert [part["sharded"] for part in parts] == [parts[0]["whole"][:1], parts[0]["whole"][1:], []]
    assert len(parts[0]["whole"][0]) + 50 <= len(parts[0]["whole"][1])


def test_bf16_is_the_same_sharded_and_whole(results):
    for rank in results[3]:
        whole, sharded = rank["base bf16 whole"], rank["base bf16 sharded"]
        check_same(sharded, whole)
        total = sum(other["base bf16 sharded"]["before"][0] for other in results[3])
        assert total == whole["before"][1] == rank["base whole"]["before"][1] // 2


def test_forgetting_is_the_same_sharded_and_whole(results):
    reference = results[1][0]["forgetting whole"]
    assert reference["kl"]["value"] > 0.01
    for rank in results[3]:
        assert same(rank["forgetting whole"], reference) and same(rank["forgetting sharded"], reference)
    one = [rank["forgetting one sharded"] for rank in results[3]]
    assert one == [one[0]] * 3 and one[0]["texts"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_ranks_gather_one_unit_at_a_time(folder, results, name):
    tensors = load_file(folder / name / "model.safetensors")
    units: dict[str, int] = {}  # bytes of the root and of each other unit in fp32
    for key, tensor in tensors.items():
        unit = ".".join(key.split(".")[:3]) if "layers" in key else key
        if key == "model.norm.weight" or (name == "base" and "embed_tokens" in key):
            unit = "root"
        units[unit] = units.get(unit, 0) + tensor.nbytes
    total, root = sum(units.values()), units.pop("root")
    found = [rank[f"{name} sharded"] for rank in results[3]]
    # Each parameter is split by rows; every rank but the last ones has ceil(rows / ranks) of them.
    at_most = sum(-(-len(tensor) // 3) * tensor[0].nbytes for tensor in tensors.values())
    assert sum(one["before"][0] for one in found) == total
    for one in found:
        assert one["after"][1] == root  # the root stays gathered, and nothing else
        assert one["before"][0] <= at_most < 1.02 * total / 3 and one["before"][1] == 0
        assert one["gathered"] == root + max(units.values()) < 0.8 * total
    assert all(rank[f"{name} whole"]["before"] == [0, total] for rank in results[3])


def test_all_ranks_stop_and_fail_together(folder, results):
    for rank in results[3]:
        assert rank["agreed dtype"] == "torch.float32"
        sharded, whole = rank["missing"]  # on one rank
        assert sharded.startswith(f"{folder / 'broken'} has neither model.safetensors nor")
        assert whole.startswith(f"{folder / 'broken'} cannot be loaded")
        assert rank["stopped"] == ["stopped after 5 forwards", "stopped"]  # after a signal on one rank
    assert [rank["training"]["stopped"] for world in results for rank in results[world]] == [[None, None]] * 4
