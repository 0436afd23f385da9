# SPDX-License-Identifier: Apache-2.0
"""Designs of the guidance that were tried: variations of the layer, its start, and the head.

Each is one switch of a run's `design`. What the results favour moves into the package; the rest stays here, so that
every figure can be made again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft_sage import SageLayer


class DesignLayer(SageLayer):
    """A `SageLayer` with switches.

    Switches:
        query: `tokens` (every token attends) or `broadcast` (the CLS token attends, all tokens receive what it read).
        cosine: Cosine attention, with this initial temperature (learnable).
        combine: `add` (z + a before GELU), `gate` (GELU(z) (1 + tanh a)), `only` (GELU(a)).
        row_dropout: Share of the guidance's rows that a training step leaves out.
        readout: Add the attended class embeddings, carried back through the visual projection, to the block's output;
            scaled by a learnable factor that starts at zero.
    """

    design: dict[str, Any]
    rows: torch.Tensor | None = None  # the classes of the episode

    def prepare(self, design: dict[str, Any], back_projection: torch.Tensor) -> None:
        self.design = design
        device = self.peft_sage_down["default"].weight.device
        if design.get("cosine"):
            heads = self.num_heads["default"]
            start = torch.full((heads, 1, 1), float(design["cosine"])).log()
            self.peft_sage_temperature = nn.ParameterDict({"default": nn.Parameter(start.to(device))})
        if design.get("readout"):
            self.peft_sage_readout = nn.ParameterDict({"default": nn.Parameter(torch.zeros(1, device=device))})
            self.back_projection = back_projection

    def active_guidance(self, adapter_name: str) -> torch.Tensor:
        guidance = self.guidance(adapter_name)
        if self.rows is not None:
            guidance = guidance[self.rows]
        if self.training and self.design.get("row_dropout"):
            keep = torch.rand(len(guidance), device=guidance.device) >= self.design["row_dropout"]
            guidance = guidance[keep] if keep.any() else guidance
        return guidance

    def weights(self, z: torch.Tensor, guidance: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Attention weights (h, T, M) for queries (T, r)."""
        heads = self.num_heads[adapter_name]
        query = z.reshape(-1, heads, z.shape[-1] // heads).transpose(0, 1)
        key = self.peft_sage_key[adapter_name](guidance).reshape(len(guidance), heads, -1).transpose(0, 1)
        if self.design.get("cosine"):
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
            scores = query @ key.transpose(1, 2) * self.peft_sage_temperature[adapter_name].exp()
        else:
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        self.last_scores = scores
        return scores.softmax(-1)

    def read(self, z: torch.Tensor, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        guidance = self.active_guidance(adapter_name)
        heads = self.num_heads[adapter_name]
        weights = self.weights(z, guidance, adapter_name)
        value = self.peft_sage_value[adapter_name](guidance).reshape(len(guidance), heads, -1).transpose(0, 1)
        attended = (weights @ value).transpose(0, 1).reshape(z.shape)
        readout = None
        if self.design.get("readout"):
            centred = guidance - guidance.mean(0)
            readout = (weights.mean(0) @ centred @ self.back_projection).reshape(*z.shape[:-1], -1)
        return attended, readout

    def update(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        if adapter_name not in self._guidance:
            return super().update(x, adapter_name)
        z = self.peft_sage_down[adapter_name](self.peft_sage_norm[adapter_name](x))
        query = self.design.get("query", "tokens")
        attended, readout = self.read(z if query == "tokens" else z[:, :1], adapter_name)
        combine = self.design.get("combine", "add")
        if combine == "add":
            hidden = F.gelu(z + attended)
        elif combine == "gate":
            hidden = F.gelu(z) * (1 + attended.tanh())
        else:
            hidden = F.gelu(attended.expand_as(z))
        update = self.peft_sage_up[adapter_name](hidden) * self.peft_sage_scaling[adapter_name]
        if readout is not None:
            update = update + self.peft_sage_readout[adapter_name] * readout
        return update


class SemanticHead(nn.Module):
    """Head whose rows are corrected text embeddings: W = T + T A + w, with A of low rank and shared by all classes.

    What A learns on head classes reaches tail classes through their text. Weight decay on w shrinks a class towards
    its text; with rank 0 that is the control without sharing.

    Args:
        text: Class embeddings T (K, e); fixed.
        scale: Factor of the cosines.
        rank: Rank of A; 0 for none.
        free: Whether each class has a correction w of its own.
    """

    def __init__(self, text: torch.Tensor, scale: float, rank: int, free: bool) -> None:
        super().__init__()
        width = text.shape[1]
        self.scale = scale
        self.register_buffer("text", text.detach().clone())
        self.down = nn.Parameter(torch.randn(width, rank, device=text.device) / width**0.5) if rank else None
        self.up = nn.Parameter(torch.zeros(rank, width, device=text.device)) if rank else None
        self.free = nn.Parameter(torch.zeros_like(text)) if free else None

    @property
    def weight(self) -> torch.Tensor:
        weight = self.text
        if self.down is not None:
            weight = weight + self.text @ self.down @ self.up
        return weight if self.free is None else weight + self.free

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def sage_layers(model: nn.Module) -> list[SageLayer]:
    return [module for module in model.modules() if isinstance(module, SageLayer)]


def apply_design(model: nn.Module, design: dict[str, Any], back_projection: torch.Tensor) -> None:
    """Turn a model's layers into `DesignLayer`s. Call before the optimizer is made.

    Args:
        model: With Sage adapters.
        design: The switches.
        back_projection: The visual projection P (e, d): a class embedding t points at t P in the tower.
    """
    for layer in sage_layers(model):
        layer.__class__ = DesignLayer
        layer.prepare(design, back_projection)
        if design.get("key_std"):
            layer.peft_sage_key["default"].weight.data.mul_(design["key_std"])


@torch.no_grad()
def semantic_start(model: nn.Module, guidance: torch.Tensor, clip: nn.Module, gain: float) -> None:
    """Let queries, keys and values start in the semantic subspace.

    The leading right singular vectors V_r of the centred class embeddings span what tells the classes apart;
    W_down = V_r^T P after the tower's own last LayerNorm, W_k = W_v = V_r^T, so that q k^T is the model's own
    image-text similarity restricted to that subspace.

    Args:
        model: With Sage adapters.
        guidance: (M, e).
        clip: Its CLIP model.
        gain: Temperature of the similarity.
    """
    projection = clip.visual_projection.weight.float()
    norm = clip.vision_model.post_layernorm
    directions = torch.linalg.svd((guidance - guidance.mean(0)).float(), full_matrices=False).Vh
    for layer in sage_layers(model):
        r = layer.peft_sage_down["default"].out_features
        basis = directions[:r]
        if len(basis) < r:
            basis = F.pad(basis, (0, 0, 0, r - len(basis)))
        down = basis @ projection
        typical = (norm.weight.norm() * projection.norm() / projection.shape[1] ** 0.5).clamp(min=1e-6)
        layer.peft_sage_norm["default"].weight.copy_(norm.weight)
        layer.peft_sage_norm["default"].bias.copy_(norm.bias)
        layer.peft_sage_down["default"].weight.copy_(down / typical * r**0.5)
        layer.peft_sage_key["default"].weight.copy_(basis * gain)
        layer.peft_sage_value["default"].weight.copy_(basis * r**0.5)
