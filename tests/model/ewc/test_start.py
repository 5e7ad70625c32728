"""The start of EWC: estimating, saving and reading the Fisher diagonal, new tokens, rounding in bf16, errors in the config."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from configs.config import EWC, Batch, Config, Data, Model, Optimizer, Run
from configs.load import override
from model import ewc
from model.architectures import first_new_row
from model.ewc import Anchor, Penalty, in_dtype, load_anchor, save_anchor, start_penalty
from model.language_model import parameter_names
from tests.model.ewc.tiny_ewc import VOCABULARY, corpus, dealer, signal_is, write_model
from tests.model.test_equivalence import load


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def settings(**changes) -> EWC:
    return EWC(**({"strength": 10.0, "data": ("old.jsonl",), "documents": 64} | changes))


def start(path, folder, ranks, settings: EWC, first_new_row: int | None = None):
    old_domain = None if settings.fisher else corpus(1)
    messages, stop = [], signal_is(False, ranks)
    penalty = start_penalty(
        load(path), settings, folder, old_domain, dealer(), "full", stop, messages.append, first_new_row
    )
    return penalty, messages


def test_penalty_is_estimated_and_saved_and_reused(path, tmp_path, ranks) -> None:
    first, messages = start(path, tmp_path / "ewc", ranks, settings())
    assert "estimating" in messages[0] and "35%" in messages[0] and "bytes per parameter" in messages[-1]
    files = load_file(tmp_path / "ewc" / "fisher-00001.safetensors")
    assert "lm_head.weight" not in files and files.keys() == parameter_names(load(path)).keys()
    second, messages = start(path, tmp_path / "ewc", ranks, settings(strength=20.0))
    assert "read from" in messages[0]
    for name, fisher in first.anchor.fisher.items():
        assert torch.equal(fisher, second.anchor.fisher[name])
        assert torch.equal(first.anchor.reference[name], second.anchor.reference[name])
    assert first.anchor.settings == second.anchor.settings
    for change, words in {"estimator": "l2", "documents": 32, "batch": 8, "seed": 1, "dtype": "bf16"}.items():
        with pytest.raises(UserError, match=rf"was made with ewc.{change}=.*, now it is {words}; set it back"):
            start(path, tmp_path / "ewc", ranks, settings(**{change: words}))
    with pytest.raises(UserError, match="has the weights of another model than model.path"):
        other_model = write_model(tmp_path / "other")
        state = load_file(other_model / "model.safetensors")
        save_file({n: t * 1.5 for n, t in state.items()}, other_model / "model.safetensors", metadata={"format": "pt"})
        start(other_model, tmp_path / "ewc", ranks, settings())


def test_write_errors_and_damage_are_one_sentence(path, tmp_path, ranks) -> None:
    """All ranks must raise the error. A rank that did not would wait for the others."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        start(path, tmp_path / "file" / "ewc", ranks, settings())
    start(path, tmp_path / "ewc", ranks, settings())
    fisher = tmp_path / "ewc" / "fisher-00001.safetensors"
    fisher.write_bytes(fisher.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{fisher} is damaged \(.*name another ewc.fisher"):
        start(path, tmp_path / "new", ranks, settings(fisher=str(tmp_path / "ewc")))


def test_l2_pulls_every_weight_alike(path, tmp_path, ranks) -> None:
    options = settings(estimator="l2", data=()), tmp_path / "ewc", None, dealer(), "full", signal_is(False, ranks)
    model = load(path)
    penalty = start_penalty(model, *options)
    drift = {name: torch.randn_like(parameter) for name, parameter in penalty.parameters.items()}
    for name, parameter in penalty.parameters.items():
        parameter.data += drift[name]
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_gradient(0)
    for name, parameter in penalty.parameters.items():
        torch.testing.assert_close(parameter.grad, 10.0 * drift[name], rtol=1e-5, atol=1e-5)
    squares = sum(tensor.square().sum().item() for tensor in drift.values())
    assert penalty.curves()["ewc/penalty"] == pytest.approx(5.0 * squares, rel=1e-5)
    again = start_penalty(load(path), *options)
    assert all(torch.equal(tensor, again.anchor.fisher[name]) for name, tensor in penalty.anchor.fisher.items())
    with pytest.raises(UserError, match=r"ewc.documents=None, now it is 64"):
        start(path, tmp_path / "ewc", ranks, settings())


def test_frozen_parameters_have_no_penalty(path, tmp_path, ranks) -> None:
    model = load(path)
    frozen = [name for name in parameter_names(model) if name.startswith("model.layers.0.")]
    for name in frozen:
        parameter_names(model)[name].requires_grad_(False)
    options = settings(documents=8), tmp_path / "ewc", corpus(1), dealer(), "full", signal_is(False, ranks)
    penalty = start_penalty(model, *options)
    assert penalty.anchor.fisher.keys() == penalty.parameters.keys() == parameter_names(model).keys() - set(frozen)
    assert start_penalty(model, *options).anchor.settings == penalty.anchor.settings  # read from the disk


def test_new_rows_have_no_fisher(tmp_path, ranks) -> None:
    """Also if the saved anchor has no such rows. The anchor may be split into several files."""
    small, large = write_model(tmp_path / "small", tied=False), write_model(tmp_path / "large", 40, tied=False)
    (large / "new_tokens.json").write_text(json.dumps({"first_id": VOCABULARY}))
    assert first_new_row(small) is None
    penalty, _ = start(large, tmp_path / "run" / "ewc", ranks, settings(), first_new_row=first_new_row(large))
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
    # If a base has more rows than tokens, new tokens replace unused rows, for which the old anchor has values.
    first, options = VOCABULARY - 4, settings(data=(), fisher=str(tmp_path / "split"))
    padded, _ = start(large, tmp_path / "padded" / "ewc", ranks, options, first_new_row=first)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        fisher, reference = padded.anchor.fisher[name], padded.anchor.reference[name]
        assert torch.equal(fisher[:first], old.anchor.fisher[name][:first]) and not fisher[first:].any()
        assert torch.equal(reference[first:], padded.parameters[name][first:])
    assert old.anchor.fisher["lm_head.weight"][first:].any()
    # The run has its own copy and uses it after the original is gone.
    (tmp_path / "split" / "settings.json").unlink()
    again, messages = start(large, tmp_path / "new" / "ewc", ranks, settings(data=(), fisher=str(tmp_path / "split")))
    assert "read from" in messages[0] and torch.equal(
        again.anchor.fisher["lm_head.weight"], reused.anchor.fisher["lm_head.weight"]
    )
    with pytest.raises(UserError, match="settings.json"):
        start(large, tmp_path / "third" / "ewc", ranks, settings(data=(), fisher=str(tmp_path / "split")))
    with pytest.raises(UserError, match="belongs to another model"):
        load_anchor(tmp_path / "run" / "ewc", parameter_names(load(small)), set())


def test_new_rows_are_counted_in_whole_embedding(tmp_path, ranks, monkeypatch) -> None:
    """The part of this rank begins with row 5."""
    monkeypatch.setattr(ewc, "local_shard", lambda parameter: (parameter.detach(), 0, 5))
    model, of_l2 = load(write_model(tmp_path / "large", 40)), settings(estimator="l2", data=())
    options = of_l2, tmp_path / "ewc", None, dealer(), "full", signal_is(False, ranks), print, VOCABULARY
    fisher = start_penalty(model, *options).anchor.fisher["model.embed_tokens.weight"]
    assert (fisher[: VOCABULARY - 5] == 1).all() and (fisher[VOCABULARY - 5 :] == 0).all()


def test_small_penalty_survives_bf16_gradients(path, ranks) -> None:
    """A thousandth of the gradient is less than half of its last bit, so rounding to nearest would always lose it."""
    parameters = parameter_names(load(path).to(torch.bfloat16))
    reference = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data.add_(0.5)
    fisher = {name: 0.5 / (parameter.float() - reference[name].float()) for name, parameter in parameters.items()}
    anchor = in_dtype(Anchor(fisher, reference, {}), torch.bfloat16, ranks)
    penalty, total, steps = Penalty(2.0**-9, parameters, anchor), 0.0, 50
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


def test_config_errors() -> None:
    config = Config(Model("m"), Data(("t",)), Batch(1), Optimizer(1e-3), Run("r"))
    assert override(config, ["ewc.strength=10", "ewc.data=a.jsonl,b.txt"]).ewc.data == ("a.jsonl", "b.txt")
    assert override(config, ["ewc.strength=10", "ewc.estimator=l2"]).ewc.estimator == "l2"
    for wrong, words in (
        (["ewc.strength=1", "ewc.data=a", "ewc.fisher=b"], "ewc.strength above 0 needs either ewc.data"),
        (["ewc.strength=10", "ewc.estimator=l2", "ewc.data=a"], "neither of them with ewc.estimator=l2"),
        (["ewc.strength=-1"], "ewc.strength must be 0 or more"),
        (["ewc.estimator=empirical"], "ewc.estimator must be one of model, l2"),
    ):
        with pytest.raises(UserError, match=words):
            override(config, wrong)
