"""Names of the compute dtypes, and tests for native bf16 support."""

import argparse

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype named `bf16` or `fp32`. `auto` is bf16 if the hardware supports it natively, else fp32."""
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp32"
    return DTYPES[name]


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--dtype`. Pass its value to `choose_dtype`."""
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="compute dtype; auto: bf16 if the hardware supports it natively, else fp32 (%(default)s)",
    )


def has_native_bf16(device: torch.device) -> bool:
    """Return whether bf16 matrix products run in hardware: CUDA since Ampere; CPUs with AMX, AVX512-BF16 or Arm BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(bf16_instructions())


def bf16_instructions() -> list[str]:
    """Return this CPU's instructions that multiply bf16, by torch's names: `amx_bf16`, `avx512_bf16`, or Arm's."""
    return sorted(name for name, on in torch.cpu.get_capabilities().items() if "bf16" in name and on)
