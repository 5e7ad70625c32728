"""Stochastic rounding of fp32 to bf16, with noise that is a function of (seed, tensor, step, element).

A bf16 number has 8 bits of precision, so an update of 2e-5 to a weight of 0.02 is usually less than half of the gap to the
next number. Rounding to nearest loses such an update in every step. Stochastic rounding goes up or down with the
probability that makes the mean exact (Zamirai et al., arXiv:2010.06192).
"""

import torch

from common.random_bits import MASK32, hash64, mix32_, signed32

COLUMNS = ROWS = 4096


class Noise:
    """The noise of one step: 16 random bits for every element of every tensor, however the tensor is sharded.

    A flattened tensor is divided into rows of 4,096 elements. The bits of an element are the upper half of the 32-bit word
    `a[column] + b[column] * factor(tensor, row)`. `a`, `b` and the factors come from a hash of the seed and the step. The bits are
    uniform, so the mean of the rounding is exact. The bits of two elements in different columns are independent, because `a` is
    random. The bits of two elements in the same column are independent, because the factors of their rows differ (in 1 of 131,072
    pairs they differ by a multiple of 2^17, and independence ends there). Hence a sum of rounding errors has the same variance as
    with independent noise.
    """

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        key = hash64(seed, step)
        words = torch.arange(2 * COLUMNS + ROWS, dtype=torch.int32, device=device).add_(signed32(key & MASK32))
        a, b, self.factors = mix32_(words, signed32(key >> 32)).split((COLUMNS, COLUMNS, ROWS))
        self.a, self.b, self.factors = a, b, self.factors.unsqueeze(1)

    def bits(self, stream: int, first: int, count: int) -> torch.Tensor:
        """Return the bits of `count` elements from index `first` of tensor number `stream`: int32 `(count,)`, 0 ... 65535.

        `first` is an index in the whole flattened tensor.
        """
        row, skipped = divmod(first, COLUMNS)
        words = self.a.new_empty(-(-(skipped + count) // COLUMNS), COLUMNS)
        done = 0
        while done < len(words):  # the factors of 2^24 elements differ; then they repeat, multiplied by another number
            panel, start = divmod(row + done, ROWS)
            factors = self.factors[start : start + len(words) - done] * signed32(hash64(stream, panel) | 1)
            torch.addcmul(self.a, factors, self.b, out=words[done : done + len(factors)])
            done += len(factors)
        # The shift copies the sign, which the mask removes. The lower half of a product is less random.
        bits = words.view(-1)[skipped : skipped + count]
        return bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def stochastic_round_(value: torch.Tensor, noise: Noise, stream: int, first: int) -> torch.Tensor:
    """Round flat fp32 values to bf16 values in place, up or down with probabilities that make the mean exact. Return `value`.

    `stream` is the number of the tensor in the whole model, and `first` is the index of value[0] in the flattened tensor. The
    function adds 16 random bits to the 16 bits that bf16 lacks, then cuts these off. A value that bf16 represents exactly does
    not change.
    """
    value.view(torch.int32).add_(noise.bits(stream, first, value.numel())).bitwise_and_(-0x10000)
    return value
