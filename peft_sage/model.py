# SPDX-License-Identifier: Apache-2.0
"""Where the adapter is injected, and how it is saved and loaded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from . import checkpoint, towers
from .classifier import CosineHead
from .config import SageConfig
from .descriptions import Descriptions, normalise_descriptions
from .guidance import encode_for, make_guidance
from .layer import MERGE_ERROR, SageLayer
from .registration import PREFIX
from .targeting import find_targets, is_excluded


class SageModel(BaseTuner):
    """A model whose vision tower holds semantic-guided adapters.

    Not made directly but by `get_peft_model(model, SageConfig(...))`, `PeftModel.from_pretrained`, or a transformers
    model's own `add_adapter` and `load_adapter`.

    Args:
        model (`torch.nn.Module`): The model to adapt; only its vision tower is touched.
        peft_config (`SageConfig`): The configuration.
        adapter_name (`str`): The adapter's name.
        *args: As PEFT's `BaseTuner` takes them.
        **kwargs: The same; `low_cpu_mem_usage=True` creates the adapter's weights on the meta device, to be loaded.

    Raises:
        ValueError: Before anything is changed, if the model has no vision tower that can be adapted, no module matches
            the targets, a target does not map (..., d) to (..., d), the guidance cannot be had, or another method's
            adapter in the model has the same name.
    """

    prefix = PREFIX
    tuner_layer_cls = SageLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Here and not in `inject_adapter`: PEFT replaces the other adapter's configuration before that.
        _check_name_is_free(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Inject an adapter. What may fail is done first, before the model or the configuration is changed.

        Args:
            model: The model to adapt.
            adapter_name: The adapter's name, whose configuration is in `peft_config`.
            autocast_adapter_dtype: Whether the weights of the adapter become float32 on a half-precision model.
            low_cpu_mem_usage: Create the adapter's weights on the meta device, to be loaded.
            state_dict: If given, its keys tell the adapted blocks, as in PEFT's `inject_adapter_in_model`.

        Raises:
            ValueError: If the name is a path, the model has no vision tower that can be adapted, no module matches the
                targets, `num_heads` does not divide `r`, a saved adapter does not fit the model, or the guidance
                cannot be had.
        """
        config: SageConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        if not adapter_name or adapter_name != os.path.basename(adapter_name) or adapter_name in (".", ".."):
            raise ValueError(
                f"`adapter_name` becomes the name of a folder, so it must be no path, got {adapter_name!r}."
            )
        self._targets = find_targets(model, config, state_dict)
        r = config.r or default_r(config.num_classes, len(self._targets))
        if r % config.num_heads:
            raise ValueError(f"`num_heads` must divide `r`={r} (from the number of classes), got {config.num_heads}.")
        if config.saved and config.source:
            checkpoint.check_source(model, config, self._targets, r)
            _check_base_model(model, config)
        _check_head(model, config)
        guidance = make_guidance(model, config, on_meta=low_cpu_mem_usage)

        config.r = r
        # The owner of the guidance is the first adapted block, see `SageLayer`.
        # In a plain dict, so that it is not registered here as well.
        self._owner = {} if guidance is None else {adapter_name: BufferDict({adapter_name: guidance}, persistent=True)}
        config.guidance_shape = [0, 0] if guidance is None else list(guidance.shape)
        # Before DistributedDataParallel overwrites it by that of rank 0.
        self._fingerprints = {**self.__dict__.get("_fingerprints", {}), adapter_name: _fingerprint(guidance)}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def set_guidance(self, guidance: torch.Tensor | Descriptions, adapter_name: str | None = None) -> None:
        """Give a trained adapter another set of classes, without training.

        Attention is over a set, so the number of classes may change. A head is not touched: see
        [`SageClassifier.set_class_embeddings`].

        Args:
            guidance: A float tensor (M, e) with the width e that the adapter was trained with, or class descriptions
                for the model's own text tower, in any shape that [`SageConfig`] takes.
            adapter_name: The adapter's name. Default: the active one.

        Raises:
            ValueError: If the adapter does not exist or has no guidance, or the tensor does not fit.
            TypeError: If `guidance` is neither.
        """
        adapter_name = self.active_adapters[0] if adapter_name is None else adapter_name
        config = self.peft_config.get(adapter_name)
        if not isinstance(config, SageConfig):
            known = [name for name, other in self.peft_config.items() if isinstance(other, SageConfig)]
            raise ValueError(f"`adapter_name` must be one of the Sage adapters {known}, got {adapter_name!r}.")
        num_rows, width = config.guidance_shape or (0, 0)
        if not num_rows:
            raise ValueError(f"The adapter {adapter_name!r} was made without guidance, so it cannot be given any.")
        if isinstance(guidance, torch.Tensor):
            names, texts = (config.class_names if config.num_classes == len(guidance) else None), None
        else:
            names, texts = normalise_descriptions(guidance)
        guidance = encode_for(self.model, config, guidance)
        if not len(guidance) or guidance.shape[1] != width:
            raise ValueError(
                f"`guidance` must have the shape (M, {width}) with at least one row, the width "
                f"that the adapter {adapter_name!r} was trained with, got {tuple(guidance.shape)}."
            )
        for layer in self.modules():
            if isinstance(layer, SageLayer) and adapter_name in layer.peft_sage_guidance:
                layer.peft_sage_guidance[adapter_name] = guidance.to(layer.peft_sage_guidance[adapter_name])
        config.class_names, config.class_descriptions = names, texts
        config.guidance, config.guidance_shape = None, list(guidance.shape)

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: SageConfig, model_config: dict[str, Any]
    ) -> SageConfig:
        # `target_modules=None` stays: it means the blocks of whatever class holds the tower at loading time.
        return peft_config

    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: SageConfig, key: str
    ) -> bool | _ExcludedModule:
        return _ExcludedModule() if is_excluded(peft_config, key) else key in self._targets

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SageConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target
        if not isinstance(layer, SageLayer):
            width, out_width = towers.block_widths(target)
            layer = SageLayer(target, width, towers.block_input_index(target), out_width)
        if current_key == self._targets[0] and adapter_name in self._owner:
            layer.peft_sage_guidance[adapter_name] = self._owner[adapter_name][adapter_name]
            self._owner[adapter_name] = layer.peft_sage_guidance
        scaling = peft_config.scaling
        if peft_config.learnable_scaling:
            scaling /= _mean_layer_scale(self.model, current_key)
        layer.update_layer(adapter_name, peft_config, self._owner.get(adapter_name), scaling)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version reads `child.weight`, which a block does not have. The layer moved itself.
        setattr(parent, child_name, new_module)
        if isinstance(new_module, SageLayer):
            parent.register_forward_pre_hook(_start_graph_at_checkpoint)
            return
        for key, hook in list(parent._forward_pre_hooks.items()):
            if hook is _start_graph_at_checkpoint:
                del parent._forward_pre_hooks[key]

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_ERROR)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check_processes_agree()
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - set(self.peft_config) - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        pre_forward = partial(_add_adapter_names, adapter_names=adapter_names)
        handles = [
            module.register_forward_pre_hook(pre_forward, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (SageLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_processes_agree(self) -> None:
        """Check once, at the first training step, that all processes were given the same guidance."""
        unchecked, self._fingerprints = self.__dict__.get("_fingerprints", {}), {}
        if not unchecked or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        of_rank: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_rank, unchecked)
        for name, fingerprint in unchecked.items():
            others = [rank for rank, other in enumerate(of_rank) if not _agree(other.get(name), fingerprint)]
            if others:
                raise ValueError(
                    f"The processes hold different guidance for the adapter {name!r}: that of rank "
                    f"{torch.distributed.get_rank()} differs from that of ranks {others}. Give all of them the same "
                    "class descriptions, in the same order."
                )

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        # PEFT collects every tuner layer, those of a LoRA beside Sage as well.
        state_dict = super()._get_adapter_state_dict(**kwargs)
        return {key: value for key, value in state_dict.items() if f".{cls.prefix}" in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SageConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        blocks = checkpoint.adapted_blocks(model, adapter_name)
        state_dict = checkpoint.align_block_names(state_dict, blocks)
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {key: value for key, value in model.state_dict().items() if _belongs_to(key, adapter_name)}
        checkpoint.check_complete(state_dict, expected, config)
        return state_dict


def default_r(num_classes: int, num_blocks: int) -> int:
    """Return the width of the bottleneck for a number of classes.

    2^max(0, floor(log2(C / (2 L)))) as in LIFT (arXiv 2309.10019), so that all adapters together have about half as
    many parameters as a linear head; but at least 8, as attention needs some width.

    Args:
        num_classes: C.
        num_blocks: L, the number of adapted blocks.

    Returns:
        A power of two, at least 8.
    """
    exponent = math.floor(math.log2(num_classes / (2 * num_blocks))) if num_classes else 0
    return max(8, 2 ** max(0, exponent))


def _check_name_is_free(model: nn.Module, adapter_name: str) -> None:
    # One name stands for one configuration, so two methods under it would be saved as one of them.
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, SageLayer):
            continue
        if adapter_name in module._all_available_adapter_names():
            raise ValueError(
                f"`adapter_name` {adapter_name!r} is that of another method's adapter in this model "
                f"({type(module).__name__}), and the two would be saved as one. Give this one a name of its own, "
                'such as `get_peft_model(..., adapter_name="sage")`.'
            )


def _check_head(model: nn.Module, config: SageConfig) -> None:
    head = next((module for module in model.modules() if isinstance(module, CosineHead)), None)
    if head is not None and config.class_descriptions is not None and config.num_classes < head.out_features:
        raise ValueError(
            f"`class_descriptions` has {config.num_classes} classes, but the model's head has {head.out_features}. "
            "Give one entry for each class of the head, or pass other guidance as a tensor (`guidance`)."
        )


def _fingerprint(guidance: torch.Tensor | None) -> torch.Tensor | None:
    """A sum of the rows (e,) that tells other rows and another order, but not the rounding of another device."""
    if guidance is None or guidance.is_meta:
        return None
    weights = torch.linspace(1, 2, len(guidance), device=guidance.device)
    return (weights @ guidance).cpu() / len(guidance) ** 0.5


def _agree(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-3, equal_nan=True)


def _check_base_model(model: nn.Module, config: SageConfig) -> None:
    trained_on, loaded_on = config.base_model_name_or_path, getattr(model, "name_or_path", None)
    # Only the last part: the same model may lie in a folder here and on the Hub there.
    if trained_on and loaded_on and os.path.basename(trained_on) != os.path.basename(loaded_on):
        warnings.warn(
            f"The adapter was trained on {trained_on!r} and is loaded on {loaded_on!r}. Load the former, unless both "
            "hold the same weights.",
            stacklevel=2,
        )


def _mean_layer_scale(model: nn.Module, name: str) -> float:
    scale = towers.layer_scale(model, name)
    mean = 1.0 if scale is None or scale.is_meta else scale.detach().abs().mean().item()
    return mean or 1.0


def _belongs_to(key: str, adapter_name: str) -> bool:
    """Whether a key of a state dict, such as `mlp.peft_sage_up.default.weight`, is one of an adapter."""
    return key.partition(f".{PREFIX}")[2].split(".")[1:2] == [adapter_name]


def _start_graph_at_checkpoint(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let gradients reach the adapters inside a block that is checkpointed in the reentrant mode.

    In that mode PyTorch builds no graph for a block whose inputs need no gradient, which is so for the first adapted
    block of a frozen tower: its adapter would not be trained, in silence.
    """
    if not (module.training and torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)):
        return None
    first, *others = args or (None,)
    if not isinstance(first, torch.Tensor) or first.requires_grad or not first.is_floating_point():
        return None
    return first.detach().requires_grad_(), *others


def _add_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
