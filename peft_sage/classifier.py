# SPDX-License-Identifier: Apache-2.0
"""One object from texts to predictions: the image tower of a CLIP-style model with a cosine head."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.hub import PushToHubMixin

from ._peft_compat import BaseTunerLayer, active_module, adapters_off
from .descriptions import Descriptions, read_class_descriptions, warn_of_alike
from .encoding import encode_class_descriptions, load_tokenizer
from .guidance import find_guidance, set_guidance
from .head import CosineHead, can_be_saved
from .prediction import best_classes, fit_temperature, make_batches
from .saving import (
    Saved,
    absolute,
    has_changed,
    hub_arguments,
    load_if_any,
    load_model,
    refuse_adapter,
    sample_weights,
    save_classifier,
)
from .towers.embeddings import encode_image, eval_mode
from .validation import check_embeddings, check_integer, check_number, check_targets


#: The label of images that the loss ignores, as in Trainer.
IGNORED = -100


@dataclass
class SageClassifierOutput(ImageClassifierOutput):
    """What a [`SageClassifier`] returns; in evaluation and without gradients only `logits` and, with labels, `loss`.

    Of unit length are the embeddings of the images (B, e), by the tower and, if the batch brought them, by the frozen
    tower (`base_image_embeds`), the rows of the head (`class_embeds`, (K, e)) and the texts (K, e).
    """

    image_embeds: Tensor | None = None
    class_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    base_image_embeds: Tensor | None = None
    logit_scale: float | None = None


@dataclass
class ClassifierConfig:
    """What PEFT, Trainer, trackers and pipelines read. PEFT tells models of transformers by a `model_type`."""

    _name_or_path: str
    id2label: dict[int, str]
    num_labels: int
    use_cache: bool = False
    problem_type: str = "single_label_classification"
    task_specific_params: None = None
    custom_pipelines: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class SageClassifier(nn.Module, PushToHubMixin):
    """The image tower of a CLIP-style model with a cosine head that starts from text embeddings.

    Untrained, it is zero-shot CLIP.

    Args:
        clip: A model with an image tower and, where it has one, a projection to the space of the texts.
        text_embeds: (K, e), one embedding per class, by any text encoder that shares the space of the images. None
            makes a blank head, for an adapter to be loaded into.
        class_names: K names, for predictions.
        image_processor: What turns pictures into `pixel_values`, one of transformers or a torchvision `Compose`;
            `embed` and `predict` need it. One of transformers is saved with the head.
        scale: Factor of the cosines. It does not change the predictions before training, but the loss.

    Raises:
        TypeError, ValueError: An argument does not fit.
    """

    main_input_name = "pixel_values"
    # Trainer hands `num_items_in_batch` to `forward`, which divides the loss by it.
    accepts_loss_kwargs = True

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
        rows = torch.empty(0, 0)
        if text_embeds is not None:
            rows = _unit_rows(text_embeds, "text_embeds")
        if isinstance(class_names, (str, set)):
            raise TypeError(
                f"`class_names` must be a list of names, got {class_names!r}."
            )
        names = None if class_names is None else list(class_names)
        if names is not None and len(names) != len(rows):
            raise ValueError(
                f"`class_names` must have {len(rows)} names, one per row, got {len(names)}."
            )
        rows = rows.to(next(clip.parameters()).device)
        self.model = clip
        self.class_head = CosineHead(rows, names, float(scale))
        self.image_processor = image_processor
        # PEFT looks here for the base model's name.
        self.name_or_path = absolute(getattr(clip, "name_or_path", ""))
        self._tokenizer: Any = None
        self._base_samples = sample_weights(clip)
        self._config: tuple[list[str] | None, int, ClassifierConfig] | None = None

    @classmethod
    def from_texts(
        cls,
        model: nn.Module | str | os.PathLike[str],
        classes: Descriptions | str | os.PathLike[str] | Any,
        *,
        templates: Sequence[str] | None = None,
        tokenizer: Any = None,
        image_processor: Any = None,
        scale: float = 25.0,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "SageClassifier":
        """Make a classifier whose head starts from texts, which the model's own text tower encodes once, here.

        Args:
            model: A CLIP-style model, or the folder or Hub id of one, which is loaded in float32.
            classes: Anything that [`read_class_descriptions`] takes.
            templates: For bare class names, texts with one `{}` each.
            tokenizer: Default: the one of the model's folder or repository.
            image_processor: Default: likewise, if there is one.
            scale: Factor of the cosines.
            cache_dir: Where the embeddings are kept, for a next time with this model and these texts.
            revision: Of the model, its tokenizer and its image processor. A model given as an object does not know
                its own. It is saved with the head.
            **kwargs: `dtype`, `token` and further arguments of `AutoModel.from_pretrained`.

        Raises:
            TypeError, ValueError: The classes cannot be read or encoded, there is no tokenizer, or `model` is the
                folder of an adapter.
        """
        texts = read_class_descriptions(classes)
        warn_of_alike(texts)
        hub = hub_arguments(kwargs) | {"revision": revision}
        if not isinstance(model, nn.Module):
            refuse_adapter(model, **hub)
            clip: Any = load_model(os.fspath(model), **hub, **kwargs)
        elif kwargs:
            raise TypeError(
                f"{sorted(kwargs)} are for loading a model by its name, but `model` is one."
            )
        else:
            clip = model
        name = getattr(clip, "name_or_path", "") or ""
        if tokenizer is None:
            tokenizer = load_tokenizer(clip, **hub)
        embeds = encode_class_descriptions(
            clip, tokenizer, texts, templates, cache_dir=cache_dir
        )
        if image_processor is None:
            image_processor = load_if_any(AutoImageProcessor, name, hub)
        classifier = cls(
            clip, embeds, list(texts), image_processor=image_processor, scale=scale
        )
        classifier.class_head.base_revision = revision
        classifier.tokenizer = tokenizer
        return classifier

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        clip: nn.Module | None = None,
        *,
        image_processor: Any = None,
        **kwargs: Any,
    ) -> "SageClassifier":
        """Load what `save_pretrained` or Trainer left, or `push_to_hub` uploaded, whatever the PEFT method.

        Of a model without an adapter it makes a classifier with a blank head, for an adapter to be loaded into.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hub.
            clip: The base model, where what is saved does not name it (open_clip, timm, or a classifier without PEFT,
                of which Trainer saves all weights).
            image_processor: Default: the one saved with the head, or else the folder's or the base model's.
            **kwargs: `device`; `is_trainable`, to continue the training of an adapter; `dtype` and further arguments
                for the base model; `revision`, `subfolder`, `token`, `cache_dir` and the like for the Hub.

        Raises:
            OSError, ValueError: There is none, its adapter names no base model, or it does not fit.
        """
        device = kwargs.pop("device", None)
        is_trainable = kwargs.pop("is_trainable", False)
        saved = Saved(os.fspath(pretrained_model_name_or_path), kwargs)
        if clip is None:
            clip = saved.load_base(**kwargs)
        elif kwargs:
            raise TypeError(
                f"{sorted(kwargs)} are for loading a model, but `clip` is one."
            )
        processor = image_processor or saved.load_image_processor()
        classifier = cls(clip, None, image_processor=processor)
        classifier.class_head.base_revision = saved.base_hub.get("revision")
        if saved.config is not None:
            PeftModel.from_pretrained(
                classifier, saved.source, is_trainable=is_trainable, **saved.hub
            )
        elif saved.whole is not None:
            classifier.load_state_dict(saved.whole)
        if image_processor is not None:
            classifier.image_processor = image_processor
        return classifier.to(device).eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], max_shard_size: Any = None
    ) -> None:
        """Save the adapters and the head, or the head alone, as [`PeftModel`] does: `from_pretrained` reads both.

        The tower is not saved: it comes from the base model.

        Args:
            folder: It is made if needed.
            max_shard_size: Ignored; `push_to_hub` passes it.

        Raises:
            ValueError: `folder` is a file, or the tower is not the base model's any more: it was trained, or adapters
                were merged into it.
        """
        has_adapters = getattr(self, "peft_config", None)
        if not has_adapters and has_changed(self.model, self._base_samples):
            raise ValueError(
                "The tower has other weights than its base model, and only the head would be saved: save before "
                "`merge_and_unload`, which may follow `from_pretrained`, or save `state_dict()` yourself."
            )
        processor = self.image_processor
        if processor is not None and not can_be_saved(processor):
            warnings.warn(
                f"The image processor, a {type(processor).__name__}, cannot be saved: give it to `from_pretrained` as "
                "`image_processor`.",
                stacklevel=2,
            )
        save_classifier(self, folder)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        base_image_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images (B, C, H, W) from the model's image processor.
            labels: Class indices (B,), or probabilities (B, K), for a cross-entropy loss.
            base_image_embeds: (B, e) embeddings of the same images by the frozen tower, which are handed through.
            num_items_in_batch: Entries of the labels in the whole batch, over which the loss is averaged, where these
                images are a part of it; Trainer passes it.
            **kwargs: Passed to the image tower.
        """
        if getattr(self, "_is_replica", False):
            # It would concatenate what belongs to the classes.
            raise RuntimeError(
                "`nn.DataParallel` cannot train a SageClassifier: use `accelerate launch`."
            )
        if isinstance(self.class_head, BaseTunerLayer):
            raise ValueError(
                "`target_modules` matches the `class_head`, which cannot be adapted: exclude it by `exclude_modules` "
                "and train it by `modules_to_save`."
            )
        features = encode_image(self.model, pixel_values, **kwargs)
        if not (self.training and torch.is_grad_enabled()):
            logits = self.class_head(features)
            loss = _cross_entropy(logits, labels, num_items_in_batch)
            return SageClassifierOutput(loss, logits)
        logits, image_embeds, class_embeds = self.class_head(
            features, return_embeds=True
        )
        head = self.head
        return SageClassifierOutput(
            _cross_entropy(logits, labels, num_items_in_batch),
            logits,
            image_embeds=image_embeds,
            class_embeds=class_embeds,
            text_embeds=head.text_embeds,
            base_image_embeds=base_image_embeds,
            logit_scale=head.scale,
        )

    @torch.no_grad()
    def embed(self, images: Any, batch_size: int = 32) -> Tensor:
        """Embed images by the frozen tower, with all adapters off, in evaluation mode; with a progress bar.

        Args:
            images: What `predict` takes; a data set with a column `pixel_values` or `image`; or a loader of batches
                with `pixel_values`.
            batch_size: Images per step, unless a loader makes the batches.

        Returns:
            (n, e) float32 on the CPU, of unit length.

        Raises:
            TypeError, ValueError: As in `predict`; or `images` is empty.
        """
        batch_size = check_integer("batch_size", batch_size, 1)
        embeds = []
        with eval_mode(self), adapters_off(self):
            for batch, _ in make_batches(
                images, self.image_processor, batch_size, "Embedding images"
            ):
                features = encode_image(self.model, **self._on_device(batch))
                embeds.append(features.float().cpu())
        if not embeds:
            raise ValueError("`images` is empty; give at least one.")
        return F.normalize(torch.cat(embeds), dim=-1)

    @torch.no_grad()
    def predict(
        self,
        images: Any,
        top_k: int = 1,
        batch_size: int = 32,
        *,
        min_score: float | None = None,
        on_error: str = "raise",
    ) -> list[list[dict[str, Any]] | None]:
        """Name what is in pictures; with a progress bar.

        Args:
            images: One or more paths, PIL images or arrays, by position; folders stand for the images in them and in
                their subfolders, in the order of [`find_images`], and patterns with `*` for what they match.
            top_k: How many classes to name for each image, at most all.
            batch_size: Images per step.
            min_score: Where the likeliest class has a lower score, in [0, 1], the answer is None.
            on_error: "raise" ends at the first image that cannot be read; "skip" answers None for it and names all of
                them in one warning.

        Returns:
            For each image its `top_k` classes, the likeliest first, as `{"label": ..., "score": ...}`, or None.

        Raises:
            TypeError, ValueError: `images` is none of these, a path holds no image, a file cannot be read (it is
                named), or there is no `image_processor`.
        """
        top_k = check_integer("top_k", top_k, 1)
        batch_size = check_integer("batch_size", batch_size, 1)
        if min_score is not None:
            check_number("min_score", min_score, 0, 1)
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}.')
        head = self.head
        names = self.config.id2label
        if not names:
            raise ValueError(
                "The head has no classes: load an adapter, or call `set_classes`."
            )
        answers: list[list[dict[str, Any]] | None] = []
        unreadable: list[str] = []
        with eval_mode(self):
            for batch, errors in make_batches(
                images, self.image_processor, batch_size, "Predicting", on_error
            ):
                found: Iterator[Any] = iter(())
                if batch is not None:
                    logits = self(**self._on_device(batch)).logits.float().cpu()
                    scores = (logits / head.temperature).softmax(dim=-1)
                    found = best_classes(scores, names, top_k, min_score)
                answers += [next(found) if error is None else None for error in errors]
                unreadable += [error for error in errors if error is not None]
        if unreadable:
            warnings.warn(
                f"{len(unreadable)} of {len(answers)} images could not be read: {'; '.join(unreadable[:20])}",
                stacklevel=3,
            )
        return answers

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> float:
        """Set the temperature of the head that runs for calibrated scores; it is saved with the head.

        Args:
            logits: (n, K) of images that were not trained on, such as the validation images.
            labels: (n,) their classes.

        Returns:
            The temperature with the lowest cross-entropy, between 0.05 and 20 (arXiv 1706.04599).

        Raises:
            TypeError, ValueError: They do not fit.
        """
        self.head.temperature = fit_temperature(logits, labels, self.head.out_features)
        return self.head.temperature

    def set_classes(
        self,
        classes: Tensor | Descriptions | Any,
        templates: Sequence[str] | None = None,
    ) -> None:
        """Give the head that runs other classes, without training; the guidance of a Sage adapter follows.

        Classes that the head has by the same name keep what they learned, and the others start from their texts.

        Args:
            classes: Anything that [`read_class_descriptions`] takes, for the model's own text tower; a class that the
                head has keeps its text, too, unless a new one is given. Or (K, e) text embeddings, of new classes.
            templates: For bare class names, texts with one `{}` each.

        Raises:
            TypeError, ValueError: The classes cannot be read or encoded.
        """
        head = self.head
        if isinstance(classes, Tensor):
            rows = _unit_rows(classes, "classes", head.in_features or None)
            head.set_rows(rows.to(head.weight), None)
        else:
            texts = read_class_descriptions(classes)
            warn_of_alike(texts)
            rows = self._encode(texts, templates)
            head.set_classes(list(texts), rows, keep_texts=not isinstance(texts, dict))
        self._update_guidance()

    def add_classes(
        self, texts: Descriptions | Any, templates: Sequence[str] | None = None
    ) -> None:
        """Add classes, which start from their texts, to the head that runs; those that it has stay as they are.

        Args:
            texts: Anything that [`read_class_descriptions`] takes, of the new classes.
            templates: For bare class names, texts with one `{}` each.

        Raises:
            TypeError, ValueError: They cannot be read or encoded, or the head has one of them or no class names.
        """
        head = self.head
        new = read_class_descriptions(texts)
        names = head.class_names
        if names is None:
            raise ValueError(
                "`add_classes` needs a head with class names: give all classes to `set_classes`."
            )
        if known := sorted(set(names) & set(new)):
            raise ValueError(f"`texts` has classes that the head has: {known[:10]}.")
        warn_of_alike([*names, *new])
        rows = self._encode(new, templates)
        head.set_classes([*names, *new], torch.cat([head.text_embeds, rows]))
        self._update_guidance()

    def _encode(self, texts: Descriptions, templates: Sequence[str] | None) -> Tensor:
        """Rows (n, e) of texts for the head that runs."""
        rows = encode_class_descriptions(
            self.model, load_tokenizer(self), texts, templates
        )
        rows = _unit_rows(rows, "classes", self.head.in_features or None)
        return rows.to(self.head.weight)

    def _update_guidance(self) -> None:
        """Let the Sage adapters that run with the head attend to its classes."""
        head = self.head
        if head is getattr(self.class_head, "original_module", None):
            return
        active = getattr(self.class_head, "active_adapters", None)
        for name in getattr(self, "peft_config", {}):
            shared = find_guidance(self, name)
            fits = shared is not None and shared.rows.shape[1] == head.in_features
            if fits and (active is None or name in active):
                set_guidance(self, None, name)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the tower's activations in the backward pass; Trainer calls it, PEFT by its older name."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable

    @property
    def head(self) -> CosineHead:
        """The head that runs: the active adapter's, or the original one where adapters are off."""
        return active_module(self.class_head)  # type: ignore[return-value]

    @property
    def text_embeds(self) -> Tensor:
        """(K, e) frozen text embeddings of the classes, of unit length."""
        return self.head.text_embeds

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes as they were spelled."""
        return self.head.class_names

    @property
    def image_processor(self) -> Any:
        """What turns pictures into `pixel_values`; setting it sets that of every head."""
        return self.head.image_processor

    @image_processor.setter
    def image_processor(self, value: Any) -> None:
        for head in self._heads():
            head.__dict__["image_processor"] = value

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given, or that of the model's folder or repository; None if there is none."""
        if self._tokenizer is None:
            name, revision = self.head.tokenizer_name or (
                self.name_or_path,
                self.base_revision,
            )
            self._tokenizer = load_if_any(AutoTokenizer, name, {"revision": revision})
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value
        source = absolute(getattr(value, "name_or_path", None))
        revision = self.base_revision if source == self.name_or_path else None
        for head in self._heads():
            head.tokenizer_name = (source, revision) if source else None

    @property
    def base_revision(self) -> str | None:
        """Revision of the base model, where it is known."""
        return self.head.base_revision

    @property
    def config(self) -> ClassifierConfig:
        # Kept, as pipelines ask for it once per class and image.
        names = self.class_names
        count = self.head.out_features
        kept_names, kept_count, _ = self._config or (None, None, None)
        if self._config is None or kept_names is not names or kept_count != count:
            labels = names or [f"LABEL_{k}" for k in range(count)]
            config = ClassifierConfig(
                self.name_or_path, dict(enumerate(labels)), len(labels)
            )
            self._config = names, count, config
        return self._config[2]

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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "image_processor":
            # Not as a submodule, which some of torchvision's are.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _heads(self) -> list[CosineHead]:
        return [m for m in self.class_head.modules() if isinstance(m, CosineHead)]

    def _on_device(self, batch: Any) -> dict[str, Tensor]:
        return {
            name: value.to(
                self.device, self.dtype if value.is_floating_point() else None
            )
            for name, value in batch.items()
        }


def _unit_rows(embeds: Tensor, name: str, width: int | None = None) -> Tensor:
    check_embeddings(embeds, name, width)
    return F.normalize(embeds.detach().float(), dim=-1)


def _cross_entropy(
    logits: Tensor, labels: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor | None:
    if labels is None:
        return None
    check_targets(labels, tuple(logits.shape), IGNORED)
    soft = labels.ndim == 2
    labels = labels if soft else labels.long()
    if num_items_in_batch is None:
        num_items_in_batch = labels.numel() if soft else (labels != IGNORED).sum()
    # Of probabilities (B, K) every entry is counted, as Trainer does.
    entries = labels.shape[1] if soft else 1
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return total * entries / torch.as_tensor(num_items_in_batch).clamp(min=1)
