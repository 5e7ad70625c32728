"""What the time of a step depends on and no data sheet says: a few constants, the same for all models and machines of a kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Assumptions:
    """One guess of them all."""

    products: float  # share of `Device.sustained` that large products inside of a model reach
    half_tokens: float  # of a micro-batch, at which products reach half of that
    attention: float  # share of `Device.attention` that its kernel reaches for long documents
    bandwidth: float  # share of the memory bandwidth that elementwise kernels reach
    link: float  # share of a link's bandwidth that collectives reach
    contention: float  # share of a hidden collective's time by which it slows the computation that hides it
    host: float  # bytes/s of AdamW on the host, for the shard of one rank


# kind of device -> slow, middle, fast. On CUDA the middle is fitted to the half of the published runs that is meant for it
# (planner/published.py), and slow and fast are wide enough for nine tenths of that half. The host's bandwidth is that of
# one core (torchrun sets OMP_NUM_THREADS=1), of three and of eight. On a CPU the middle is that of the profile in
# docs/performance.md; slow has a busy or slower memory.
ASSUMPTIONS = {
    "cuda": (
        Assumptions(0.88, 1200, 0.45, 0.75, 0.50, 0.40, 10e9),
        Assumptions(1.00, 750, 0.58, 0.90, 0.65, 0.25, 25e9),
        Assumptions(1.00, 300, 1.10, 0.95, 0.85, 0.00, 60e9),
    ),
    "cpu": (
        Assumptions(0.70, 0, 1.0, 0.40, 0.6, 0.0, 0.0),
        Assumptions(0.85, 0, 1.0, 0.75, 0.8, 0.0, 0.0),
        Assumptions(1.00, 0, 1.0, 1.00, 1.0, 0.0, 0.0),
    ),
}
# Tokens of a document for which attention reaches half of its rate: about what the figures of arXiv:2307.08691 show.
HALF_LENGTH = 512
FP32_ON_CUDA = 1 / 16  # FLOP/s in fp32 over those in bf16, of an A100 or H100 without TF32; data sheets
BACKWARD_ATTENTION = 2.5  # flash attention recomputes the scores: 5 products in backward, 2 in forward
# On a CPU attention writes its scores to memory: bytes per pair and head, so that an EPYC needs 5 to 6 times as long for a
# FLOP of it as for one of a product, as measured (docs/performance.md).
CPU_PAIR_BYTES = 144
# Seconds in which Python starts forward and backward of a layer: about 150 kernels of 5 us, and FSDP's hooks.
HOST_PER_LAYER = 1.5e-3
