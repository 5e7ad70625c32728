"""Published speeds of full training in bf16, as data: what was trained, on what, and the tokens per second and GPU.

Every row is sharded data parallelism alone (FSDP), because that is what the planner plans. Documents fill the sequence, all
tokens are targets, and attention sees the whole sequence. Rows of one source stand together; within a source every second
one is held out from the fit (planner/published.py). `LEFT_OUT` says what was found and does not compare.
"""

from dataclasses import dataclass

LLM_FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
TORCHTITAN_H100 = "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md"
TORCHTITAN_A100 = (
    "https://github.com/pytorch/torchtitan/blob/041336434916bdc0f88c1f89fda176fd3c2092e4/docs/performance.md"
)
PYTORCH_IBM = "https://pytorch.org/blog/maximizing-training/"
FMS_FSDP = "https://github.com/foundation-model-stack/fms-fsdp/blob/0d319983c4b3b7f7b3b5e2c5e7f746746b6f73a9/README.md"
KEMPNER = "https://github.com/KempnerInstitute/KempnerForge/blob/main/benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md"
AUTOMODEL = "https://docs.nvidia.com/nemo/automodel/performance/performance-summary.md"

# name -> (hidden, intermediate, layers, heads, key-value heads, vocabulary, tied). An MPT block has two matrices of 4 h x h in
# its MLP; as a Llama block with three it has as many elements with an intermediate size of 8/3 h.
SHAPES = {
    "MPT 350M": (1024, 2731, 24, 16, 16, 50368, True),
    "MPT 1B": (2048, 5461, 24, 16, 16, 50368, True),
    "MPT 3B": (2560, 6827, 32, 20, 20, 50368, True),
    "MPT 7B": (4096, 10923, 32, 32, 32, 50368, True),
    "MPT 13B": (5120, 13653, 40, 40, 40, 50368, True),
    "MPT 30B": (7168, 19115, 48, 56, 56, 50368, True),
    "MPT 70B": (8192, 21845, 80, 64, 64, 50368, True),
    "Llama 2 7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama 2 13B": (5120, 13824, 40, 40, 40, 32000, False),
    "Llama 2 34B": (8192, 22016, 48, 64, 8, 32000, False),
    "Llama 2 70B": (8192, 28672, 80, 64, 8, 32000, False),
    "Llama 3 8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama 3 14.8B": (5120, 17920, 40, 40, 8, 128256, False),
    "Llama 3 70B": (8192, 28672, 80, 64, 8, 128256, False),
}


@dataclass(frozen=True)
class Row:
    """One published run."""

    source: str
    model: str
    sequence: int  # tokens
    gpus: int
    gpu: str  # planner.cluster.GPU_NAMES
    rows: float  # sequences of a micro-batch on one GPU
    micro_batches: int
    checkpointing: str  # none | full | half: every second layer, or (torchtitan) every second product of each
    published: float  # tokens per second and GPU
    is_compiled: bool = False
    per_node: int = 8
    network: float | None = None  # Gb/s of a node; None: that of the DGX
    strategy: str = "full"
    reduce_dtype: str = "fp32"
    memory: str = "16N"
    note: str = ""


def _foundry(
    model: str, sequence: int, gpus: int, gpu: str, rows: int, micro_batches: int, kept: str, speed: int
) -> Row:
    """MosaicML's "PURE" mixed precision, which all rows on 40 GB have, reduces in bf16, "DEFAULT" in fp32."""
    is_pure = gpu == "A100-40" or (gpu, model) == ("A100-80", "MPT 70B")
    reduce_dtype = "bf16" if is_pure else "fp32"
    return Row(
        LLM_FOUNDRY, model, sequence, gpus, gpu, rows, micro_batches, kept, float(speed), reduce_dtype=reduce_dtype
    )


