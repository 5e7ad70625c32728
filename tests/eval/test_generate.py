"""Batches of answers, compared with the most probable tokens of one forward after another."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from eval.generate import Sampling, greedy_answers, load_for_generation, sampled_answers
from tests.tiny import write_tiny_model

PROMPTS = [[5, 60, 61], [7] * 20, [9, 80, 81, 82, 83, 84, 85], [11, 90], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    def load(family, layers=2, dtype=torch.float32):
        directory = write_tiny_model(tmp_path_factory.mktemp(family), family, layers=layers, seed=3)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    return load


@torch.no_grad()
def single_answer(model, prompt, stop_ids, max_new_tokens):
    """Decode one prompt greedily, without a cache, without padding and without `generate`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        token = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


# Caches of one kind of layer and of two, a window in all layers and in every other, sinks, experts.
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe"])
def test_batch_answers_equal_single_answers(tiny, family):
    model = tiny(family)
    free = [single_answer(model, prompt, set(), 30) for prompt in PROMPTS]
    assert greedy_answers(model, PROMPTS, set(), 30) == free
    # Two of the answers contain a stop token, so the rows of a batch end at different times.
    stop_ids = {free[1][4], free[3][9]}
    expected = [single_answer(model, prompt, stop_ids, 30) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    assert greedy_answers(model, PROMPTS, stop_ids, 30) == expected
    assert greedy_answers(model, [], stop_ids, 30) == []


def test_bf16_answers_differ_only_after_near_tie(tiny):
    """At the first token that another batch changes, the two best logits are equal up to the rounding of bf16."""
    model = tiny("llama", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 380, (5 + i % 17,), generator=generator).tolist() for i in range(64)]
    batch, alone = greedy_answers(model, prompts, set(), 40), [single_answer(model, p, set(), 40) for p in prompts]
    assert sum(a == b for a, b in zip(batch, alone, strict=True)) > 32
    for prompt, *answers in zip(prompts, batch, alone, strict=True):
        at = next((i for i, pair in enumerate(zip(*answers, strict=True)) if len(set(pair)) > 1), None)
        if at is not None:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answers[0][:at]])).logits[0, -1].float()
            pair = logits[[answer[at] for answer in answers]]
            # A bf16 number has 8 significant bits. Each of the two logits may be off by a few units of the last one.
            assert logits.max() - pair.min() <= 4 * 2**-8 * pair.abs().max()


def test_own_generation_config_changes_no_answer(tiny):
    """A repetition penalty or a stop token of generation_config.json has no effect on the most probable tokens."""
    model = tiny("llama")
    expected = [single_answer(model, prompt, set(), 12) for prompt in PROMPTS]
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=3, eos_token_id=expected[0][3])
    model.generation_config = own
    assert greedy_answers(model, PROMPTS, set(), 12) == expected
    assert model.generation_config is own


def test_convolutional_model_takes_prompts_one_at_a_time():
    """LFM2 has convolutions beside attention, which would read the padding of a batch."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **shape)).eval()
    prompts, rows = [[5, 6, 7], [8] * 9, [1, 2]], []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    answers = greedy_answers(model, prompts, {63}, 8)
    hook.remove()
    assert set(rows) == {1}
    assert answers == [single_answer(model, prompt, {63}, 8) for prompt in prompts]
    numbers, sampling = [3, 4, 5], Sampling(0.8)
    assert sampled_answers(model, prompts, numbers, {63}, 8, sampling) == [
        sampled_answers(model, [prompt], [number], {63}, 8, sampling)[0]
        for prompt, number in zip(prompts, numbers, strict=True)
    ]


@pytest.mark.parametrize(("family", "dtype"), [("llama_biased", torch.float32), ("llama", torch.bfloat16)])
def test_packed_weights_compute_the_same(tmp_path, family, dtype):
    directory = write_tiny_model(tmp_path / "model", family, tied=family != "llama", seed=3)
    plain, exact = (AutoModelForCausalLM.from_pretrained(directory, dtype=d).eval() for d in (dtype, torch.float32))
    packed = load_for_generation(str(directory), dtype, torch.device("cpu"))
    ids = torch.tensor(PROMPTS[1:2])
    with torch.no_grad():
        expected, logits, exact_logits = plain(ids).logits, packed(ids).logits, exact(ids).logits
    if dtype == torch.float32:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    else:  # as far from the exact logits as the plain model in bf16
        assert (logits - exact_logits).abs().mean() < 1.05 * (expected - exact_logits).abs().mean()
    weight = packed.model.layers[0].mlp.up_proj.weight
    can_pack = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (weight.layout != torch.strided) == can_pack  # a processor without AVX512 cannot pack bf16
    assert torch.equal(weight.to_dense() if can_pack else weight, plain.model.layers[0].mlp.up_proj.weight)
    num_bytes = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in (plain, packed)]
    assert num_bytes[0] == num_bytes[1]  # a weight is kept once


def test_samples_follow_the_distribution(tiny):
    """4,000 first tokens after one prompt, compared with the model's probabilities and with the nucleus."""
    model = tiny("llama")
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.7).softmax(-1)
    for top_p in (1.0, 0.5):
        sampling = Sampling(temperature=0.7, top_p=top_p, seed=1)
        answers = sampled_answers(model, [PROMPTS[0]] * 4000, list(range(4000)), set(), 1, sampling)
        counts = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=len(p)).double()
        order = p.argsort(descending=True)
        inside = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(p)
        expected[inside] = p[inside] / p[inside].sum()
        assert counts[expected == 0].sum() == 0
        # Pearson's statistic has a mean equal to its degrees of freedom, and twice that variance.
        usual = expected * 4000 > 5
        statistic = ((counts - 4000 * expected) ** 2 / (4000 * expected))[usual].sum()
        assert abs(statistic - usual.sum()) < 5 * (2 * usual.sum()) ** 0.5


def test_samples_depend_only_on_seed_and_number(tiny):
    model = tiny("llama")
    sampling = Sampling(top_p=0.9, seed=3)
    batch = sampled_answers(model, PROMPTS, [10, 11, 12, 13, 14], set(), 8, sampling)
    assert sampled_answers(model, PROMPTS[::-1], [14, 13, 12, 11, 10], set(), 8, sampling) == batch[::-1]
    assert sampled_answers(model, PROMPTS[2:3], [12], set(), 8, sampling) == batch[2:3]
    # At this temperature only the random bits matter, and they differ between steps.
    flat = sampled_answers(model, PROMPTS[:1], [10], set(), 8, Sampling(temperature=1e6))
    assert len(set(flat[0])) > 5
    same_prompt = sampled_answers(model, PROMPTS[:1] * 2, [10, 11], set(), 8, sampling)
    assert same_prompt[0] == batch[0] != same_prompt[1]
    cold = sampled_answers(model, PROMPTS, [10, 11, 12, 13, 14], set(), 8, Sampling(0.001))
    assert cold == greedy_answers(model, PROMPTS, set(), 8)
