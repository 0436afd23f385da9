# SPDX-License-Identifier: Apache-2.0
"""The blocks of a tower, without what no run reads and what is the same in every step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

from .bed import load_upper_tower
from .hardware import has_fast_bfloat16


BATCH = 500


class ClassTokenLayer(CLIPEncoderLayer):
    """The last block of a tower, computed for the class token only, as nothing else of it is read."""

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, **unused: object
    ) -> Tensor:
        """The class token (B, 1, d) of the tokens (B, t, d)."""
        attention = self.self_attn
        normed = self.layer_norm1(hidden_states)
        projected = (
            attention.q_proj(normed[:, :1]),
            attention.k_proj(normed),
            attention.v_proj(normed),
        )
        queries, keys, values = (
            states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for states in projected
        )
        weights = (attention.scale * queries @ keys.mT).softmax(dim=-1)
        attended = (weights @ values).transpose(1, 2).flatten(2)
        hidden = hidden_states[:, :1] + attention.out_proj(attended)
        return hidden + self.mlp(self.layer_norm2(hidden))


class RememberedMLP(CLIPMLP):
    """An MLP whose output was computed before."""

    output: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """That output."""
        return self.output


class RememberedLayer(CLIPEncoderLayer):
    """A block with an adapter parallel to its MLP, given what `remember` makes of the tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # In a tuple, as the adapter will wrap the module.
        self.remembered = (RememberedMLP(config),)
        self.mlp = self.remembered[0]

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, **unused: object
    ) -> Tensor:
        """The block's output (B, t, d)."""
        attended, self.remembered[0].output = hidden_states.chunk(2, dim=-1)
        return attended + self.mlp(self.layer_norm2(attended))


def autocast() -> torch.autocast:
    """bfloat16 where the processor is fast in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16())


@torch.inference_mode()
def in_batches(function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """What a function of tokens (n, ...) gives, in batches."""
    with autocast():
        parts = [function(part.float()) for part in tokens.split(BATCH)]
    return torch.cat(parts)


def remember(layer: CLIPEncoderLayer, tokens: Tensor) -> Tensor:
    """The tokens after a block's attention, and its MLP's output, (n, t, 2 d) float16 of tokens (n, t, d)."""

    def frozen(tokens: Tensor) -> Tensor:
        attended = tokens + layer.self_attn(layer.layer_norm1(tokens))[0]
        parts = [attended, layer.mlp(layer.layer_norm2(attended)).float()]
        return torch.cat(parts, dim=-1).half()

    return in_batches(frozen, tokens)


def run_frozen(
    work: Path,
    task: str,
    shape: str,
    blocks: int,
    tokens: Tensor,
    remembering: bool,
) -> Tensor:
    """What the upper `blocks` of a tower are given for tokens (n, t, width) of its first block, in float16.

    With `remembering`, their first block is a `RememberedLayer`.
    """
    layers = load_upper_tower(work, task, shape).vision_model.encoder.layers
    below = len(layers) - blocks

    def lower(tokens: Tensor) -> Tensor:
        for layer in layers[:below]:
            tokens = layer(tokens, None)
        return tokens.half()

    if below:
        tokens = in_batches(lower, tokens)
    return remember(layers[below], tokens) if remembering else tokens


def replace(
    layers: nn.ModuleList,
    index: int,
    layer: CLIPEncoderLayer,
) -> None:
    """Put another layer, with the same weights, in the place of one."""
    layer.load_state_dict(layers[index].state_dict())
    layers[index] = layer


def use_silu(mlp: CLIPMLP) -> None:
    """Let a frozen MLP compute x sigmoid(1.702 x) as silu(1.702 x) / 1.702, which is one operation and not three."""
    with torch.no_grad():
        for weight in mlp.fc1.parameters():
            weight.mul_(1.702)
        mlp.fc2.weight.div_(1.702)
    mlp.activation_fn = nn.SiLU()


def load_fast_tower(
    work: Path,
    task: str,
    shape: str,
    blocks: int,
    remembering: bool,
) -> nn.Module:
    """The upper blocks of a task's tower, which is given what `run_frozen` returns."""
    tower = load_upper_tower(work, task, shape, blocks)
    layers = tower.vision_model.encoder.layers
    replace(layers, -1, ClassTokenLayer(tower.config))
    if remembering:
        replace(layers, 0, RememberedLayer(tower.config))
        for layer in layers[1:]:
            use_silu(layer.mlp)
    return tower.eval()
