# SPDX-License-Identifier: Apache-2.0
"""An image classifier that starts as zero-shot CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from . import towers
from .validation import check_embeddings


class CosineHead(nn.Linear):
    """Bias-free cosine classifier `scale * cos(x, w_k)`, the head of LIFT (arXiv 2309.10019).

    An `nn.Linear`, because PEFT mixes adapters within a batch only for modules of the kinds that it knows.

    Args:
        text_embeds: (K, e), the rows it starts from. They stay beside it as a buffer.
        scale: Factor of the cosines; fixed.
    """

    text_embeds: torch.Tensor

    def __init__(self, text_embeds: torch.Tensor, scale: float = 25.0) -> None:
        super().__init__(text_embeds.shape[1], text_embeds.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(text_embeds.detach().clone())
        self.register_buffer("text_embeds", text_embeds.detach().clone())
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits (..., K), between -scale and scale, of features (..., e) of any length."""
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


@dataclass
class SageClassifierOutput(ImageClassifierOutput):
    """What a [`SageClassifier`] returns; in evaluation only `logits` and, with labels, `loss`.

    Args:
        loss: Cross-entropy with the labels, if given.
        logits: (B, K).
        image_embeds: (B, e), of unit length.
        class_embeds: (K, e), the rows of the head, of unit length.
        text_embeds: (K, e), the frozen text embeddings of the classes, of unit length.
        base_image_embeds: (B, e), what the batch brought of the frozen tower.
        logit_scale: Factor of the cosines.
    """

    image_embeds: torch.Tensor | None = None
    class_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    base_image_embeds: torch.Tensor | None = None
    logit_scale: float | None = None


@dataclass
class _ClassifierConfig:
    """Not the model's own configuration: PEFT would take the classifier for a transformers model by its type."""

    _name_or_path: str
    use_cache: bool = False


class SageClassifier(nn.Module):
    """The image tower of a CLIP-style model with a cosine head that starts from text embeddings.

    Untrained, it is zero-shot CLIP.

    Args:
        clip: A model with an image tower and, where it has one, a projection to the space of the texts.
        text_embeds: One text embedding per class (K, e), as from [`encode_class_descriptions`]; or the number of
            classes K, for a head that is to be loaded or trained from a random start.
        scale: Factor of the cosines. It does not change the predictions before training, but the loss.

    Raises:
        ValueError: If the embeddings are not of shape (K, e) or not finite, or a number is not positive.
        TypeError: If they are not a floating-point tensor or a number of classes.
    """

    main_input_name = "pixel_values"

    model: Any
    class_head: Any

    def __init__(self, clip: nn.Module, text_embeds: torch.Tensor | int, scale: float = 25.0) -> None:
        super().__init__()
        if isinstance(text_embeds, int):
            if text_embeds < 1:
                raise ValueError(f"`text_embeds` must be at least one class, got {text_embeds!r}.")
            text_embeds = torch.randn(text_embeds, _embedding_width(clip))
        check_embeddings(text_embeds, "text_embeds")
        if not scale > 0:
            raise ValueError(f"`scale` must be positive, got {scale!r}.")
        self.model = clip
        rows = F.normalize(text_embeds.float(), dim=-1).to(next(clip.parameters()).device)
        self.class_head = CosineHead(rows, scale)
        # Where PEFT looks for the base model's name, and where Trainer does.
        self.name_or_path = getattr(clip, "name_or_path", "")
        self.config = _ClassifierConfig(self.name_or_path)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        base_image_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images (B, C, H, W) from the model's image processor.
            labels: Class indices (B,), or probabilities (B, K), for a cross-entropy loss.
            base_image_embeds: (B, e) embeddings of the same images by the frozen tower, which are handed through.
            **kwargs: Passed to the image tower.

        Raises:
            RuntimeError: Under `nn.DataParallel`, which would concatenate what belongs to the classes.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "`nn.DataParallel` cannot train a SageClassifier; start one process per device: accelerate launch ..."
            )
        head = self._active_head
        features = towers.encode_image(self.model, pixel_values, **kwargs)
        logits = self.class_head(features.to(head.weight.dtype))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if not self.training:
            return SageClassifierOutput(loss=loss, logits=logits)
        return SageClassifierOutput(
            loss=loss,
            logits=logits,
            image_embeds=F.normalize(features.to(head.weight.dtype), dim=-1),
            class_embeds=F.normalize(head.weight, dim=-1),
            text_embeds=head.text_embeds,
            base_image_embeds=base_image_embeds,
            logit_scale=head.scale,
        )

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the tower's activations in the backward pass; Trainer calls it.

        Args:
            *args: As for transformers' models.
            **kwargs: As for transformers' models.
        """
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Do the same under the name that it has in older versions of transformers.

        Args:
            *args: As for transformers' models.
            **kwargs: As for transformers' models.
        """
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def set_class_embeddings(self, text_embeds: torch.Tensor) -> None:
        """Replace the classes of the active head: open-vocabulary use, without training.

        Args:
            text_embeds: One text embedding a class (K, e); K may differ from before.

        Raises:
            ValueError: If the embeddings are not of shape (K, e) with the head's e, or not finite.
            TypeError: If they are not a floating-point tensor.
        """
        check_embeddings(text_embeds, "text_embeds")
        head = self._active_head
        if text_embeds.shape[1] != head.weight.shape[1]:
            raise ValueError(
                f"`text_embeds` must have the shape (K, {head.weight.shape[1]}), got {tuple(text_embeds.shape)}."
            )
        weight = F.normalize(text_embeds.detach().float(), dim=-1).to(head.weight)
        head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)
        head.text_embeds = weight.clone()
        head.out_features = len(weight)

    @property
    def _active_head(self) -> CosineHead:
        if isinstance(self.class_head, ModulesToSaveWrapper) and self.class_head.active_adapters:
            return self.class_head.modules_to_save[self.class_head.active_adapters[0]]  # type: ignore[return-value]
        return self.class_head


@torch.no_grad()
def _embedding_width(clip: nn.Module) -> int:
    """Width of the image embedding, from a blank image: no field of the configurations tells it reliably."""
    config = getattr(clip, "config", None)
    config = getattr(config, "vision_config", config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if not isinstance(size, int):
        raise ValueError("`text_embeds` cannot be a number for this model: its image size is not known.")
    parameter = next(clip.parameters())
    blank = torch.zeros(1, channels, size, size, dtype=parameter.dtype, device=parameter.device)
    return towers.encode_image(clip, blank).shape[-1]
