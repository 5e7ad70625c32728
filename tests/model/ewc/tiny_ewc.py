"""A tiny model and corpus for the tests of EWC.

The model has a vocabulary of 16, so that the expectation over labels can be computed exactly. Every copy of a document in
the corpus has its own document number, and therefore its own samples.
"""

import types

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.dealing import Dealer, length_as_cost
from distributed.process_group import Ranks
from tests.in_memory import InMemory

VOCABULARY = 16
DIFFERENT = 64  # documents in the corpus, without copies


def signal_is(agreed: bool, ranks: Ranks):
    return types.SimpleNamespace(agreed=lambda: agreed, ranks=ranks)


def dealer(capacity: int = 256, micro_batch: int = 1) -> Dealer:
    """Return a dealer of micro-batches with `capacity` tokens; if it is 0, with `micro_batch` documents of any length."""
    return Dealer(capacity or micro_batch, length_as_cost, capacity > 0)


def write_model(folder, vocabulary: int = VOCABULARY, tied: bool = True, layers: int = 2):
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
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


def corpus(copies: int) -> InMemory:
    """Return DIFFERENT documents of 24 to 40 tokens, mostly targets, each repeated `copies` times.

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
    return InMemory(ids, is_target)
