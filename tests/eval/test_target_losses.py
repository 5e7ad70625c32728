"""Losses of target tokens against their definition."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.target_losses import loss_work, target_losses
from tests.tiny import write_tiny_model


def sequences():
    generator, result = torch.Generator().manual_seed(1), []
    for length, start in ((30, 20), (12, 11), (7, 0), (25, 3), (1, 0), (9, 9)):  # the last two have no target
        ids = torch.randint(3, 384, (length,), generator=generator).tolist()
        result.append((ids, [False] * start + [True] * (length - start)))
    result[3][1][10] = False  # a gap between targets
    return result


def one_by_one(model, ids, is_target):
    """The definition, without batching: the sum of -log p(token t | tokens before t)."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if is_target[t])


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_losses_equal_the_definition(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path, family), dtype=torch.float32).eval()
    losses = target_losses(model, sequences())
    assert [loss.targets for loss in losses] == [10, 1, 6, 21, 0, 0]
    for loss, (ids, is_target) in zip(losses, sequences(), strict=True):
        assert loss.nats == pytest.approx(one_by_one(model, ids, is_target), abs=2e-4)
    assert list(map(loss_work, sequences())) == [30, 12, 7, 25, 0, 0]
    assert target_losses(model, []) == []
