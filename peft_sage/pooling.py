# SPDX-License-Identifier: Apache-2.0
"""Fewer rows of guidance for many classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .validation import check_embeddings, is_int


@torch.no_grad()
def pool_guidance(guidance: torch.Tensor, num_rows: int = 512, iterations: int = 20, seed: int = 0) -> torch.Tensor:
    """Replace the embeddings of many classes by fewer that stand for groups of similar classes.

    What an adapter costs grows with the rows that its blocks attend to: with thousands of classes, attention is the
    larger part of it. Spherical k-means gathers the rows around `num_rows` directions. It changes what is computed, so
    an adapter is trained with the guidance that it will be used with. `SageConfig(guidance_rows=...)` does this for
    class descriptions; this function is for a tensor that is given as `guidance`. A head still has one row a class.

    It is computed on the CPU, so that all processes come to the same result.

    Args:
        guidance: (M, e), one embedding a class; normalised here.
        num_rows: R, how many rows remain.
        iterations: Steps of k-means at most; fewer if nothing changes any more.
        seed: Decides which rows k-means starts from.

    Returns:
        A float32 tensor (R, e) with L2-normalised rows, on the device of `guidance`; if M is at most R, all M rows.

    Raises:
        TypeError: If `guidance` is no floating-point tensor.
        ValueError: If it is not fit to be guidance, `num_rows` or `iterations` is not positive, or `seed` is no
            integer.

    Reference: ours; spherical k-means is of Dhillon and Modha (2001).
    """
    check_embeddings(guidance, "guidance")
    for name, value in (("num_rows", num_rows), ("iterations", iterations)):
        if not is_int(value) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if not is_int(seed):
        raise ValueError(f"`seed` must be an integer, got {seed!r}.")
    rows = F.normalize(guidance.detach().float(), dim=-1)
    if len(rows) <= num_rows:
        return rows
    rows = rows.cpu()
    generator = torch.Generator().manual_seed(seed)
    means = rows[torch.randperm(len(rows), generator=generator)[:num_rows]]
    nearest: torch.Tensor | None = None
    for _ in range(iterations):
        before, nearest = nearest, torch.cat([(part @ means.T).argmax(dim=1) for part in rows.split(2**14)])
        if before is not None and torch.equal(before, nearest):
            break
        sums = torch.zeros_like(means).index_add_(0, nearest, rows)
        # A group without rows, or whose rows cancel out, keeps its direction.
        means = torch.where(sums.norm(dim=1, keepdim=True) > 1e-6, F.normalize(sums, dim=-1), means)
    return means.to(guidance.device)
