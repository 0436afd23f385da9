# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the semantic-guided adapter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import SageConfig
from .key_value_cache import KeyValueCache, project


class SageLayer(nn.Module, BaseTunerLayer):
    """A block of a vision tower with semantic-guided adapters in parallel.

    With `x` (..., d) the block's input and `G` (M, e) the guidance, one row a class:

        z = LN(x) W_down                                  (..., r)
        a = softmax(z (G W_k)^T / sqrt(r / h)) (G W_v)    (..., r), h heads
        y = block(x) + s * GELU(z + a) W_up               (..., d)

    `z` is its own query: `W_down` already is the query projection. Every token attends to the rows of `G` on its own,
    so any number of leading dimensions in any order will do. Without guidance (M = 0) the layer is AdaptFormer's.

    All blocks share one guidance tensor. It is a buffer of the first adapted block, its owner, so that it is saved
    once; the other blocks hold a reference to the owner's `BufferDict`, never to the tensor, which loading may
    replace.

    Evaluation without gradients on the CPU keeps the keys `G W_k` and the values `G W_v` from batch to batch
    (`KeyValueCache`); results are the same, bit for bit.

    Args:
        base_layer: The block, a module from (..., d) to (..., d).
        width: d.
        input_index: The positional argument of the block's forward that holds `x`.
        out_width: Width of the block's output, where it is not that of its input. Default: `width`.

    Reference: arXiv 2507.12807 for class descriptions that reach the visual encoder through attention. The form of the
    layer is ours; without guidance it is AdaptFormer (arXiv 2205.13535) with a LayerNorm and GELU.
    """

    adapter_layer_names = (
        "peft_sage_norm",
        "peft_sage_down",
        "peft_sage_key",
        "peft_sage_value",
        "peft_sage_up",
        "peft_sage_scaling",
    )

    def __init__(self, base_layer: nn.Module, width: int, input_index: int = 0, out_width: int | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = width, out_width or width
        self.input_index = input_index
        self.peft_sage_norm = nn.ModuleDict()
        self.peft_sage_down = nn.ModuleDict()
        self.peft_sage_key = nn.ModuleDict()
        self.peft_sage_value = nn.ModuleDict()
        self.peft_sage_up = nn.ModuleDict()
        self.peft_sage_scaling = nn.ParameterDict()
        self.peft_sage_dropout = nn.ModuleDict()
        self.peft_sage_guidance = BufferDict(persistent=True)
        # No shape tells the number of heads, so it is saved: a file and a configuration must agree on it.
        self.peft_sage_num_heads = BufferDict(persistent=True)
        self.fixed_scaling: dict[str, float] = {}
        self.num_heads: dict[str, int] = {}
        self._awaits_loading: set[str] = set()
        # A plain dict, so that what other layers own is not registered here as well.
        self._guidance: dict[str, BufferDict] = {}
        self._cache = KeyValueCache()

    def update_layer(
        self, adapter_name: str, config: SageConfig, guidance: BufferDict | None, scaling: float = 1.0
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            config: Its configuration, with `r` set.
            guidance: The owner's dictionary that holds this adapter's guidance (M, e); `None` for no guidance.
            scaling: Where a learnable scaling starts.
        """
        width: int = self.in_features
        r: Any = config.r
        self.num_heads[adapter_name] = config.num_heads
        self.peft_sage_norm[adapter_name] = nn.LayerNorm(width)
        self.peft_sage_down[adapter_name] = nn.Linear(width, r)
        self.peft_sage_up[adapter_name] = nn.Linear(r, self.out_features)
        self.peft_sage_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        if config.learnable_scaling:
            self.peft_sage_scaling[adapter_name] = nn.Parameter(torch.full((1,), scaling))
        else:
            self.fixed_scaling[adapter_name] = scaling
        if guidance is not None:
            dim = guidance[adapter_name].shape[1]
            self._guidance[adapter_name] = guidance
            if adapter_name in self.peft_sage_guidance:
                self.peft_sage_num_heads[adapter_name] = torch.tensor(config.num_heads)
            self.peft_sage_key[adapter_name] = nn.Linear(dim, r, bias=False)
            self.peft_sage_value[adapter_name] = nn.Linear(dim, r, bias=False)
        if config.saved:
            self._blank_adapter_parameters(adapter_name)
        else:
            self.reset_adapter_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_adapter_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Initialise the projections.

        Args:
            adapter_name: The adapter's name.
            init_weights: Whether the up-projection is zero, which makes the adapter the identity.
        """
        down: Any = self.peft_sage_down[adapter_name]
        up: Any = self.peft_sage_up[adapter_name]
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(down.bias)
        if init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        if adapter_name in self.peft_sage_key:
            # A unit row of the guidance becomes a key and a value with components of unit variance.
            for projection in (self.peft_sage_key, self.peft_sage_value):
                nn.init.normal_(projection[adapter_name].weight)  # type: ignore[arg-type]

    def guidance(self, adapter_name: str) -> torch.Tensor | None:
        """Return the guidance that an adapter attends to.

        Args:
            adapter_name: The adapter's name.

        Returns:
            The tensor (M, e) itself, with L2-normalised rows; `None` without guidance.
        """
        source = self._guidance.get(adapter_name)
        return None if source is None else source[adapter_name]

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """Run the block and add the active adapters' updates.

        Args:
            *args: The block's arguments.
            adapter_names: The adapter of each sample of a mixed batch, `"__base__"` for none; samples along the first
                dimension. Given by PEFT.
            **kwargs: The block's keyword arguments.

        Returns:
            The block's output (..., d) with the updates added, in the block's precision.

        Raises:
            ValueError: If `adapter_names` does not have one entry a sample.
            RuntimeError: If an adapter's weights were to be loaded and were not, or hold NaN.
        """
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return result
        x = args[self.input_index]
        if adapter_names is not None:
            return self._mixed_batch_forward(x, result, adapter_names)
        for name in self.active_adapters:
            if name in self.peft_sage_down:
                self._check_loaded(name)
                result = result + self.update(x, name).to(result.dtype)
        return result

    def update(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Return what an adapter adds to the block's output.

        Args:
            x: The block's input (..., d).
            adapter_name: The adapter's name.

        Returns:
            A tensor (..., d) in the adapter's precision.
        """
        z = self._bottleneck(x, adapter_name)
        if adapter_name in self._guidance:
            z = z + self.attend(z, adapter_name)
        update = self.peft_sage_up[adapter_name](self.peft_sage_dropout[adapter_name](F.gelu(z)))
        if adapter_name in self.peft_sage_scaling:
            return update * self.peft_sage_scaling[adapter_name]
        return update * self.fixed_scaling[adapter_name]

    def attend(self, z: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Return the attention of queries to the guidance.

        Args:
            z: Queries (..., r).
            adapter_name: The adapter's name.

        Returns:
            A tensor (..., r). The matrix of all weights is never kept (`scaled_dot_product_attention`).
        """
        keys, values = (self._split_heads(rows, adapter_name) for rows in self._keys_and_values(adapter_name))
        queries = self._split_heads(z, adapter_name)
        return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(z.shape)

    def attention_weights(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """Return how much each token attends to each row of the guidance.

        Args:
            x: The block's input (..., d).
            adapter_name: The adapter's name.

        Returns:
            The softmax of the layer's equation (h, ..., M), for each head; sums to 1 over the last dimension.

        Raises:
            ValueError: If there is no such adapter, or it has no guidance.
        """
        if adapter_name not in self._guidance:
            raise ValueError(
                f"`adapter_name` must be one of the adapters with guidance, {list(self._guidance)}, got "
                f"{adapter_name!r}."
            )
        z = self._bottleneck(x, adapter_name)
        # Attention to one-hot values is the weights themselves, so that there is one formula for both.
        one_hot = torch.eye(len(self._guidance[adapter_name][adapter_name]), dtype=z.dtype, device=z.device)
        values = one_hot.expand(1, self.num_heads[adapter_name], *one_hot.shape)
        queries, keys = (self._split_heads(t, adapter_name) for t in (z, self._keys_and_values(adapter_name)[0]))
        return F.scaled_dot_product_attention(queries, keys, values)[0].reshape(-1, *x.shape[:-1], len(one_hot))

    def _bottleneck(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        down: Any = self.peft_sage_down[adapter_name]
        x = self._cast_input_dtype(x, down.weight.dtype)
        return down(self.peft_sage_norm[adapter_name](x))

    def _keys_and_values(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        guidance = self._guidance[adapter_name][adapter_name]
        key: Any = self.peft_sage_key[adapter_name]
        value: Any = self.peft_sage_value[adapter_name]
        if self.training or torch.compiler.is_compiling():
            return project(guidance, key, value)
        return self._cache.project(adapter_name, guidance, key, value)

    def _split_heads(self, t: torch.Tensor, adapter_name: str) -> torch.Tensor:
        # The tokens of all images share their keys and values: one sequence of queries, a batch of one.
        heads = self.num_heads[adapter_name]
        return t.reshape(1, -1, heads, t.shape[-1] // heads).transpose(1, 2)

    def _mixed_batch_forward(self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"`adapter_names` must have one entry for each of the {len(x)} samples that reach the block along its "
                f"first dimension, got {len(adapter_names)}."
            )
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.peft_sage_down:
                self._check_loaded(name)
                index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result[index] += self.update(x[index], name).to(result.dtype)
        return result

    def train(self, mode: bool = True) -> SageLayer:
        """Set training or evaluation mode. Either drops the keys and values that evaluation keeps.

        Args:
            mode: Whether to train.

        Returns:
            The layer.
        """
        self._cache.clear()
        return super().train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer, with its guidance where this layer owns it.

        Args:
            adapter_name: The adapter's name; nothing happens if there is none of that name.
        """
        super().delete_adapter(adapter_name)
        for attributes in (self._guidance, self.fixed_scaling, self.num_heads):
            attributes.pop(adapter_name, None)
        self._awaits_loading.discard(adapter_name)
        self._cache.clear()
        for entries in (self.peft_sage_guidance, self.peft_sage_num_heads, self.peft_sage_dropout):
            if adapter_name in entries:
                del entries[adapter_name]

    def _blank_adapter_parameters(self, adapter_name: str) -> None:
        # Weights that are to come from a file, but do not, must not pass for weights: transformers only warns.
        for parameter in self._adapter_tensors(adapter_name):
            nn.init.constant_(parameter, torch.nan)
        self._awaits_loading.add(adapter_name)

    def _check_loaded(self, adapter_name: str) -> None:
        if adapter_name not in self._awaits_loading or torch.compiler.is_compiling():
            return
        if not all(torch.isfinite(tensor).all() for tensor in self._adapter_tensors(adapter_name)):
            raise RuntimeError(
                f"The weights of the adapter {adapter_name!r} were not loaded, or hold NaN. Its configuration is "
                "that of a saved adapter: load that with `PeftModel.from_pretrained`, or set "
                "`config.guidance_shape = None` before the model is wrapped, to start anew."
            )
        self._awaits_loading.discard(adapter_name)

    def _adapter_tensors(self, adapter_name: str) -> list[torch.Tensor]:
        modules = [getattr(self, name) for name in self.adapter_layer_names]
        entries = [module[adapter_name] for module in modules if adapter_name in module]
        tensors = [t for entry in entries for t in (entry.parameters() if isinstance(entry, nn.Module) else [entry])]
        guidance = self.guidance(adapter_name)
        return tensors if guidance is None else [*tensors, guidance]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the adapter is not linear in the block's input.

        Args:
            safe_merge: Unused.
            adapter_names: Unused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(MERGE_ERROR)

    def unmerge(self) -> None:
        """Refuse: nothing was merged.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(MERGE_ERROR)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # A block has no `weight` of its own; quantised ones hold integers beside the floats that tell the precision.
        parameters = [*base_layer.parameters(), *base_layer.buffers()]
        if not parameters:
            return None, None
        floating = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
        device = parameters[0].device
        # Weights that were loaded must not follow a base that is still to be loaded.
        return None if device.type == "meta" else device, floating[0] if floating else None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        # The guidance is data and keeps its precision: only the device follows.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is not None and adapter_name in self.peft_sage_guidance:
            guidance = self.peft_sage_guidance[adapter_name]
            if not guidance.is_meta:
                self.peft_sage_guidance[adapter_name] = guidance.to(device)

    def __getattr__(self, name: str) -> Any:
        # Some models look into a block from outside, as open_clip does at `mlp.c_fc.weight`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


MERGE_ERROR = (
    "Sage adapters cannot be merged into the base model, because they are not linear. Use `unload()` to get the base "
    "model back without the adapter, or keep the adapter in place."
)
