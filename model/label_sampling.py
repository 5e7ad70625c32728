"""Labels sampled from a softmax by keys, for the Fisher diagonal (model/ewc.py) and generation (eval/generate.py)."""

import torch

from common.random_bits import mix32_


def sample_labels(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """int64 `(rows,)`: a label for each row of `logits` `(rows, vocabulary)`, with the probabilities of its softmax.

    The label is the first of exponential clocks with rates exp(logits) (the Gumbel-max trick). A rounding error of the
    logits changes it only if two labels are that close, unlike with the inverse of the distribution function.
    """
    words = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    low, high = (keys & 0xFFFFFFFF).int(), (keys >> 32).int()
    words = mix32_(words + low[:, None], high[:, None])
    # 31 bits, exact near zero: an unlikely label wins by an early ring.
    time = words.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()
    return torch.sub(logits, time.log_(), out=time).argmax(dim=1)