ROWS = (
    _foundry("MPT 70B", 2048, 64, "H100", 8, 4, "full", 1039),
    _foundry("MPT 70B", 2048, 32, "H100", 2, 16, "full", 882),
    _foundry("MPT 30B", 2048, 32, "H100", 14, 3, "full", 2308),
    _foundry("MPT 30B", 2048, 8, "H100", 3, 21, "full", 2002),
    _foundry("MPT 13B", 2048, 64, "H100", 2, 1, "none", 4800),
    _foundry("MPT 13B", 2048, 8, "H100", 2, 1, "none", 4792),
    _foundry("MPT 7B", 8192, 8, "H100", 8, 2, "full", 6935),
    _foundry("MPT 7B", 2048, 8, "H100", 6, 1, "none", 10643),
    _foundry("MPT 7B", 32768, 8, "H100", 2, 2, "full", 3318),
    _foundry("MPT 3B", 2048, 64, "H100", 6, 3, "none", 22525),
    _foundry("MPT 1B", 8192, 8, "H100", 3, 4, "none", 29157),
    _foundry("MPT 1B", 2048, 16, "H100", 20, 1, "none", 46037),
    _foundry("MPT 70B", 2048, 64, "A100-80", 8, 4, "full", 410),
    _foundry("MPT 30B", 2048, 8, "A100-80", 3, 21, "full", 916),
    _foundry("MPT 13B", 2048, 8, "A100-80", 2, 3, "none", 2262),
    _foundry("MPT 7B", 2048, 8, "A100-80", 6, 2, "none", 4641),
    _foundry("MPT 7B", 8192, 8, "A100-80", 8, 2, "full", 3206),
    _foundry("MPT 3B", 2048, 8, "A100-80", 10, 2, "none", 10811),
    _foundry("MPT 1B", 2048, 8, "A100-80", 14, 4, "none", 20513),
    _foundry("MPT 70B", 2048, 128, "A100-40", 4, 1, "full", 376),
    _foundry("MPT 70B", 2048, 64, "A100-40", 2, 1, "full", 276),
    _foundry("MPT 13B", 2048, 128, "A100-40", 16, 1, "full", 1972),
    _foundry("MPT 13B", 2048, 8, "A100-40", 4, 16, "full", 1668),
    _foundry("MPT 7B", 2048, 128, "A100-40", 18, 1, "full", 3623),
    _foundry("MPT 3B", 2048, 128, "A100-40", 6, 1, "none", 9538),
    _foundry("MPT 1B", 2048, 8, "A100-40", 8, 8, "none", 19271),
    _foundry("MPT 350M", 2048, 128, "A100-40", 18, 1, "none", 51934),
    Row(TORCHTITAN_H100, "Llama 3 8B", 8192, 8, "H100-500W", 2, 1, "half", 5762),
    Row(TORCHTITAN_H100, "Llama 3 8B", 8192, 8, "H100-500W", 2, 1, "half", 6667, is_compiled=True),
    Row(TORCHTITAN_H100, "Llama 3 8B", 8192, 128, "H100-500W", 2, 1, "half", 6514, is_compiled=True),
    Row(TORCHTITAN_H100, "Llama 3 8B", 8192, 128, "H100-500W", 2, 1, "half", 5605),
    Row(TORCHTITAN_A100, "Llama 3 8B", 8192, 64, "A100-80", 1, 1, "half", 2904, note="network not stated"),
    Row(TORCHTITAN_A100, "Llama 3 70B", 8192, 64, "A100-80", 1, 1, "full", 331, note="network not stated"),
    Row(TORCHTITAN_A100, "Llama 2 13B", 4096, 64, "A100-80", 2, 1, "none", 2162, note="network not stated"),
    Row(TORCHTITAN_A100, "Llama 2 13B", 4096, 64, "A100-80", 2, 1, "half", 1914, note="network not stated"),
    Row(TORCHTITAN_A100, "Llama 2 70B", 4096, 64, "A100-80", 2, 1, "full", 353, note="network not stated"),
    Row(PYTORCH_IBM, "Llama 2 7B", 4096, 128, "A100-80", 2, 1, "none", 3700, False, 8, 400, "hybrid", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 13B", 4096, 128, "A100-80", 2, 1, "half", 1800, False, 8, 400, "full", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 34B", 4096, 128, "A100-80", 2, 1, "full", 700, False, 8, 400, "full", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 70B", 4096, 128, "A100-80", 2, 1, "full", 370, False, 8, 400, "full", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 13B", 4096, 96, "H100", 2, 1, "half", 3800, False, 8, 800, "full", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 7B", 4096, 96, "H100", 2, 1, "none", 7500, False, 8, 800, "hybrid", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 70B", 4096, 96, "H100", 2, 1, "full", 800, False, 8, 800, "full", "bf16"),
    Row(PYTORCH_IBM, "Llama 2 34B", 4096, 96, "H100", 2, 1, "full", 1550, False, 8, 800, "full", "bf16"),
    Row(FMS_FSDP, "Llama 2 70B", 4096, 128, "A100-80", 6, 1, "full", 380, False, 8, 400, "full", "bf16"),
    Row(FMS_FSDP, "Llama 2 34B", 4096, 128, "A100-80", 8, 1, "full", 772, False, 8, 400, "full", "bf16"),
    Row(KEMPNER, "Llama 3 8B", 4096, 1, "H200", 4, 2, "full", 10471, True, 1, memory="8N"),
    Row(KEMPNER, "Llama 3 8B", 4096, 2, "H200", 4, 2, "full", 9364, True, 2, memory="8N"),
    Row(KEMPNER, "Llama 3 8B", 4096, 4, "H200", 4, 2, "full", 9746, True, 4, memory="8N"),
    Row(
        KEMPNER,
        "Llama 3 14.8B",
        4096,
        8,
        "H200",
        4,
        4,
        "full",
        4426,
        False,
        4,
        1600,
        memory="8N",
        note="network not stated",
    ),
    Row(
        AUTOMODEL,
        "Llama 3 70B",
        8192,
        64,
        "H100",
        0.5,
        4,
        "full",
        866.77,
        True,
        memory="12N",
        note="a sequence on two GPUs",
    ),
)

