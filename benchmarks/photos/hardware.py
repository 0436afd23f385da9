"""What the machine computes on, and in which number format."""

from pathlib import Path

import torch


def has_fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return torch.cuda.is_available() or "avx512_bf16" in flags or "amx_bf16" in flags


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
