import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from eval.generate import ROOM, RoomyLayer, greedy_answers, left_padded
from tests.tiny import FAMILIES, write_tiny_model

PROMPTS = [[5, 60, 61], [7] * 20, [9, 80, 81, 82, 83, 84, 85], [11, 90], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    def load(family, layers=2):
        directory = write_tiny_model(tmp_path_factory.mktemp(family), family, layers=layers, seed=3)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    return load


def alone(model, prompt, stop_ids, max_new_tokens):
    """transformers' own greedy generation, one prompt at a time."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=0
    )
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0, len(prompt) :]
    return [token for token in output.tolist() if token not in stop_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_prompt_alone(tiny, family):
    model = tiny(family)
    free = [alone(model, prompt, {383}, 30) for prompt in PROMPTS]
    # Tokens that two of the answers contain as stop tokens: rows then leave the batch at different times.
    stop_ids = {free[1][4], free[3][9]}
    expected = [alone(model, prompt, stop_ids, 30) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    for batch_size in (1, 2, 5):
        assert greedy_answers(model, PROMPTS, stop_ids, 30, batch_size) == expected


def test_progress_counts_every_prompt_once_however_it_ends(tiny):
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


def test_no_prompts_no_answers(tiny):
    assert greedy_answers(tiny("llama"), [], {2}, 8, 4) == []


def test_a_roomy_layer_holds_what_a_dynamic_one_holds():
    generator = torch.Generator().manual_seed(0)
    plain, roomy = DynamicCache(), DynamicCache()
    plain.layers, roomy.layers = [type(DynamicCache().layer_class_to_replicate())()], [RoomyLayer()]
    rows = 4
    for step, tokens in enumerate([7, 1, 1, ROOM, 3, 1, 2 * ROOM, 1]):
        keys = torch.randn(rows, 2, tokens, 8, generator=generator)
        values = torch.randn(rows, 2, tokens, 8, generator=generator)
        for one, other in zip(plain.update(keys, values, 0), roomy.update(keys, values, 0), strict=True):
            assert torch.equal(one, other)
        assert roomy.get_seq_length() == plain.get_seq_length()
        if step in (2, 4):
            kept = torch.tensor([2, 0, 1][: rows - 1])
            rows = len(kept)
            plain.batch_select_indices(kept)
            roomy.batch_select_indices(kept)
