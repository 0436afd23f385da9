# SPDX-License-Identifier: Apache-2.0
"""The cosine head of a classifier: its rows, and what has to travel with them."""

import importlib
import json
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Linear):
    """Bias-free cosine classifier `scale * cos(x, w_k)`, the head of LIFT (arXiv 2309.10019).

    An `nn.Linear`, because PEFT mixes adapters within a batch only for modules of the kinds that it knows. What is
    needed to use it is saved with its rows, whatever the PEFT method: the texts, the names of the classes, the
    temperature, the image processor, and where the tokenizer and the base model come from.

    It starts from `text_embeds` (K, e), kept as a buffer. With K = 0 it is blank, and takes its size from what
    is loaded into it.

    Attributes:
        scale: Factor of the cosines.
        temperature: The scores of predictions are the softmax of the logits divided by it.
        image_processor: What turns pictures into `pixel_values`.
        tokenizer_name: Name and revision of the tokenizer, or None.
        base_revision: Revision of the base model, or None.
    """

    text_embeds: Tensor

    def __init__(
        self,
        text_embeds: Tensor,
        class_names: list[str] | None = None,
        scale: float = 25.0,
    ) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.scale = scale
        self.temperature = 1.0
        self.image_processor: Any = None
        self.tokenizer_name: tuple[str, str | None] | None = None
        self.base_revision: str | None = None
        self.set_rows(text_embeds, class_names)

    def set_rows(
        self,
        text_embeds: Tensor,
        class_names: list[str] | None,
        weight: Tensor | None = None,
    ) -> None:
        """Replace the classes: texts become `text_embeds` (K, e), rows `weight` (K, e) or, without it, the texts."""
        weight = text_embeds if weight is None else weight
        trained = self.weight.requires_grad
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
        self.register_buffer("text_embeds", text_embeds.detach().clone())
        self.out_features, self.in_features = text_embeds.shape
        self.class_names = class_names

    def set_classes(
        self, names: list[str], text_embeds: Tensor, keep_texts: bool = False
    ) -> None:
        """Replace the classes, but keep the rows of those that stay; with `keep_texts` also their texts."""
        places: dict[str, list[int]] = {}
        for place, name in enumerate(self.class_names or []):
            places.setdefault(name, []).append(place)
        text_embeds, weight = text_embeds.clone(), text_embeds.clone()
        for k, name in enumerate(names):
            if not places.get(name):
                continue
            # Of two classes with one name each keeps its own row.
            place = places[name].pop(0)
            weight[k] = self.weight[place].detach()
            if keep_texts:
                text_embeds[k] = self.text_embeds[place]
        self.set_rows(text_embeds, names, weight)

    def forward(self, input: Tensor, return_embeds: bool = False) -> Any:
        """The logits (..., K), between -scale and scale, of features (..., e) of any length.

        With `return_embeds` they are followed by the features and the rows (K, e) of unit length. Nobody has to read
        the weight from outside, where FSDP shows only a shard of it.
        """
        x = F.normalize(input.to(self.weight.dtype), dim=-1)
        rows = F.normalize(self.weight, dim=-1)
        logits = self.scale * F.linear(x, rows)
        return (logits, x, rows) if return_embeds else logits

    def extra_repr(self) -> str:
        settings = f"scale={self.scale:g}, temperature={self.temperature:g}"
        return f"{self.in_features}, classes={self.out_features}, {settings}"

    def get_extra_state(self) -> Tensor:
        state = {
            "class_names": self.class_names,
            "scale": self.scale,
            "temperature": self.temperature,
            "image_processor": _describe(self.image_processor),
            "tokenizer": self.tokenizer_name,
            "base_revision": self.base_revision,
        }
        # A tensor, which safetensors can hold.
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = read_extra_state(state)
        self.class_names = saved["class_names"]
        self.scale = saved["scale"]
        self.temperature = saved["temperature"]
        self.tokenizer_name = saved["tokenizer"] and tuple(saved["tokenizer"])
        self.base_revision = saved["base_revision"]
        self.image_processor = _restore(saved["image_processor"], self.image_processor)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        rows = state_dict.get(f"{prefix}weight")
        if not self.out_features and rows is not None:
            self.set_rows(self.weight.new_empty(rows.shape), None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def read_extra_state(state: Tensor) -> dict[str, Any]:
    """What a head saved next to its rows."""
    return json.loads(bytes(state.tolist()))


def can_be_saved(image_processor: Any) -> bool:
    """Whether an image processor comes back with the head: one of transformers does, a torchvision `Compose` not."""
    return type(image_processor).__module__.startswith("transformers.") and hasattr(
        image_processor, "to_json_string"
    )


def _describe(image_processor: Any) -> dict[str, Any] | None:
    """The class and the settings of an image processor, as JSON holds them; settings are None if it cannot."""
    if image_processor is None:
        return None
    settings = None
    if can_be_saved(image_processor):
        settings = json.loads(image_processor.to_json_string())
    return {"class": type(image_processor).__name__, "settings": settings}


def _restore(saved: dict[str, Any] | None, present: Any) -> Any:
    """The image processor that was saved, or else the one that is `present`."""
    if saved is None or saved == _describe(present):
        return present
    if saved["settings"] is not None:
        name = saved["class"]
        transformers = importlib.import_module("transformers")
        # Some backends of a processor are not installed everywhere; the plain name takes what there is.
        for kind in (name, saved["settings"].get("image_processor_type", name)):
            if hasattr(transformers, kind):
                try:
                    return getattr(transformers, kind).from_dict(saved["settings"])
                except ImportError:
                    continue
    if present is None:
        warnings.warn(
            f"The image processor of this classifier, a {saved['class']}, could not be saved with it: give it as "
            "`image_processor=`.",
            stacklevel=2,
        )
    return present
