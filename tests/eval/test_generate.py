"""Generation in batches, against transformers and one forward for each row."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from eval.generate import Sampling, answer_work, greedy_answers, load_for_generation, sampled_answers, shared_prefix
from eval.row_cache import holds_rows
from tests.tiny import write_tiny_model

PROMPTS = [[5, 60, 61], [7] * 20, [9, 80, 81, 82, 83, 84, 85], [11, 90], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]


@pytest.fixture(autouse=True)
def few_spare_columns(monkeypatch):
    """The columns of the cache move to the front every few tokens, not once in 64."""
    monkeypatch.setattr("eval.row_cache.SPARE_COLUMNS", 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    def load(family, layers=2):
        directory = write_tiny_model(tmp_path_factory.mktemp(family), family, layers=layers, seed=3)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    return load


def generate_single(model, prompt, stop_ids, max_new_tokens):
    """Greedy generation by transformers, for a single prompt."""
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(stop_ids), "pad_token_id": 0}
    settings, ids = GenerationConfig(do_sample=False, **ends), torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
    return [token for token in output.tolist() if token not in stop_ids]


@contextmanager
def watched(model):
    """The shapes of the tokens of all forwards."""
    seen = []
    hook = model.register_forward_hook(lambda *given: seen.append(given[2]["input_ids"].shape), with_kwargs=True)
    yield seen
    hook.remove()


# Caches of one kind of layer and of two, a window in all layers and in every other, sinks, experts.
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_a_batch_gives_the_same_answers_as_single_prompts(tiny, family):
    model = tiny(family)
    free = [generate_single(model, prompt, {383}, 30) for prompt in PROMPTS]
    # The stop tokens occur in two of the answers, so that rows leave the batch at different times.
    stop_ids = {free[1][4], free[3][9]}
    expected = [list(itertools.takewhile(lambda token: token not in stop_ids, answer)) for answer in free]
    assert len({len(answer) for answer in expected}) > 1
    for batch_size in (2, 5):
        assert greedy_answers(model, PROMPTS, stop_ids, 30, batch_size) == expected


def test_the_next_prompt_takes_the_place_of_a_row_that_has_ended(tiny, monkeypatch):
    """17 prompts in 4 rows, with and without a common start: the answers of each alone, in fewer forwards than by fours."""
    model = tiny("llama")
    prompts = [[*range(40, 60), 3 * i + 5, 7, i + 100][-(i % 5 + 3) :] for i in range(17)]
    for start in ([], list(range(200, 230))):
        asked = [start + prompt for prompt in prompts]
        stop_ids = {generate_single(model, asked[0], {383}, 12)[2], generate_single(model, asked[4], {383}, 12)[7]}
        expected = [generate_single(model, prompt, stop_ids, 12) for prompt in asked]
        assert len({len(answer) for answer in expected}) > 2
        with watched(model) as seen:
            done = []
            assert greedy_answers(model, asked, stop_ids, 12, 4, done.append) == expected
        assert sum(done) == sum(answer_work(model, asked, 12)) == sum(map(len, prompts)) + 12 * len(prompts)
        assert max(rows for rows, _ in seen) == 4
        assert seen.count(torch.Size([1, 30])) == bool(start)  # the common start is read once
        assert max(width for _, width in seen) == (30 if start else 7)
        # Memory for the tokens of two answers only.
        with monkeypatch.context() as patch, watched(model) as seen:
            patch.setattr("eval.generate.cache_tokens", lambda model, asked=asked: 2 * (max(map(len, asked)) + 12))
            assert greedy_answers(model, asked, stop_ids, 12, 4) == expected
        assert max(rows for rows, _ in seen) == 2
    # All rows end together, one at a time or two: the cache, with the common start in it, is kept.
    asked = [[*range(200, 230), 5, i] for i in range(6)]
    for rows in (1, 2):
        with watched(model) as seen:
            answers = greedy_answers(model, asked, set(), 3, rows)
        assert answers == [generate_single(model, prompt, {383}, 3) for prompt in asked]
        assert [width for _, width in seen].count(31) == 1  # the 5 is common, too


def test_a_common_start_is_read_once_unless_a_window_would_count_the_padding(tiny):
    model, start = tiny("mistral_sliding"), list(range(30, 50))
    prompts = [[*start, 5], [*start, 6, 7, 8]]
    assert shared_prefix(model, prompts, 3) == []  # the window has 8 columns
    for one in model.config, *(layer.self_attn.config for layer in model.model.layers):
        one.sliding_window = 26
    assert shared_prefix(model, prompts, 3) == start and shared_prefix(model, prompts, 4) == []
    assert greedy_answers(model, prompts, {383}, 3, 2) == [generate_single(model, one, {383}, 3) for one in prompts]
    assert shared_prefix(tiny("llama"), [start, start[:17]], 3) == start[:16]  # each has one more
    assert shared_prefix(tiny("llama"), [start[:16]] * 2, 3) == [] == shared_prefix(tiny("llama"), [start], 3)


def test_short_prompts_behind_a_long_one_get_more_rows(tiny, monkeypatch):
    model = tiny("llama")
    prompts = [[5 + i % 9] * (100 if i == 7 else 4) for i in range(12)]
    monkeypatch.setattr("eval.generate.cache_tokens", lambda model: 110)
    with watched(model) as seen:
        answers = greedy_answers(model, prompts, set(), 6, 32)
    rows = [number for number, _ in seen]
    assert (rows[0], max(rows)) == (1, 11)
    assert answers == [generate_single(model, prompt, {383}, 6) for prompt in prompts]


def test_a_cache_with_other_layers_takes_one_prompt_at_a_time(tmp_path):
    """LFM2: convolutions beside attention."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **shape)).eval()
    prompts = [[5, 6, 7], [8] * 9, [1, 2]]
    assert not holds_rows(model)
    assert greedy_answers(model, prompts, {63}, 8, 4) == [generate_single(model, one, {63}, 8) for one in prompts]


