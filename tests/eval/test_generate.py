import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from eval.generate import (
    CACHE_GROWTH,
    PreallocatedLayer,
    Sampling,
    greedy_answers,
    left_padded,
    nucleus,
    sampled_answers,
)
from tests.tiny import FAMILIES, write_tiny_model

PROMPTS = [[5, 60, 61], [7] * 20, [9, 80, 81, 82, 83, 84, 85], [11, 90], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    def load(family, layers=2):
        directory = write_tiny_model(tmp_path_factory.mktemp(family), family, layers=layers, seed=3)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    return load


def generate_single(model, prompt, stop_ids, max_new_tokens):
    """Greedy generation by transformers, for a single prompt."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0
    )
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
    return [token for token in output.tolist() if token not in stop_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_same_answers_as_single_prompts(tiny, family):
    model = tiny(family)
    free = [generate_single(model, prompt, {383}, 30) for prompt in PROMPTS]
    # The stop tokens occur in two of the answers, so that rows leave the batch at different times.
    stop_ids = {free[1][4], free[3][9]}
    expected = [generate_single(model, prompt, stop_ids, 30) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    for batch_size in (1, 2, 5):
        assert greedy_answers(model, PROMPTS, stop_ids, 30, batch_size) == expected


def test_progress_counts_every_prompt_exactly_once(tiny):
    model = tiny("llama")
    free = greedy_answers(model, PROMPTS, set(), 6, 5)
    assert [len(answer) for answer in free] == [6] * 5
    for stop_ids in (set(), {free[0][2]}, {answer[0] for answer in free}):
        finished = []
        answers = greedy_answers(model, PROMPTS, stop_ids, 6, 2, finished.append)
        assert sum(finished) == len(PROMPTS)
        assert not any(token in stop_ids for answer in answers for token in answer)
    assert answers == [[]] * 5


def test_positions_start_at_the_first_real_token():
    ids, mask, positions = left_padded([[5, 6], [7, 8, 9, 10]], torch.device("cpu"))
    assert ids[0, 2:].tolist() == [5, 6]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert positions[0, 2:].tolist() == [0, 1]
    assert positions[1].tolist() == [0, 1, 2, 3]


def test_no_prompts_give_no_answers(tiny):
    assert greedy_answers(tiny("llama"), [], {2}, 8, 4) == []


def test_a_preallocated_layer_caches_the_same_as_a_dynamic_layer():
    generator = torch.Generator().manual_seed(0)
    plain, preallocated = DynamicCache(), DynamicCache()
    plain.layers, preallocated.layers = [type(DynamicCache().layer_class_to_replicate())()], [PreallocatedLayer()]
    rows = 4
    for step, tokens in enumerate([7, 1, 1, CACHE_GROWTH, 3, 1, 2 * CACHE_GROWTH, 1]):
        keys = torch.randn(rows, 2, tokens, 8, generator=generator)
        values = torch.randn(rows, 2, tokens, 8, generator=generator)
        for one, other in zip(plain.update(keys, values, 0), preallocated.update(keys, values, 0), strict=True):
            assert torch.equal(one, other)
        assert preallocated.get_seq_length() == plain.get_seq_length()
        if step in (2, 4):
            kept = torch.tensor([2, 0, 1][: rows - 1])
            rows = len(kept)
            plain.batch_select_indices(kept)
            preallocated.batch_select_indices(kept)


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


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = [torch.isfinite(nucleus(logits, top_p)).tolist() for top_p in (0.01, 0.69, 0.71, 1.0)]
    assert [rows[0] for rows in kept] == [
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
        [True] * 4,
    ]
    assert kept[2][1] == [True, False, False, False]
