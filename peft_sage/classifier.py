# SPDX-License-Identifier: Apache-2.0
"""One object from texts to predictions: the image tower of a CLIP-style model with a cosine head."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.peft_utils import find_adapter_config_file

from ._peft_compat import ModulesToSaveWrapper, adapters_off
from .config import SageConfig
from .descriptions import Descriptions, read_class_descriptions
from .encoding import encode_class_descriptions, load_tokenizer
from .guidance import set_guidance
from .pictures import decoding_side, find_images, read_image
from .towers.embeddings import encode_image, eval_mode
from .validation import check_embeddings, check_integer, check_number


class CosineHead(nn.Linear):
    """Bias-free cosine classifier `scale * cos(x, w_k)`, the head of LIFT (arXiv 2309.10019).

    An `nn.Linear`, because PEFT mixes adapters within a batch only for modules of the kinds that it knows. What it
    saves beside its rows, the texts and the names of the classes, comes back with it whatever the PEFT method is.

    It starts from `text_embeds` (K, e), kept as a buffer. With K = 0 it is blank, and takes its size from what
    is loaded into it.
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
        self.set_rows(text_embeds, class_names)

    def set_rows(self, text_embeds: Tensor, class_names: list[str] | None) -> None:
        """Replace the classes: rows and texts become `text_embeds` (K, e)."""
        trained = self.weight.requires_grad
        self.weight = nn.Parameter(text_embeds.detach().clone(), requires_grad=trained)
        self.register_buffer("text_embeds", text_embeds.detach().clone())
        self.out_features, self.in_features = text_embeds.shape
        self.class_names = class_names

    def forward(self, x: Tensor) -> Tensor:
        """The logits (..., K), between -scale and scale, of features (..., e) of any length."""
        return self.scale * F.linear(
            F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)
        )

    def get_extra_state(self) -> Tensor:
        # A tensor, which safetensors can hold.
        state = json.dumps({"class_names": self.class_names, "scale": self.scale})
        return torch.tensor(list(state.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = json.loads(bytes(state.tolist()))
        self.class_names, self.scale = saved["class_names"], saved["scale"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        rows = state_dict.get(f"{prefix}weight")
        if not self.out_features and rows is not None:
            self.set_rows(
                torch.empty_like(
                    rows, device=self.weight.device, dtype=self.weight.dtype
                ),
                None,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass
class SageClassifierOutput(ImageClassifierOutput):
    """What a [`SageClassifier`] returns; in evaluation only `logits` and, with labels, `loss`.

    Of unit length are the embeddings of the images (B, e), by the tower and, if the batch brought them, by the frozen
    tower (`base_image_embeds`), the rows of the head (`class_embeds`, (K, e)) and the texts (K, e).
    """

    image_embeds: Tensor | None = None
    class_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    base_image_embeds: Tensor | None = None
    logit_scale: float | None = None


@dataclass
class _ClassifierConfig:
    """What PEFT, Trainer and pipelines read; without `model_type`, by which PEFT tells models of transformers."""

    _name_or_path: str
    id2label: dict[int, str]
    num_labels: int
    use_cache: bool = False
    problem_type: str = "single_label_classification"
    task_specific_params: None = None
    custom_pipelines: dict[str, Any] = field(default_factory=dict)


class SageClassifier(nn.Module):
    """The image tower of a CLIP-style model with a cosine head that starts from text embeddings.

    Untrained, it is zero-shot CLIP.

    Args:
        clip: A model with an image tower and, where it has one, a projection to the space of the texts.
        text_embeds: (K, e), one embedding per class, by any text encoder that shares the space of the images. None
            makes a blank head, for an adapter to be loaded into.
        class_names: K names, for predictions.
        image_processor: What turns pictures into `pixel_values`, one of transformers or a torchvision `Compose`;
            `embed` and `predict` need it.
        scale: Factor of the cosines. It does not change the predictions before training, but the loss.

    Raises:
        TypeError, ValueError: An argument does not fit.
    """

    main_input_name = "pixel_values"

    model: Any
    class_head: Any

    def __init__(
        self,
        clip: nn.Module,
        text_embeds: Tensor | None,
        class_names: Sequence[str] | None = None,
        *,
        image_processor: Any = None,
        scale: float = 25.0,
    ) -> None:
        super().__init__()
        check_number("scale", scale, 1e-6)
        rows = (
            torch.empty(0, 0)
            if text_embeds is None
            else _unit_rows(text_embeds, "text_embeds")
        )
        names = None if class_names is None else list(class_names)
        if names is not None and len(names) != len(rows):
            raise ValueError(
                f"`class_names` must have {len(rows)} names, one per row, got {len(names)}."
            )
        self.model, self.class_head = (
            clip,
            CosineHead(rows.to(next(clip.parameters()).device), names, scale),
        )
        self.image_processor: Any = image_processor
        self.tokenizer: Any = None
        self.name_or_path = getattr(
            clip, "name_or_path", ""
        )  # where PEFT looks for the base model's name

    @classmethod
    def from_texts(
        cls,
        clip: nn.Module | str | os.PathLike[str],
        classes: Descriptions | str | os.PathLike[str] | Any,
        *,
        templates: Sequence[str] | None = None,
        tokenizer: Any = None,
        image_processor: Any = None,
        scale: float = 25.0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> "SageClassifier":
        """Make a classifier whose head starts from texts, which the model's own text tower encodes once, here.

        Args:
            clip: A model, or the folder or Hub id of one, which is loaded in float32.
            classes: Anything that [`read_class_descriptions`] takes.
            templates: For bare class names, texts with one `{}` each.
            tokenizer: Default: the one of the model's folder or repository.
            image_processor: Default: likewise, if there is one.
            scale: Factor of the cosines.
            cache_dir: Where the embeddings are kept, for a next time with this model and these texts.

        Raises:
            TypeError, ValueError: The classes cannot be read or encoded, or there is no tokenizer.
        """
        texts = read_class_descriptions(classes)
        model: Any = (
            clip
            if isinstance(clip, nn.Module)
            else AutoModel.from_pretrained(clip, dtype=torch.float32)
        )
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        embeds = encode_class_descriptions(
            model, tokenizer, texts, templates, cache_dir=cache_dir
        )
        image_processor = image_processor or _load(
            AutoImageProcessor, getattr(model, "name_or_path", ""), {}
        )
        classifier = cls(
            model, embeds, list(texts), image_processor=image_processor, scale=scale
        )
        classifier.tokenizer = tokenizer
        return classifier

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        clip: nn.Module | None = None,
        **kwargs: Any,
    ) -> "SageClassifier":
        """Load what `save_pretrained` or Trainer left, or `push_to_hub` uploaded, whatever the PEFT method.

        Of a model without an adapter it makes a classifier with a blank head, for an adapter to be loaded into.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hub.
            clip: The base model, where it has no name to be loaded from (open_clip, timm).
            **kwargs: `device`; `dtype` and further arguments for the base model; `revision`, `token`, `cache_dir` and
                the like for the Hub.

        Raises:
            OSError, ValueError: There is none, its adapter names no base model, or it does not fit.
        """
        source, device = (
            os.fspath(pretrained_model_name_or_path),
            kwargs.pop("device", None),
        )
        hub: dict[str, Any] = {
            k: kwargs.pop(k)
            for k in ("token", "cache_dir", "local_files_only")
            if k in kwargs
        }
        own = hub | {"revision": kwargs.pop("revision", None)}
        config = (
            PeftConfig.from_pretrained(source, **own)
            if find_adapter_config_file(source, **own)
            else None
        )
        # The configuration says which base model, and which revision of it.
        base = source if config is None else config.base_model_name_or_path or ""
        revision = own["revision"] if config is None else config.revision
        if clip is None:
            if not base:
                raise ValueError(
                    f"The adapter in {source!r} does not name its base model: give it as `clip`."
                )
            clip = AutoModel.from_pretrained(
                base, **({"dtype": torch.float32, "revision": revision} | hub | kwargs)
            )
        processor = _load(AutoImageProcessor, source, hub) or _load(
            AutoImageProcessor, base, hub
        )
        classifier = cls(clip, None, image_processor=processor)
        if config is not None:
            PeftModel.from_pretrained(classifier, source, **own)
            if not classifier._head.out_features:
                raise ValueError(
                    f"The adapter in {source!r} holds no `class_head`: it is not of a SageClassifier."
                )
        return classifier.to(device).eval()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        base_image_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> SageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images (B, C, H, W) from the model's image processor.
            labels: Class indices (B,), or probabilities (B, K), for a cross-entropy loss.
            base_image_embeds: (B, e) embeddings of the same images by the frozen tower, which are handed through.
            **kwargs: Passed to the image tower.
        """
        if getattr(
            self, "_is_replica", False
        ):  # it would concatenate what belongs to the classes
            raise RuntimeError(
                "`nn.DataParallel` cannot train a SageClassifier: use `accelerate launch`."
            )
        head = self._head
        features = encode_image(self.model, pixel_values, **kwargs).to(
            head.weight.dtype
        )
        logits = self.class_head(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = SageClassifierOutput(loss, logits)
        if self.training:
            output["image_embeds"], output["class_embeds"] = (
                F.normalize(x, dim=-1) for x in (features, head.weight)
            )
            output["text_embeds"], output["base_image_embeds"] = (
                head.text_embeds,
                base_image_embeds,
            )
            output["logit_scale"] = head.scale
        return output

    @torch.no_grad()
    def embed(self, images: Any, batch_size: int = 32) -> Tensor:
        """Embed images by the frozen tower, with all adapters off, in evaluation mode; with a progress bar.

        Args:
            images: What `predict` takes; a data set with a column `pixel_values` or `image`; or a loader of batches
                with `pixel_values`.
            batch_size: Images per step, unless a loader makes the batches.

        Returns:
            (n, e) float32 on the CPU, of unit length.
        """
        with eval_mode(self), adapters_off(self.model):
            batches = self._batches(images, batch_size, "embedding images")
            embeds = [
                encode_image(self.model, **batch).float().cpu() for batch in batches
            ]
        if not embeds:
            raise ValueError("`images` is empty; give at least one.")
        return F.normalize(torch.cat(embeds), dim=-1)

    @torch.no_grad()
    def predict(
        self, images: Any, top_k: int = 1, batch_size: int = 32
    ) -> list[list[dict[str, Any]]]:
        """Name what is in pictures.

        Args:
            images: Paths, PIL images or arrays; or a folder, whose own images are taken in order of their names.
            top_k: How many classes to name for each image.
            batch_size: Images per step.

        Returns:
            For each image its `top_k` classes, the likeliest first, as `{"label": ..., "score": ...}`.

        Raises:
            ValueError: A path holds no image, a file cannot be read (it is named), or there is no `image_processor`.
        """
        check_integer("top_k", top_k, 1)
        names, answers = self.config.id2label, []
        with eval_mode(self):
            for batch in self._batches(images, batch_size, "predicting"):
                best = (
                    self(**batch)
                    .logits.float()
                    .cpu()
                    .softmax(dim=-1)
                    .topk(min(top_k, len(names)))
                )
                for scores, classes in zip(
                    best.values.tolist(), best.indices.tolist(), strict=True
                ):
                    answers.append(
                        [
                            {"label": names[k], "score": s}
                            for k, s in zip(classes, scores, strict=True)
                        ]
                    )
        return answers

    def set_classes(
        self,
        classes: Tensor | Descriptions | Any,
        templates: Sequence[str] | None = None,
    ) -> None:
        """Give the active head other classes, without training; the guidance of a Sage adapter follows.

        Args:
            classes: (K, e) text embeddings, or anything that [`read_class_descriptions`] takes, for the model's own
                text tower.
            templates: For bare class names, texts with one `{}` each.
        """
        names = None
        if not isinstance(classes, Tensor):
            texts = read_class_descriptions(classes)
            names, tokenizer = list(texts), self.tokenizer or load_tokenizer(self.model)
            classes = encode_class_descriptions(self.model, tokenizer, texts, templates)
        head = self._head
        head.set_rows(
            _unit_rows(classes, "classes", head.in_features).to(head.weight), names
        )
        for name, config in getattr(self, "peft_config", {}).items():
            follows = (
                isinstance(config, SageConfig)
                and (config.guidance_shape or [0, 0])[1] == head.in_features
            )
            if follows and name in getattr(self.class_head, "active_adapters", [name]):
                set_guidance(self, None, name)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the tower's activations in the backward pass; Trainer calls it."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same, by the name that it has in older versions of transformers."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    @property
    def text_embeds(self) -> Tensor:
        """(K, e) frozen text embeddings of the classes, of unit length."""
        return self._head.text_embeds

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes as they were spelled."""
        return self._head.class_names

    @property
    def config(self) -> _ClassifierConfig:
        names = self.class_names or [
            f"LABEL_{k}" for k in range(self._head.out_features)
        ]
        return _ClassifierConfig(self.name_or_path, dict(enumerate(names)), len(names))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(
            parameter.dtype
            for parameter in self.model.parameters()
            if parameter.is_floating_point()
        )

    @property
    def _head(self) -> CosineHead:
        if (
            isinstance(self.class_head, ModulesToSaveWrapper)
            and self.class_head.active_adapters
        ):
            return self.class_head.modules_to_save[self.class_head.active_adapters[0]]  # type: ignore[return-value]
        return getattr(self.class_head, "original_module", self.class_head)

    def _batches(
        self, images: Any, batch_size: int, title: str
    ) -> Iterator[dict[str, Any]]:
        """Inputs of the image tower, batch by batch."""
        check_integer("batch_size", batch_size, 1)
        images = [images] if isinstance(images, (str, os.PathLike)) else images
        if isinstance(images, (list, tuple)):
            images = [
                x
                for i in images
                for x in (find_images(i) if isinstance(i, (str, os.PathLike)) else [i])
            ]
        if hasattr(images, "__getitem__"):
            images = DataLoader(images, batch_size=batch_size, collate_fn=self._collate)
        for batch in tqdm(images, desc=title, leave=False, delay=1):
            inputs = {
                name: value
                for name, value in batch.items()
                if name not in ("labels", "base_image_embeds")
            }
            yield {
                k: v.to(self.device, self.dtype if v.is_floating_point() else None)
                for k, v in inputs.items()
            }

    def _collate(self, items: list[Any]) -> dict[str, Any]:
        if isinstance(items[0], dict) and "pixel_values" in items[0]:
            names = [
                name
                for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
                if name in items[0]
            ]
            return {
                name: torch.stack([torch.as_tensor(item[name]) for item in items])
                for name in names
            }
        if self.image_processor is None:
            raise ValueError(
                "`image_processor` must be set on the classifier to prepare pictures, got None."
            )
        side = decoding_side(self.image_processor)
        pictures = [
            read_image(item["image"] if isinstance(item, dict) else item, min_side=side)
            for item in items
        ]
        if hasattr(
            self.image_processor, "transforms"
        ):  # torchvision's Compose, as open_clip and timm have it
            return {
                "pixel_values": torch.stack(
                    [self.image_processor(picture) for picture in pictures]
                )
            }
        return dict(self.image_processor(images=pictures, return_tensors="pt"))


def _unit_rows(embeds: Tensor, name: str, width: int | None = None) -> Tensor:
    check_embeddings(embeds, name, width)
    return F.normalize(embeds.detach().float(), dim=-1)


def _load(auto_class: Any, name: str, hub: dict[str, Any]) -> Any:
    """What a folder or repository may hold beside the model; None where it does not."""
    try:
        return auto_class.from_pretrained(name, **hub) if name else None
    except (OSError, ValueError):
        return None
