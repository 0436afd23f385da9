# SPDX-License-Identifier: Apache-2.0
"""Where the adapter is injected, what it attends to, and how it is saved and loaded."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from . import weights
from ._peft_compat import (
    DUMMY_TARGET_MODULES,
    AuxiliaryTrainingWrapper,
    BaseTuner,
    BaseTunerLayer,
    ModulesToSaveWrapper,
)
from .config import SageConfig
from .guidance import SharedGuidance, make_guidance, own_embeddings, set_guidance
from .layer import SageLayer, is_of_adapter
from .registration import PREFIX
from .targets import find_targets
from .towers import mlps


class SageModel(BaseTuner):
    """A model whose vision tower holds semantic-guided adapters.

    Not made directly but by `get_peft_model(model, SageConfig(...))`, `PeftModel.from_pretrained`, or a transformers
    model's own `add_adapter` and `load_adapter`.

    Raises:
        ValueError: Before anything is changed, if the model has no vision tower that can be adapted, no module matches
            the targets, a target does not map (..., d) to (..., d), the guidance cannot be had, or the adapter's name
            cannot be used.
    """

    prefix = PREFIX
    tuner_layer_cls = SageLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # Before PEFT enters the new configuration where another adapter of this name may have its own.
        if isinstance(model, PeftModel):
            raise ValueError(
                "`model` must not be a PeftModel: add an adapter by `model.add_adapter(name, config)`, replace it on "
                "the result of `model.unload()`, or combine it with another method's on `model.get_base_model()`."
            )
        for module in model.modules():
            if isinstance(module, SageLayer) or not isinstance(module, BaseTunerLayer):
                continue
            if adapter_name in module._all_available_adapter_names():
                raise ValueError(
                    f"`adapter_name` must not be that of another method's adapter, got {adapter_name!r}."
                )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Inject an adapter, as PEFT's own method does. What may fail is done first, before the model is changed."""
        config: Any = self.peft_config[adapter_name]
        # What is filled in must not stay on the user's object. When it loads, PEFT wants the object itself.
        config = config if config.inference_mode else copy.copy(config)
        config.revision = config.revision or getattr(model, "base_revision", None)
        head = own_embeddings(model)
        if head is not None and config.modules_to_save is None and not config.saved:
            config.modules_to_save = ["class_head"]
        _check_names(model, adapter_name, config)
        targets = find_targets(model, config, kwargs.get("state_dict"))
        rows = _fill_in(config, model, len(targets))

        # PEFT finds the same modules by exactly their names. Without any, only `modules_to_save` are trained.
        plan: Any = copy.copy(config)
        plan.target_modules = "|".join(map(re.escape, targets)) or DUMMY_TARGET_MODULES
        plan.exclude_modules = plan.layers_to_transform = plan.layers_pattern = None
        plan.shared_guidance = None
        if rows is not None:
            plan.shared_guidance = SharedGuidance(adapter_name, rows)
        self.peft_config[adapter_name] = plan
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self.peft_config[adapter_name] = config

    def unload(self) -> nn.Module:
        """Remove all adapters and return the base model, with its own head: a trained one needs its adapter."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                self.model.set_submodule(name, module.original_module)
        return super().unload()

    def set_guidance(
        self, guidance: Any = None, adapter_name: str | None = None
    ) -> None:
        """Give a trained adapter another set of classes, without training; see [`set_guidance`].

        Args:
            guidance: A float tensor (M, e) with the width e of the training; class descriptions for the model's own
                text tower; or `None` for the `text_embeds` of a [`SageClassifier`].
            adapter_name: Default: the active one.
        """
        set_guidance(
            self.model,
            guidance,
            self.active_adapters[0] if adapter_name is None else adapter_name,
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        # `target_modules=None` stays: it means the blocks of whatever class holds the tower at loading time.
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
    ) -> None:
        layer = target if isinstance(target, SageLayer) else SageLayer(target)
        scaling = float(config.scaling)
        scale = mlps.layer_scale(self.model, current_key)
        if config.learnable_scaling and scale is not None and not scale.is_meta:
            scaling /= scale.detach().abs().mean().item() or 1.0
        layer.update_layer(adapter_name, config, config.shared_guidance, scaling)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self,
        parent: nn.Module,
        child_name: str,
        new_module: nn.Module,
        child: nn.Module,
    ) -> None:
        # PEFT's own version reads `child.weight`, which an MLP does not have. The layer moved itself.
        setattr(parent, child_name, new_module)
        for key, hook in list(parent._forward_pre_hooks.items()):
            if hook is _start_graph_at_checkpoint:
                del parent._forward_pre_hooks[key]
        if isinstance(new_module, SageLayer):
            parent.register_forward_pre_hook(_start_graph_at_checkpoint)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "Sage adapters are not linear, so they cannot be merged; use `unload()`."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is not None and self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode."
            )
        if unknown := set(names or ()) - set(self.peft_config) - {"__base__"}:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )

        def pass_names(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "adapter_names": names}

        handles = []
        for module in () if names is None else self.modules():
            if isinstance(module, (SageLayer, AuxiliaryTrainingWrapper)):
                handle = module.register_forward_pre_hook(pass_names, with_kwargs=True)
                handles.append(handle)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(cls, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        # PEFT collects every tuner layer, also those of a LoRA next to Sage.
        state_dict = super()._get_adapter_state_dict(**kwargs)
        return {
            key: value for key, value in state_dict.items() if f".{cls.prefix}" in key
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SageLayer) and adapter_name in module.peft_sage_down
        }
        try:
            state_dict = weights.align_names(state_dict, layers)
            state_dict = super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, state_dict
            )
            copied = f".modules_to_save.{adapter_name}."
            expected = {
                key: value
                for key, value in model.state_dict().items()
                if is_of_adapter(key, adapter_name)
                or (copied in key and not key.endswith("_extra_state"))
            }
            weights.check_complete(state_dict, expected)
        except ValueError:
            # What was injected for these weights is removed again.
            if isinstance(model, PeftModel) and any(
                not layer.is_loaded(adapter_name) for layer in layers.values()
            ):
                if len(model.peft_config) > 1:
                    model.delete_adapter(adapter_name)
                else:
                    model.base_model.unload()  # type: ignore[operator]
            raise
        for layer in layers.values():
            layer.expect_weights(adapter_name)
        return state_dict


def _fill_in(config: SageConfig, model: nn.Module, num_targets: int) -> Tensor | None:
    """Fill in what depends on the model, and return the rows of the guidance: zeros if they are still to be loaded."""
    head = own_embeddings(model)
    classes = 0 if head is None else len(head)
    if config.class_descriptions is not None and config.num_classes < classes:
        raise ValueError(
            f"`class_descriptions` has {config.num_classes} classes, but the head has {classes}."
        )
    if not (config.num_classes or config.saved):
        config.class_names = getattr(model, "class_names", None)
    r = config.r or default_r(config.num_classes or classes, max(1, num_targets))
    config.r = math.ceil(r / config.num_heads) * config.num_heads
    if config.saved:
        shape = config.guidance_shape
        return torch.zeros(shape) if shape and shape[0] else None
    given = config.guidance
    source = config.class_descriptions if given is None else given
    rows = make_guidance(model, config, source)
    config.guidance_shape = [0, 0] if rows is None else list(rows.shape)
    if rows is None and config.guidance_rows and num_targets:
        warnings.warn(
            "The adapter has no guidance, so it is a plain AdaptFormer: give `class_descriptions` or `guidance`, or "
            "wrap a SageClassifier. If this is meant, set `guidance_rows=0`.",
            stacklevel=2,
        )
    return rows


def default_r(num_classes: int, num_mlps: int) -> int:
    """Return the width of the bottleneck for C classes and L adapted MLPs, 2^max(0, floor(log2(C / (2 L)))).

    All adapters together then have about half as many parameters as a linear head (LIFT, arXiv 2309.10019). It is at
    least 8, as attention needs some width.
    """
    return max(8, 2 ** math.floor(math.log2(max(1, num_classes / (2 * num_mlps)))))


def _check_names(model: nn.Module, adapter_name: str, config: SageConfig) -> None:
    """Check that the adapter's parts can have its name, and that `modules_to_save` means parts of the model."""
    if (
        not adapter_name
        or {".", "/", "\\"} & set(adapter_name)
        or hasattr(nn.ModuleDict, adapter_name)
    ):
        raise ValueError(
            f"`adapter_name` must be able to name a module and a folder, got {adapter_name!r}."
        )
    modules = [name for name, _ in model.named_modules()]
    # PEFT matches by ending, and the parts of the adapter are there by then.
    parts = (*SageLayer.adapter_layer_names, "peft_sage_dropout", "peft_sage_guidance")
    for wanted in config.modules_to_save or ():
        for part in (*parts, "base_layer", adapter_name):
            if f".{part}".endswith(wanted):
                raise ValueError(
                    f"`modules_to_save` must not match the adapter's own parts, but {wanted!r} matches {part!r}."
                )
        if any(name.endswith(wanted) for name in modules):
            continue
        if not config.saved:
            raise ValueError(
                f"`modules_to_save` must match modules of the model, but {wanted!r} matches none."
            )
        warnings.warn(
            f"The adapter holds a trained {wanted!r}, which the model lacks: it is not loaded.",
            stacklevel=2,
        )


def _start_graph_at_checkpoint(
    module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Let gradients reach the adapters inside a block that is checkpointed in the reentrant mode.

    In that mode PyTorch builds no graph for a block whose inputs need no gradient, which is so for the first adapted
    block of a frozen tower: its adapter would not be trained, in silence.
    """
    first = args[0] if args else None
    checkpointed = getattr(module, "gradient_checkpointing", False)
    building = checkpointed and module.training and torch.is_grad_enabled()
    if not building or not isinstance(first, Tensor) or first.requires_grad:
        return None
    return (first.detach().requires_grad_(), *args[1:])
