"""EWC in one process: the Fisher estimators against per-document loops, the penalty against autograd, files and rounding.

The model has a vocabulary of 16, so that the expectation over labels can be computed exactly. The corpus has 4,096
documents, 64 copies of 64 different ones; every copy has its own document number and therefore its own sign and samples.
"""

import functools
import json
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from common.random_bits import hash64_tensor
from configs.config import EWC, Batch, Config, Data, Model, Optimizer, Run
from configs.loading.config_file import override
from data.batches import collate, micro_batches
from data.examples import Documents
from data.sources import Windows
from distributed.process_group import Ranks
from model.architectures import read_model_config
from model.ewc.anchor import Anchor, load_anchor, save_anchor, scaled_to_dtype
from model.ewc.batches import fisher_batches
from model.ewc.fisher import estimate_fisher
from model.ewc.penalty import group_of, make_penalty
from model.ewc.start import start_penalty
from model.label_sampling import make_draw, sample_labels
from model.language_model import PackedLanguageModel, build_on_meta, load_weights, parameter_names
from model.loss import HeadSettings, cross_entropy_sum
from model.vocabulary.rows import first_new_row

VOCABULARY, DIFFERENT = 16, 64


def signal_is(agreed: bool, ranks: Ranks):
    return types.SimpleNamespace(agreed=lambda: agreed, ranks=ranks)


def batches_of(source, documents: int, batch: int, seed: int = 0, capacity: int = 256, micro_batch: int = 1):
    settings = EWC(documents=documents, batch=batch, seed=seed)
    return fisher_batches(source, settings, capacity, micro_batch, micro_batches, collate)


@pytest.fixture(scope="module")
def ranks():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder, vocabulary: int = VOCABULARY, tied: bool = True):
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.08,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def load(path) -> PackedLanguageModel:
    model = build_on_meta(read_model_config(str(path)))
    load_weights(model, str(path), torch.device("cpu"))
    return model


def corpus(copies: int) -> Documents:
    """DIFFERENT documents of 24 to 40 tokens, most of them targets, each repeated `copies` times.

    Token frequencies differ, so that the mean gradient of data labels is not zero. A group of documents has many targets,
    so that its gradient is nearly normal: a sum of few scores has heavier tails, and the error of its square is larger.
    """
    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(1, VOCABULARY + 1) ** 0.6
    ids = [rng.choice(VOCABULARY, rng.integers(24, 41), p=frequency / frequency.sum()) for _ in range(DIFFERENT)]
    is_target = [rng.random(len(tokens)) < 0.9 for tokens in ids]
    for flags in is_target:
        flags[0], flags[-1] = False, True
    ids, is_target = ids * copies, is_target * copies
    targets = np.array([flags.sum() for flags in is_target])
    return Documents(ids, is_target, np.array([len(tokens) for tokens in ids]), targets, "fingerprint", "")


@pytest.fixture(scope="module")
def exact(path) -> dict[str, dict[str, torch.Tensor]]:
    """Both Fisher diagonals in fp64, from transformers' eager model and one backward per document (and possible label)."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    parameters = dict(model.named_parameters())
    found = {kind: {n: torch.zeros_like(p) for n, p in parameters.items()} for kind in ("model", "empirical")}
    documents = corpus(1)
    for ids, flags in zip(documents.ids, documents.is_target, strict=True):
        where = torch.from_numpy(np.flatnonzero(flags))
        log_p = model(torch.from_numpy(ids)[None]).logits[0, where - 1].log_softmax(-1)
        loss = log_p[torch.arange(len(where)), torch.from_numpy(ids)[where]].sum()
        gradients = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            found["empirical"][name] += gradient.square()
        each = torch.eye(log_p.numel(), dtype=torch.float64).view(-1, *log_p.shape)
        gradients = torch.autograd.grad(log_p, parameters.values(), each, is_grads_batched=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            found["model"][name] += torch.einsum("i,i...->...", log_p.detach().exp().flatten(), gradient.square())
    return {k: {n: f / documents.targets.sum() for n, f in v.items()} for k, v in found.items()}


def error(estimate: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Relative L2 error over all parameters together."""
    assert estimate.keys() == exact.keys()
    squared = sum(float((estimate[n].double() - exact[n]).square().sum()) for n in exact)
    return (squared / sum(float(f.square().sum()) for f in exact.values())) ** 0.5


def estimate(
    path, ranks, estimator: str, copies: int, batch: int = 4, seed: int = 0, packing: bool = True, change=None
):
    batches = batches_of(corpus(copies), 10**6, batch, seed, capacity=256 if packing else 0)
    assert batches.num_documents == copies * DIFFERENT
    batches = change(batches) if change else batches
    return estimate_fisher(load(path), batches, estimator, seed, "full", signal_is(False, ranks))


