# SPDX-License-Identifier: Apache-2.0
"""Training on a random part of an image's patches, as the cost of a step grows with their number.

PatchDropout: Liu et al., arXiv 2208.07220; of CLIP, FLIP: Li et al., arXiv 2212.00794.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .towers.embeddings import eval_mode
from .towers.mlps import find_mlps


#: Relative difference of answers that may be rounding, also in bfloat16.
ROUNDING = 0.05


def drop_patches(tokens: Tensor, share: float) -> Tensor:
    """Leave out a share of the patches, others for each image.

    Args:
        tokens: (B, 1 + n, d) of which the first is the class token, or a patch that stays.
        share: In [0, 1); at least one patch stays.

    Returns:
        (B, 1 + max(1, round((1 - share) n)), d), the patches in random order.
    """
    images, length, width = tokens.shape
    kept = max(1, round((1 - share) * (length - 1)))
    order = torch.rand(images, length - 1, device=tokens.device).argsort(dim=1)
    chosen = order[:, :kept, None].expand(-1, -1, width) + 1
    return torch.cat([tokens[:, :1], tokens.gather(1, chosen)], dim=1)


@contextmanager
def patch_dropout(model: nn.Module, share: float) -> Iterator[None]:
    """In training mode, the blocks of the vision tower see [`drop_patches`] of their tokens."""
    if not share:
        yield
        return

    def change(tokens: Tensor) -> Tensor:
        return drop_patches(tokens, share) if model.training else tokens

    with _changed_tokens(model, change):
        yield


@torch.no_grad()
def can_drop_patches(model: nn.Module, answer: Callable[[], Tensor]) -> bool:
    """Whether the blocks of a vision tower work with some of the patches as with all.

    They do not where they depend on the order of tokens, as with windows and rotary positions.

    Args:
        model: A model with a vision tower; it may be wrapped.
        answer: Gives embeddings or logits (B, ...) of the same images each time, by that tower.
    """

    def changed(change: Callable[[Tensor], Tensor]) -> Tensor:
        with _changed_tokens(model, change):
            return answer().float()

    with eval_mode(model):
        plain = answer().float()
        try:
            changed(lambda tokens: drop_patches(tokens, 0.5))
            # All of them, in another order.
            shuffled = changed(lambda tokens: drop_patches(tokens, 0.0))
        except Exception:  # whatever a tower raises that cannot
            return False
    return bool((shuffled - plain).norm() <= ROUNDING * plain.norm())


def _first_block(model: nn.Module) -> nn.Module:
    return model.get_submodule(find_mlps(model)[0].rpartition(".")[0])


@contextmanager
def _changed_tokens(
    model: nn.Module, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    handle = _first_block(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
