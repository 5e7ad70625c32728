"""The instructions of a processor that multiply bf16, on which a run's compute dtype depends."""

from pathlib import Path

import pytest
import torch

from model.dtypes import bf16_instructions, choose_dtype

CPUINFO = Path("/proc/cpuinfo")
OF_X86 = {"amx_bf16", "avx512_bf16"}
OF_ARM = {"bf16", "svebf16"}


@pytest.mark.skipif(not CPUINFO.exists(), reason="this system does not say what its processor has")
def test_bf16_instructions_have_the_systems_names() -> None:
    lines = [line.split(":", 1) for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0][1].split())
    assert set(bf16_instructions()) & OF_X86 == flags & OF_X86
    assert bool(bf16_instructions()) == bool(flags & (OF_X86 | OF_ARM))


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, []),
        ({"avx512_bf16": True, "amx_bf16": False}, ["avx512_bf16"]),
        ({"avx512_bf16": True, "amx_bf16": True, "amx_fp16": True}, ["amx_bf16", "avx512_bf16"]),
        ({"avx512_bf16": False, "amx_tile": True, "amx_bf16": False}, []),  # tiles for int8 alone
        ({"architecture": "aarch64", "bf16": True}, ["bf16"]),
    ],
)
def test_torch_reports_each_bf16_instruction(known, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert bf16_instructions() == expected
    assert choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if expected else torch.float32)