@pytest.mark.parametrize(("family", "dtype"), [("llama_biased", torch.float32), ("llama", torch.bfloat16)])
def test_a_model_with_packed_weights_computes_the_same(tmp_path, family, dtype):
    directory = write_tiny_model(tmp_path / "model", family, tied=family != "llama", seed=3)
    plain, exact = (AutoModelForCausalLM.from_pretrained(directory, dtype=d).eval() for d in (dtype, torch.float32))
    packed = load_for_generation(str(directory), dtype, torch.device("cpu"))
    ids = torch.tensor(PROMPTS[1:2])
    with torch.no_grad():
        expected, logits, right = plain(ids).logits, packed(ids).logits, exact(ids).logits
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    else:  # as far from the exact logits as the plain model in bf16
        assert (logits - right).abs().mean() < 1.05 * (expected - right).abs().mean()
    weight = packed.model.layers[0].mlp.up_proj.weight
    can_pack = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (weight.layout != torch.strided) == can_pack  # a processor without AVX512 cannot pack bf16
    assert torch.equal(weight.to_dense() if can_pack else weight, plain.model.layers[0].mlp.up_proj.weight)
    held = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in (plain, packed)]
    assert held[0] == held[1]  # a weight is kept once


def test_samples_follow_the_distribution(tiny):
    """4,000 first tokens after one prompt, compared with the model's probabilities and with the nucleus."""
    model = tiny("llama")
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.7).softmax(-1)
    for top_p in (1.0, 0.5):
        sampling = Sampling(temperature=0.7, top_p=top_p, seed=1)
        first = [a[0] for a in sampled_answers(model, [PROMPTS[0]] * 4000, list(range(4000)), set(), 1, sampling)]
        counts = torch.bincount(torch.tensor(first), minlength=len(p)).double()
        order = p.argsort(descending=True)
        inside = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(p)
        expected[inside] = p[inside] / p[inside].sum()
        assert counts[expected == 0].sum() == 0
        # Pearson's statistic has a mean equal to its degrees of freedom, and twice that variance.
        usual = expected * 4000 > 5
        statistic = ((counts - 4000 * expected) ** 2 / (4000 * expected))[usual].sum()
        assert abs(statistic - usual.sum()) < 5 * (2 * usual.sum()) ** 0.5


def test_a_sample_depends_only_on_seed_and_sample_number(tiny):
    model = tiny("llama")
    sampling = Sampling(top_p=0.9, seed=3)
    together = sampled_answers(model, PROMPTS, [10, 11, 12, 13, 14], set(), 8, sampling)
    assert sampled_answers(model, PROMPTS[::-1], [14, 13, 12, 11, 10], set(), 8, sampling) == together[::-1]
    assert sampled_answers(model, PROMPTS[2:3], [12], set(), 8, sampling) == together[2:3]
    # At this temperature only the random bits matter, and they differ between steps.
    flat = sampled_answers(model, PROMPTS[:1], [10], set(), 8, Sampling(temperature=1e6))
    assert len(set(flat[0])) > 5
    same = sampled_answers(model, PROMPTS[:1] * 2, [10, 11], set(), 8, sampling)
    assert same[0] == together[0] != same[1]
    assert sampled_answers(model, PROMPTS, [10, 11, 12, 13, 14], set(), 8, Sampling(0.001)) == greedy_answers(
        model, PROMPTS, set(), 8, 5
    )