@pytest.fixture(scope="module")
def largest(path, ranks) -> dict[str, dict[str, torch.Tensor]]:
    """Each estimator with 4,096 documents in groups of 4."""
    return {estimator: estimate(path, ranks, estimator, 64, seed=1) for estimator in ("model", "empirical")}


@pytest.mark.parametrize("estimator, other", [("model", "empirical"), ("empirical", "model")])
def test_each_estimator_converges_to_its_own_diagonal(exact, largest, estimator, other) -> None:
    assert error(largest[estimator], exact[estimator]) < 0.05
    assert error(largest[estimator], exact[other]) > 0.2  # and not to the other one


@pytest.mark.parametrize("estimator", ["model", "empirical"])
def test_the_error_falls_with_the_number_of_groups(path, ranks, exact, largest, estimator) -> None:
    """sqrt(2 x batch / documents): 18% for 256 documents in groups of 4, 35% in groups of 16, 4.4% for 4,096 documents."""
    mean = functools.partial(sum, start=0.0)
    for copies, batch in ((4, 4), (4, 16)):
        errors = [error(estimate(path, ranks, estimator, copies, batch, seed), exact[estimator]) for seed in range(4)]
        expected = (2 * batch / (copies * DIFFERENT)) ** 0.5
        assert 0.5 * expected < mean(errors) / 4 < 1.3 * expected, (copies, batch, errors)
    assert 0.4 * 0.044 < error(largest[estimator], exact[estimator]) < 1.3 * 0.044


def test_groups_of_one_document_are_exact(path, ranks, exact) -> None:
    """The sign does not change the square, so the empirical estimator equals the loop over documents."""
    assert error(estimate(path, ranks, "empirical", 1, batch=1), exact["empirical"]) < 1e-5


@pytest.mark.parametrize("estimator", ["model", "empirical"])
def test_packing_changes_nothing(path, ranks, estimator) -> None:
    packed, alone = (estimate(path, ranks, estimator, 2, packing=packing) for packing in (True, False))
    assert error(alone, {n: f.double() for n, f in packed.items()}) < 1e-6


