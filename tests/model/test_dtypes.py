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
    ("known", "older", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, (False, False), []),
        ({"avx512_bf16": True, "amx_bf16": False}, (True, False), ["avx512_bf16"]),
        ({"avx512_bf16": True, "amx_bf16": True, "amx_fp16": True}, (True, True), ["amx_bf16", "avx512_bf16"]),
        ({"avx512_bf16": False, "amx_tile": True, "amx_bf16": False}, (False, True), []),  # tiles for int8 alone
        ({"architecture": "aarch64", "bf16": True}, (False, False), ["bf16"]),
        (None, (True, True), ["amx_bf16", "avx512_bf16"]),  # an older torch without get_capabilities
        (None, (False, False), []),
    ],
)
def test_torch_reports_each_bf16_instruction(known, older, expected, monkeypatch) -> None:
    if known is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    for name, answer in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), older, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert bf16_instructions() == expected
    assert choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if expected else torch.float32)
