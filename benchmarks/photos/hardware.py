"""What the machine computes on, and in which number format."""

import torch

from peft_sage import arguments


def has_fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32."""
    return torch.cuda.is_available() or arguments.has_fast_bfloat16()


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
