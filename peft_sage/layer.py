# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the semantic-guided adapter."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._peft_compat import BaseTunerLayer, BufferDict
from .guidance import SharedGuidance
from .registration import PREFIX
from .towers.mlps import mlp_input, mlp_widths


class SageLayer(nn.Module, BaseTunerLayer):
    """The MLP of a block of a vision tower with semantic-guided adapters in parallel.

    With `x` (..., d) the MLP's input and `G` (M, e) the guidance:

        z = LN(x) W_down                                  (..., r)
        a = softmax(z (G W_k)^T / sqrt(r / h)) (G W_v)    (..., r), h heads
        y = MLP(x) + s * GELU(z + a) W_up                 (..., d)

    `z` is its own query: `W_down` already is the query projection. Every token attends to the rows of `G` on its own,
    so any number of leading dimensions in any order will do. Without guidance (M = 0) the layer is AdaptFormer's
    (arXiv 2205.13535) with a LayerNorm and GELU.

    Reference: arXiv 2507.12807 for class descriptions that reach the visual encoder through attention; the form of
    the layer is ours.
    """

    adapter_layer_names = tuple(
        f"{PREFIX}{part}" for part in ("norm", "down", "key", "value", "up", "scaling")
    )
    other_param_names = (
        "peft_sage_dropout",
        "peft_sage_guidance",
        "shared_guidance",
        "fixed_scaling",
        "num_heads",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = mlp_widths(base_layer)
        self.input_index, self.input_name = mlp_input(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.peft_sage_scaling = nn.ParameterDict()
        self.peft_sage_dropout = nn.ModuleDict()
        self.peft_sage_guidance = BufferDict(persistent=True)
        self.fixed_scaling: dict[str, float] = {}
        self.num_heads: dict[str, int] = {}
        self.shared_guidance: dict[str, SharedGuidance] = {}

    def update_layer(
        self,
        adapter_name: str,
        config: Any,
        guidance: SharedGuidance | None,
        scaling: float,
    ) -> None:
        """Add an adapter, by a [`SageConfig`] with `r` set; `scaling` is where a learnable one starts."""
        self.num_heads[adapter_name] = config.num_heads
        self.peft_sage_norm[adapter_name] = nn.LayerNorm(self.in_features)
        self.peft_sage_down[adapter_name] = down = nn.Linear(self.in_features, config.r)
        self.peft_sage_up[adapter_name] = up = nn.Linear(config.r, self.out_features)
        nn.init.zeros_(down.bias)
        for parameter in up.parameters() if config.init_weights else ():
            nn.init.zeros_(parameter)
        self.peft_sage_dropout[adapter_name] = nn.Dropout(config.dropout)
        if config.learnable_scaling:
            self.peft_sage_scaling[adapter_name] = nn.Parameter(
                torch.full((1,), scaling)
            )
        else:
            self.fixed_scaling[adapter_name] = scaling
        if guidance is not None:
            self.shared_guidance[adapter_name] = guidance
            guidance.keep_in(self.peft_sage_guidance)
            for projections in (self.peft_sage_key, self.peft_sage_value):
                projections[adapter_name] = projection = nn.Linear(
                    guidance.rows.shape[1], config.r, bias=False
                )
                # A unit row of the guidance becomes a key and a value with components of unit variance.
                nn.init.normal_(projection.weight)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.saved:
            self._allocate(adapter_name, torch.device("meta"))
        self.set_adapter(self.active_adapters)

    def is_loaded(self, adapter_name: str) -> bool:
        """Whether an adapter has values. Those of a saved one are on the meta device until they are loaded."""
        return not self.peft_sage_down[adapter_name].weight.is_meta

    def expect_weights(self, adapter_name: str) -> None:
        """Make room for the weights of an adapter that are about to be loaded, where the base layer is."""
        if not self.is_loaded(adapter_name):
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
            self._allocate(adapter_name, device or torch.device("cpu"))

    def _allocate(self, adapter_name: str, device: torch.device) -> None:
        for part in (*self.adapter_layer_names, "peft_sage_guidance"):
            container = getattr(self, part)
            if adapter_name not in container:
                continue
            item = container[adapter_name]
            if isinstance(item, nn.Module):
                item.to_empty(device=device)
            elif isinstance(item, nn.Parameter):
                empty = torch.empty_like(item, device=device)
                container[adapter_name] = nn.Parameter(empty, item.requires_grad)
            else:
                container[adapter_name] = torch.empty_like(item, device=device)

    def forward(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the MLP and add the active adapters' updates, in the MLP's precision.

        `adapter_names`, given by PEFT, has the adapter of each sample of a mixed batch, `"__base__"` for none.

        Raises:
            ValueError: `adapter_names` does not have one entry per sample.
            RuntimeError: The weights of an adapter are still to be loaded.
        """
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return result
        # The tokens (..., d) among the arguments of the MLP.
        x = (
            args[self.input_index]
            if self.input_index < len(args)
            else kwargs[self.input_name]
        )
        if adapter_names is not None:
            return self._mixed_batch_forward(x, result, adapter_names)
        for name in self.active_adapters:
            if name in self.peft_sage_down:
                result = result + self.update(x, name).to(result.dtype)
        return result

    def update(self, x: Tensor, adapter_name: str) -> Tensor:
        """Return what an adapter adds to the output of the MLP for its input (..., d), in the adapter's precision."""
        norm = self.peft_sage_norm[adapter_name]
        down = self.peft_sage_down[adapter_name]
        self._check_loaded(down.weight, x, adapter_name)
        z = down(norm(self._cast_input_dtype(x, down.weight.dtype)))
        if adapter_name in self.shared_guidance:
            z = z + self.attend(z, adapter_name)
        z = self.peft_sage_dropout[adapter_name](F.gelu(z))
        update = self.peft_sage_up[adapter_name](z)
        if adapter_name in self.fixed_scaling:
            return update * self.fixed_scaling[adapter_name]
        return update * self.peft_sage_scaling[adapter_name]

    def attend(self, z: Tensor, adapter_name: str) -> Tensor:
        """Return the attention (..., r) of queries (..., r) to the guidance; the weights are never kept."""
        # Blocks may be on several devices, and in other precisions than the rows.
        rows = self.shared_guidance[adapter_name].rows
        self._check_loaded(rows, z, adapter_name)
        guidance = rows.to(z)
        keys = self.peft_sage_key[adapter_name](guidance)
        values = self.peft_sage_value[adapter_name](guidance)
        heads = self.num_heads[adapter_name]
        # (1, h, n, r / h): the tokens of all images share their keys and values.
        q, k, v = (
            t.reshape(1, -1, heads, t.shape[-1] // heads).transpose(1, 2)
            for t in (z, keys, values)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(z.shape)

    @staticmethod
    def _check_loaded(weights: Tensor, x: Tensor, adapter_name: str) -> None:
        # Weights that are still to be loaded are on the meta device.
        if weights.is_meta and not x.is_meta:
            raise RuntimeError(
                f"The weights of the adapter {adapter_name!r} were not loaded."
            )

    def _mixed_batch_forward(
        self, x: Tensor, result: Tensor, adapter_names: list[str]
    ) -> Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"`adapter_names` must have one entry per sample, {len(x)}, got {len(adapter_names)}."
            )
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.peft_sage_down:
                index = torch.tensor(
                    [i for i, other in enumerate(adapter_names) if other == name],
                    device=x.device,
                )
                result[index] += self.update(x[index], name).to(result.dtype)
        return result

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[Any, Any]:
        # An MLP has no `weight` of its own; quantised ones hold integers next to the floats that tell the precision.
        tensors = [*base_layer.parameters(), *base_layer.buffers()]
        dtypes = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        # Weights that were loaded must not follow a base that is still to be loaded.
        device = tensors[0].device if tensors and not tensors[0].is_meta else None
        return device, next(dtypes, None)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if adapter_name in self.peft_sage_down and not self.is_loaded(adapter_name):
            return
        kept = dict(self.peft_sage_guidance.items())
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        # The guidance is data and keeps its precision: only the device follows.
        self.peft_sage_guidance.update(
            {k: rows.to(self.peft_sage_guidance[k].device) for k, rows in kept.items()}
        )

    def __getattr__(self, name: str) -> Any:
        # Some models look into a block from outside, as open_clip does at `mlp.c_fc.weight`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def is_of_adapter(key: str, adapter_name: str) -> bool:
    """Whether a key of a state dict, such as `mlp.peft_sage_up.default.weight`, is one of an adapter."""
    return key.partition(f".{PREFIX}")[2].split(".")[1:2] == [adapter_name]