# More of llm-foundry's rows, which were looked at only when the model was finished: long and short sequences, other numbers of GPUs.
BLIND_ROWS = (
    _foundry("MPT 30B", 2048, 16, "H100", 10, 3, "full", 2263),
    _foundry("MPT 13B", 4096, 8, "H100", 10, 3, "full", 4717),
    _foundry("MPT 13B", 16384, 8, "H100", 3, 3, "full", 2985),
    _foundry("MPT 7B", 4096, 8, "H100", 16, 2, "full", 8611),
    _foundry("MPT 7B", 65536, 8, "H100", 1, 2, "full", 1956),
    _foundry("MPT 3B", 8192, 8, "H100", 3, 6, "none", 16578),
    _foundry("MPT 1B", 2048, 64, "H100", 20, 1, "none", 44402),
    _foundry("MPT 1B", 512, 8, "H100", 56, 4, "none", 52275),
    _foundry("MPT 30B", 8192, 8, "A100-80", 1, 21, "full", 574),
    _foundry("MPT 13B", 16384, 8, "A100-80", 3, 3, "full", 1431),
    _foundry("MPT 1B", 512, 8, "A100-80", 56, 4, "none", 23148),
    _foundry("MPT 350M", 2048, 8, "A100-80", 32, 2, "none", 58782),
    _foundry("MPT 30B", 2048, 32, "A100-40", 4, 1, "full", 857),
    _foundry("MPT 7B", 16384, 8, "A100-40", 1, 4, "full", 2249),
    _foundry("MPT 3B", 2048, 64, "A100-40", 6, 1, "none", 9736),
    _foundry("MPT 350M", 8192, 8, "A100-40", 4, 4, "none", 34933),
)

# What was found and is not compared, with the reason.
LEFT_OUT = (
    ("Megatron-Bridge, Llama 3 70B SFT, 32 x H100: 1,638", "its products are in FP8, and it splits layers over GPUs (tensor and pipeline parallelism)"),
    ("torchtitan, 8B to 405B with Float8", "its products are in FP8"),
    ("torchtitan, 8B on 4 and 8 nodes of 8 x H200 (Trainy and WhiteFiber): 10,938 and 10,753", "its products are in FP8"),
    ("torchtitan on A100, selective op: 8B 2,973, 13B 1,904, 70B 355", "no setting of ours recomputes the same operations"),
    ("fms-fsdp, 7B and 13B with HSDP", "read, and not entered"),
    ("torchtitan, 70B and 405B", "tensor and pipeline parallelism"),
    ("KempnerForge, rows with TP", "tensor parallelism"),
    ("NeMo AutoModel, Llama 3 8B and 70B with LoRA", "the weights' gradients and the optimizer are missing"),
    ("llm-foundry, rows in FP8, and more rows in bf16", "FP8; of the others a choice of sizes, lengths and numbers of GPUs is enough"),
)  # fmt: skip