class OneNumberPerRow:
    """Wrong batches: all documents of a micro-batch have the same number, so a packed row has a single sign."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __getattr__(self, name: str):
        return getattr(self.batches, name)

    def micro_batches(self, *arguments) -> list:
        dealt = self.batches.micro_batches(*arguments)
        return [(batch, numbers[:1].expand(len(numbers))) for batch, numbers in dealt]


def test_one_sign_per_packed_row_would_be_noticed(path, ranks, exact) -> None:
    wrong = estimate(path, ranks, "empirical", 16, change=OneNumberPerRow)
    trace = sum(float(f.sum()) for f in wrong.values()) / sum(float(f.sum()) for f in exact["empirical"].values())
    assert trace > 1.2 and error(wrong, exact["empirical"]) > 0.2


def test_labels_are_sampled_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -9.0]])
    keys = hash64_tensor(3, torch.arange(100_000))
    counts = torch.bincount(sample_labels(logits.expand(len(keys), -1), keys), minlength=5)
    expected = logits.softmax(-1)[0] * len(keys)
    assert ((counts - expected).abs() < 4 * expected.sqrt() + 1).all(), (counts, expected)
    # Labels at other positions, of other documents or with other seeds are independent.
    draws = [
        sample_labels(torch.zeros(2000, 64), hash64_tensor(seed, torch.full((2000,), d), torch.arange(p, p + 2000)))
        for seed, d, p in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 2000))
    ]
    for i in range(4):
        for j in range(i):
            assert (draws[i] == draws[j]).float().mean() < 0.04  # 1/64 by chance


def test_loss_with_a_weight_per_target(monkeypatch) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ids, weights = torch.randint(0, 11, (7,)), torch.tensor([1.0, -1, 1, 1, -1, -1, 1])
    loss = cross_entropy_sum(hidden, head, ids, HeadSettings(scale=0.5, softcap=2.0), chunk_tokens=3, weights=weights)
    capped = 2.0 * torch.tanh(hidden @ head.T * 0.5 / 2.0)
    expected = (torch.nn.functional.cross_entropy(capped, ids, reduction="none") * weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (loss, expected)), strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def model_away_from_anchor(path, dtype: torch.dtype = torch.float32) -> tuple[PackedLanguageModel, Anchor]:
    """A model that differs from its reference and has gradients, and an anchor with a wide range of Fisher values."""
    model = load(path).to(dtype)
    parameters, generator = parameter_names(model), torch.Generator().manual_seed(1)
    reference = {n: p.detach().clone() for n, p in parameters.items()}
    fisher = {n: torch.exp(3 * torch.randn(p.shape, generator=generator)) for n, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p += (0.05 * torch.randn(p.shape, generator=generator)).to(dtype)
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return model, Anchor(fisher, dict.fromkeys(fisher, 0), reference, {})


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-6), ("bf16", 2**-8)])
def test_gradient_is_that_of_the_penalty(path, ranks, dtype, tolerance) -> None:
    """With bf16 only the Fisher diagonal is rounded; a reference that bf16 cannot represent exactly stays fp32."""
    model, anchor = model_away_from_anchor(path)
    parameters = parameter_names(model)
    before = {n: p.grad.clone() for n, p in parameters.items()}
    fisher = {n: f.clone() for n, f in anchor.fisher.items()}
    expected = sum((30.0 / 2 * fisher[n] * (p - anchor.reference[n]) ** 2).sum() for n, p in parameters.items())
    penalty_gradient = dict(zip(parameters, torch.autograd.grad(expected, parameters.values()), strict=True))

    kept = scaled_to_dtype(anchor, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], ranks)
    assert all(0.5 <= float(f.float().max()) <= 1 for f in kept.fisher.values())
    assert {f.dtype for f in kept.fisher.values()} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    penalty = make_penalty(30.0, parameters, kept)
    penalty.add_gradient(0)
    for name, parameter in parameters.items():
        wrong = (parameter.grad - before[name] - penalty_gradient[name]).abs()
        assert (
            wrong
            <= tolerance * penalty_gradient[name].abs() + 1e-6 * (before[name].abs() + penalty_gradient[name].abs())
        ).all(), name

    row = penalty.curves(seconds_per_step=1.0)
    close = functools.partial(pytest.approx, rel=max(1e-5, tolerance / 4))
    assert row["ewc/penalty"] == close(expected.item())
    assert row["ewc/grad_norm"] == close(sum(float(g.square().sum()) for g in penalty_gradient.values()) ** 0.5)
    drift = {n: (p - anchor.reference[n]).detach() for n, p in parameters.items()}
    assert row["ewc/drift"] == close(sum(float(d.square().sum()) for d in drift.values()) ** 0.5)
    of_layer = [n for n in parameters if n.startswith("model.layers.1.")]
    assert row["ewc/drift/layers.01"] == close(sum(float(drift[n].square().sum()) for n in of_layer) ** 0.5)
    assert row["ewc/grad_norm/layers.01"] == close(
        sum(float(penalty_gradient[n].square().sum()) for n in of_layer) ** 0.5
    )
    groups = ("embed_tokens", "layers.00", "layers.01", "norm")  # the head is tied, so it is not a group
    assert {key for key in row if key.count("/") == 2} == {
        f"ewc/{what}/{group}" for what in ("penalty", "grad_norm", "drift") for group in groups
    }
    assert sum(row[f"ewc/penalty/{group}"] for group in groups) == close(expected.item())
    assert 0 < row["ewc/time"] < 1
    # Bytes per parameter. The norms of the reference are ones, which bf16 represents exactly.
    sizes = {n: 8 if dtype == "fp32" else 4 if "norm" in n else 6 for n in parameters}
    assert penalty.num_bytes() == sum(p.numel() * sizes[n] for n, p in parameters.items())


def test_small_penalty_gradient_is_not_lost_in_a_bf16_gradient(path, ranks) -> None:
    """A thousandth of the gradient is less than half of its last bit, so rounding to nearest would always lose it."""
    model, anchor = model_away_from_anchor(path, torch.bfloat16)
    parameters = parameter_names(model)
    for name, parameter in parameters.items():
        parameter.data.copy_(anchor.reference[name].float() + 0.5)
        anchor.fisher[name] = 0.5 / (parameter.float() - anchor.reference[name].float())
    anchor = scaled_to_dtype(anchor, torch.bfloat16, ranks)
    penalty, total, steps = make_penalty(2.0**-9, parameters, anchor), 0.0, 200
    for step in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        penalty.add_gradient(step, measure=False)
        total += sum(float((p.grad.float() - 1).sum()) for p in parameters.values())
    count = sum(p.numel() for p in parameters.values())
    assert total / steps / count == pytest.approx(2.0**-10, rel=0.02)
    first = {n: p.grad.clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    penalty.add_gradient(steps - 1)
    assert all(torch.equal(p.grad, first[n]) for n, p in parameters.items())  # rounding is a function of the step


def test_small_squares_do_not_underflow_in_bf16(path, ranks) -> None:
    model, anchor = model_away_from_anchor(path)
    parameters = parameter_names(model)
    fisher = {n: torch.full_like(p, 3e-37).detach() for n, p in parameters.items()}
    fisher = {n: f * torch.linspace(1e-2, 1, f.numel()).view_as(f) for n, f in fisher.items()}
    kept = scaled_to_dtype(
        Anchor({n: f.clone() for n, f in fisher.items()}, anchor.exponents, anchor.reference, {}), torch.bfloat16, ranks
    )
    for name in parameters:
        back = kept.fisher[name].double() * 2.0 ** kept.exponents[name]
        assert ((back / fisher[name].double() - 1).abs() < 2**-8).all()
    again = scaled_to_dtype(kept, torch.float32, ranks)  # converted to another dtype
    assert all(torch.equal(again.fisher[n], kept.fisher[n].float()) for n in parameters)


def test_reference_is_bf16_if_that_is_exact(path, ranks) -> None:
    _, anchor = model_away_from_anchor(path, torch.bfloat16)
    anchor = Anchor(anchor.fisher, anchor.exponents, {n: r.float() for n, r in anchor.reference.items()}, {})
    kept = scaled_to_dtype(anchor, torch.bfloat16, ranks)
    for name, value in anchor.reference.items():
        assert kept.reference[name].dtype == torch.bfloat16 and torch.equal(kept.reference[name].float(), value)


def settings(**changes) -> EWC:
    return EWC(**({"strength": 10.0, "data": ("old.jsonl",), "documents": 64, "estimator": "empirical"} | changes))


def start(path, folder, ranks, settings: EWC, signal: bool = False, first_new_row: int | None = None):
    batches = None
    if not settings.fisher:
        batches = batches_of(corpus(1), settings.documents, settings.batch, settings.seed)
    messages, stop = [], signal_is(signal, ranks)
    penalty = start_penalty(load(path), settings, folder, batches, "full", stop, messages.append, first_new_row)
    return penalty, messages


def test_penalty_is_estimated_and_saved_and_reused(path, tmp_path, ranks) -> None:
    first, messages = start(path, tmp_path / "ewc", ranks, settings())
    assert (
        "estimating" in messages[0]
        and "36%" not in messages[0]
        and "35%" in messages[0]
        and "bytes per parameter" in messages[-1]
    )
    files = load_file(tmp_path / "ewc" / "fisher-00001.safetensors")
    assert "lm_head.weight" not in files and files.keys() == parameter_names(load(path)).keys()
    second, messages = start(path, tmp_path / "ewc", ranks, settings(strength=20.0))
    assert "read from" in messages[0]
    for name, fisher in first.anchor.fisher.items():
        assert torch.equal(fisher, second.anchor.fisher[name])
        assert torch.equal(first.anchor.reference[name], second.anchor.reference[name])
    assert first.anchor.exponents == second.anchor.exponents and first.anchor.made == second.anchor.made
    for change, words in {"estimator": "model", "documents": 32, "batch": 8, "seed": 1, "dtype": "bf16"}.items():
        with pytest.raises(UserError, match=rf"was made with ewc.{change}=.*, now it is {words}; set it back"):
            start(path, tmp_path / "ewc", ranks, settings(**{change: words}))
    with pytest.raises(UserError, match="has the weights of another model than model.path"):
        other = write_model(tmp_path / "other")
        state = load_file(other / "model.safetensors")
        from safetensors.torch import save_file

        save_file({n: t * 1.5 for n, t in state.items()}, other / "model.safetensors", metadata={"format": "pt"})
        start(other, tmp_path / "ewc", ranks, settings())


def test_signal_stops_the_estimation_and_leaves_nothing(path, tmp_path, ranks) -> None:
    penalty, _ = start(path, tmp_path / "ewc", ranks, settings(), signal=True)
    assert penalty is None and not (tmp_path / "ewc").exists()


def test_new_rows_have_no_fisher(tmp_path, ranks) -> None:
    """Also if the saved anchor has no such rows; the anchor may be split into several files."""
    small, large = write_model(tmp_path / "small", tied=False), write_model(tmp_path / "large", 40, tied=False)
    (large / "new_tokens.json").write_text(json.dumps({"first_id": VOCABULARY}))
    assert first_new_row(small) is None
    penalty, _ = start(
        large, tmp_path / "run" / "ewc", ranks, settings(estimator="model"), first_new_row=first_new_row(large)
    )
    for name, fisher in penalty.anchor.fisher.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert (fisher[VOCABULARY:] == 0).all() and (fisher[:VOCABULARY] != 0).any()
        else:
            assert (fisher != 0).any()

    old, _ = start(small, tmp_path / "old" / "ewc", ranks, settings())
    save_anchor(tmp_path / "split", old.anchor, old.parameters, ranks, max_file_bytes=2**12)
    assert len(list((tmp_path / "split").glob("fisher-*.safetensors"))) > 2
    reused, messages = start(large, tmp_path / "new" / "ewc", ranks, settings(data=(), fisher=str(tmp_path / "split")))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(reused.anchor.fisher[name][:VOCABULARY], old.anchor.fisher[name])
        assert torch.equal(reused.anchor.reference[name][:VOCABULARY], old.anchor.reference[name])
        assert (reused.anchor.fisher[name][VOCABULARY:] == 0).all()
        now = reused.parameters[name][VOCABULARY:]
        assert torch.equal(reused.anchor.reference[name][VOCABULARY:], now) and len(now) == 40 - VOCABULARY
    # The run has its own copy and uses it although the other one is gone.
    (tmp_path / "split" / "settings.json").unlink()
    again, messages = start(large, tmp_path / "new" / "ewc", ranks, settings(data=(), fisher=str(tmp_path / "split")))
    assert "read from" in messages[0] and torch.equal(
        again.anchor.fisher["lm_head.weight"], reused.anchor.fisher["lm_head.weight"]
    )
    with pytest.raises(UserError, match="settings.json"):
        start(large, tmp_path / "third" / "ewc", ranks, settings(data=(), fisher=str(tmp_path / "split")))
    with pytest.raises(UserError, match="belongs to another model"):
        load_anchor(tmp_path / "run" / "ewc", parameter_names(load(small)), set())


def test_group_names() -> None:
    assert group_of("model.layers.11.self_attn.q_proj.weight") == "layers.11"
    assert group_of("model.layers.3.mlp.down_proj.bias") == "layers.03"
    assert group_of("model.embed_tokens.weight") == "embed_tokens"
    assert group_of("lm_head.weight") == "lm_head"


class Store:
    """The part of a token store that a source needs: a window with two documents and a window with one."""

    lengths = ((5, 4), (9,))

    def __len__(self) -> int:
        return 2

    def document_lengths(self, index: int) -> tuple[int, ...]:
        return self.lengths[index]

    def window(self, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        return np.arange(9) % VOCABULARY, self.lengths[index]


def test_documents_of_a_window_have_independent_signs() -> None:
    batches = batches_of(Windows(Store(), "", "", 7.5), 10, 4, capacity=18, micro_batch=2)
    assert (batches.num_documents, batches.num_groups, batches.num_targets) == (2, 1, 15)
    ((batch, numbers),) = batches.micro_batches(0, 0, 1)
    assert len(set(numbers.tolist())) == 3 and sorted(n >> 20 for n in numbers.tolist()) == [0, 0, 1]
    for seed in range(20):
        signs = make_draw("empirical", batch, numbers, seed).signs
        of_documents = signs.split([n - 1 for n in batch.document_lengths])
        assert all(len(set(part.tolist())) == 1 for part in of_documents)
        if len({part[0].item() for part in of_documents}) == 2:
            return
    raise AssertionError("all documents had the same sign for every seed")


def test_ranks_share_the_documents_of_a_group() -> None:
    """Even if they are so short that they would fit into one row and thus on one rank."""
    batches = batches_of(corpus(1), 6, 6)
    dealt = [batches.micro_batches(0, rank, 4) for rank in range(4)]
    assert [len(each) for each in dealt] == [1, 1, 1, 1]
    assert sorted(len(numbers) for ((_, numbers),) in dealt) == [1, 1, 2, 2]
    numbers = sorted(n for each in dealt for _, part in each for n in part.tolist())
    assert numbers == sorted(batches.micro_batches(0, 0, 1)[0][1].tolist()) and len(numbers) == 6


def test_config_errors() -> None:
    config = Config(Model("m"), Data(("t",)), Batch(1), Optimizer(1e-3), Run("r"))
    assert override(config, ["ewc.strength=10", "ewc.data=a.jsonl,b.txt"]).ewc.data == ("a.jsonl", "b.txt")
    for wrong in (["ewc.strength=1"], ["ewc.strength=1", "ewc.data=a", "ewc.fisher=b"]):
        with pytest.raises(UserError, match="ewc.strength above 0 needs either ewc.data"):
            override(config, wrong)
    with pytest.raises(UserError, match="ewc.strength must be 0 or more"):
        override(config, ["ewc.strength=-1"])
    with pytest.raises(UserError, match="ewc.estimator must be one of model, empirical"):
        override(config, ["ewc.estimator=true"])
