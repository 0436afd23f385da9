# SPDX-License-Identifier: Apache-2.0
"""The whole recipe over transformers' Trainer."""

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import EvalPrediction, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .adapter_scale import AdapterScale, adapter_outputs, choose_adapter_scale
from .arguments import SageTrainingArguments
from .cached_images import ImageBatches, embed_images
from .callbacks import LongTailCallback
from .classifier import SageClassifier
from .collator import ImageCollator
from .loss import SageLoss
from .optimization import parameter_groups
from .patch_dropout import can_drop_patches, patch_dropout
from .resumable_trainer import ResumableTrainer
from .run_files import fingerprint, load_text_prior, run_settings
from .text_prior import TextPrior, choose_text_prior
from .training_callbacks import ScheduleCallback, TrainingBar
from .training_checks import (
    check_arguments,
    check_collator,
    is_map_style,
    map_style_data,
    read_groups,
    read_training_labels,
)
from .training_defaults import default_collator, fitted_arguments, wrapped_model


logger = logging.get_logger(__name__)

#: The text guidance's share of the text prior, chosen on validation images (RESULTS.md).
GUIDANCE_SHARE = 0.4
PUSHED_FILES = ["adapter_*", "README.md", "preprocessor_config.json", "*.png"]
PUSHED_FILES += ["model.safetensors", "results.json"]


class SageTrainer(ResumableTrainer):
    """Train a [`SageClassifier`] on long-tailed images: transformers' Trainer with a recipe where nothing is given.

        trainer = SageTrainer(model, train_dataset=photos.train, eval_dataset=photos.validation)
        trainer.train()
        print(trainer.evaluate(photos.test))
        trainer.save_model("birds")

    What is given wins. Without `compute_loss_func` the loss is a [`SageLoss`] for the labels of `train_dataset`, whose
    text prior and guidance are chosen from frozen embeddings of the training images when training starts; without
    `data_collator` pictures go through an [`ImageCollator`]; without `compute_metrics` there are the accuracies of
    [`LongTailAccuracy`]. With an `eval_dataset` training ends with the epoch of the best macro accuracy there.

    Args:
        model: A classifier, wrapped by PEFT or not (then the head alone is trained); or any module that returns logits
            for `pixel_values`, which gets the loss and the metrics only.
        args: Default: the recipe.
        train_dataset: Items with `image`, or `pixel_values`, and `label`: one of `datasets`, or dictionaries by
            position. A column `group` keeps images together where the text prior is chosen.
        eval_dataset: Validation images.
        peft_config: Wraps the model; `modules_to_save` becomes the head if it is not set.
        data_collator: Also an [`ImageCollator`] with settings of one's own.
        **kwargs: Further arguments of Trainer.

    Attributes:
        classifier: The [`SageClassifier`] in the model, or None.
        class_counts: Numbers of training images (K); None if they are not known.
        loss: The [`SageLoss`] of the run, or None.
        text_prior: The [`TextPrior`] that was chosen, or None.
        patch_dropout: Share of the patches that training left out; 0 where the tower needs all of them.
        adapter_scale: The [`AdapterScale`] that was chosen after training, or None.
        base_image_embeds: (n, e) embeddings of the training images by the frozen tower, or None.
        grouped_by: What the column `group` of `train_dataset` is made from, for messages.

    Raises:
        TypeError, ValueError: An argument, or the data set, does not fit; before anything is computed or changed.
    """

    args: Any
    model: Any
    train_dataset: Any
    eval_dataset: Any
    class_counts: Any
    grouped_by: str | None = "column 'group'"

    def __init__(
        self,
        model: nn.Module,
        args: SageTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        peft_config: PeftConfig | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **kwargs: Any,
    ) -> None:
        args = SageTrainingArguments() if args is None else args
        check_arguments(model, args, peft_config, compute_loss_func)
        modules = [m for m in model.modules() if isinstance(m, SageClassifier)]
        self.classifier: Any = modules[0] if modules else None
        processor = kwargs.pop("processing_class", None)
        processor = processor or getattr(self.classifier, "image_processor", None)
        data = map_style_data(train_dataset, eval_dataset)
        collator = data_collator or default_collator(args, processor, data)
        self._read_data(model, data, collator, compute_loss_func)
        self._set_loss(args, compute_loss_func)
        self._num_images = len(data.get("train_dataset", ()))
        args = fitted_arguments(args, self._num_images, eval_dataset)
        set_seed(args.seed)  # for the adapters that are made here
        model = wrapped_model(model, peft_config, self.classifier)
        data_of_run = fingerprint(self._labels.tolist())
        self.settings = run_settings(args, model, data_of_run)
        self._prepared: dict[str, tuple[Any, ImageBatches]] = {}
        self._schedule = ScheduleCallback()
        metrics = getattr(self._long_tail, "compute_metrics", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor if hasattr(processor, "to_dict") else None,
            compute_loss_func=compute_loss_func or self.loss,
            compute_metrics=compute_metrics or metrics,
            callbacks=[*(callbacks or []), self._schedule],
            optimizers=optimizers,
            **kwargs,
        )
        if self.loss is not None:
            self.add_callback(self._long_tail)
        # The loss divides by the images, also where a model's forward takes any keyword.
        self.model_accepts_loss_kwargs &= self.compute_loss_func is None
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingBar(self._describe))

    def _read_data(
        self,
        model: nn.Module,
        data: dict[str, Any],
        collator: Any,
        compute_loss_func: Any,
    ) -> None:
        # The plain view of images: for evaluation, and for the frozen tower.
        self._plain: Any = collator
        if isinstance(collator, ImageCollator):
            self._plain = copy.copy(collator).eval()
        self.class_counts, self._labels = read_training_labels(
            model, data, collator, compute_loss_func
        )
        check_collator(self._plain, data)

    def _set_loss(self, args: SageTrainingArguments, compute_loss_func: Any) -> None:
        self.text_prior: Any = None
        self.adapter_scale: AdapterScale | None = None
        self.patch_dropout = 0.0
        self.base_image_embeds: Any = None
        self.loss: SageLoss | None = None
        self._long_tail: Any = None
        self._makes_loss = compute_loss_func is None and self.class_counts is not None
        if self._makes_loss:
            self.loss = SageLoss(self.class_counts, args.tau, args.compensation)
        elif isinstance(compute_loss_func, SageLoss):
            self.loss = compute_loss_func
        if self.class_counts is not None:
            loss = self.loss or SageLoss(self.class_counts)
            self._long_tail = LongTailCallback(loss, self.class_counts)

    def _describe(self) -> str:
        """What is about to be trained."""
        trained = self.get_num_trainable_parameters()
        total = sum(p.numel() for p in self.model.parameters())
        text = f"Training {trained:,} of {total:,} parameters on {self._num_images:,} images"
        if self.patch_dropout:
            text += (
                f", of which each step sees {1 - self.patch_dropout:.0%} of the patches"
            )
        if self.text_prior is None:
            return text
        is_grouped = read_groups(self.train_dataset) is not None
        grouped = f", grouped by {self.grouped_by}" if is_grouped else ""
        return f"Chosen: {self.text_prior}{grouped}\n{text}"

    # Data

    def _batches(
        self, role: str, dataset: Any, collator: Any, crops: int = 1
    ) -> ImageBatches:
        """The batches of a data set, decoded once for all evaluations; each role keeps those of its last data set."""
        known, batches = self._prepared.get(role, (None, None))
        if batches is None or known is not dataset:
            batches = ImageBatches(dataset, collator, crops)
            shown = self.is_local_process_zero() and not self.args.disable_tqdm
            batches.cache(self.args.cache_gib * 2**30, progress=shown)
            self._prepared[role] = (dataset, batches)
        return batches

    def _loader(self, batches: ImageBatches, **kwargs: Any) -> DataLoader[Any]:
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        loader = batches.loader(
            self.args.dataloader_num_workers, pin_memory=pin, **kwargs
        )
        return self.accelerator.prepare(loader)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The training batches, in an order that depends on the seed and the epoch alone."""
        if not is_map_style(self.train_dataset):
            return super().get_train_dataloader()
        batches = self._batches("train", self.train_dataset, self.data_collator)
        sampler: Any = SequentialSampler(batches)
        if self.args.train_sampling_strategy != "sequential":
            sampler = SeedableRandomSampler(batches, data_seed=self.args.data_seed)
            self._schedule.sampler = sampler
        size = self._train_batch_size
        full = len(batches) >= size * self.args.world_size
        return self._loader(batches, batch_size=size, sampler=sampler, drop_last=full)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The batches of the validation images, or of the given ones, which are seen in `test_crops`."""
        name = eval_dataset if isinstance(eval_dataset, str) else None
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = dataset if name is None else self.eval_dataset[name]
        role = "test"
        crops = self.args.test_crops
        if name is not None or dataset is self.eval_dataset:  # Trainer hands it over
            role = f"validation {name}"
            crops = 1
        if not is_map_style(dataset) or isinstance(dataset, dict):
            return super().get_eval_dataloader(eval_dataset)
        batches = self._batches(role, dataset, self._plain, crops)
        return self._loader(batches, batch_size=self.args.eval_batch_size)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The batches of test images."""
        return self.get_eval_dataloader(test_dataset)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train, after the strengths of the text terms were chosen; then choose how much of the adapters to keep.

        Args:
            resume_from_checkpoint: A checkpoint; True for the complete one of the highest step in `output_dir`;
                "latest" for the same, or a start from scratch if there is none.
            *args: As in Trainer.
            **kwargs: As in Trainer.

        Raises:
            ValueError: The checkpoint is not complete, or of a run with other settings or data, which are named.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        if self._makes_loss:
            self._choose_text_terms(checkpoint)
        if self.args.eval_strategy != IntervalStrategy.NO:
            # Decoded here, and not below the bar of the training.
            several = isinstance(self.eval_dataset, dict)
            for name in self.eval_dataset if several else [None]:
                self.get_eval_dataloader(name)
        self.patch_dropout = self._fitting_patch_dropout()
        with patch_dropout(self.model, self.patch_dropout):
            output = super().train(checkpoint, *args, **kwargs)
        self._choose_adapter_scale()
        return output

    def _choose_text_terms(self, checkpoint: str | None) -> None:
        """Make the loss with the text prior, the guidance and what stands for absent classes."""
        args = self.args
        classifier = self.classifier
        prior = args.text_prior
        guidance = args.text_guidance
        absent = args.absent
        if classifier is None:
            return
        if guidance == "auto" and not self._trains_tower():
            guidance = 0.0
        lacks_images = 0 in self.class_counts
        chooses = prior == "auto" or (absent == "auto" and lacks_images)
        if (chooses or guidance) and self.base_image_embeds is None:
            self.base_image_embeds = self._embed_training_images()
        if chooses:
            self.text_prior = load_text_prior(checkpoint) or self._choose_text_prior()
            prior = self.text_prior.strength
        guidance = GUIDANCE_SHARE * prior if guidance == "auto" else guidance
        terms: dict[str, Any] = {"text_prior": prior, "text_guidance": guidance}
        if lacks_images:
            absent = self.text_prior.absent if absent == "auto" else absent
            terms["absent"] = None if absent == "none" else absent
        self.loss = self.compute_loss_func = SageLoss(
            self.class_counts, args.tau, args.compensation, **terms
        )
        self._long_tail.loss = self.loss
        batches = self._batches("train", self.train_dataset, self.data_collator)
        batches.embeds = self.base_image_embeds if guidance else None

    def _trains_tower(self) -> bool:
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        return not all("class_head" in name for name in trained)

    def _fitting_patch_dropout(self) -> float:
        """`patch_dropout`; 0 where the tower is not trained, or needs all patches."""
        classifier = self.classifier
        share = self.args.patch_dropout
        if classifier is None or not share or not self._trains_tower():
            return 0.0
        inputs = self._plain([*itertools.islice(self.train_dataset, 2)])
        pixels = inputs["pixel_values"].to(classifier.device)
        # Patches that come as such differ in number.
        cuts_images = not {"pixel_attention_mask", "spatial_shapes"} & {*inputs}

        def answer() -> Tensor:
            with self.accelerator.autocast():
                return classifier(pixel_values=pixels)["logits"]

        if cuts_images and can_drop_patches(classifier, answer):
            return share
        logger.warning(
            f"`patch_dropout` {share} is not used: this tower needs all patches of an image."
        )
        return 0.0

    def _choose_adapter_scale(self) -> None:
        args = self.args
        chooses = args.choose_adapter_scale and args.greater_is_better
        if not (chooses and args.load_best_model_at_end):
            return
        outputs = adapter_outputs(self.model)
        divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not outputs or divided or isinstance(self.eval_dataset, dict):
            return
        metric = f"test_{args.metric_for_best_model.removeprefix('eval_')}"

        def score() -> float:
            return cast(Any, self.predict(self.eval_dataset).metrics)[metric]

        # The kept epoch's score is known, unless its checkpoint is gone and the last epoch stays.
        state: Any = self.state
        kept = Path(state.best_model_checkpoint or "")
        is_best = kept.is_dir() and kept.name == f"checkpoint-{state.best_global_step}"
        whole = state.best_metric if is_best else score()
        self.adapter_scale = choose_adapter_scale(outputs, whole, score)

    def _embed_training_images(self) -> Tensor:
        batches = self._batches("train", self.train_dataset, self.data_collator)
        if isinstance(self._plain, ImageCollator) and not batches.makes_pixels:
            batches = ImageBatches(self.train_dataset, self._plain)
        return embed_images(
            self.accelerator,
            self.classifier,
            batches,
            getattr(self._plain, "finish", lambda pixels: pixels),
            self.args.per_device_eval_batch_size,
            self.args.dataloader_num_workers,
        )

    def _choose_text_prior(self) -> TextPrior:
        """The choice of one process, as on a GPU two might not come to the same."""
        chosen = None
        fixed = self.args.text_prior
        tried: Any = {} if fixed == "auto" else {"strengths": [fixed]}
        if self.is_world_process_zero():
            chosen = choose_text_prior(
                self.base_image_embeds.to(self.args.device),
                self._labels,
                self.classifier.text_embeds,
                seed=self.args.seed,
                groups=read_groups(self.train_dataset),
                **tried,
            )
        return broadcast_object_list([chosen])[0]

    def set_initial_training_values(
        self, args: Any, dataloader: DataLoader[Any]
    ) -> Any:
        """As in Trainer, with as many epochs as `min_steps` need."""
        if args.max_steps <= 0 and args.min_steps:
            steps = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
            args = copy.copy(args)
            args.num_train_epochs = max(
                args.num_train_epochs, math.ceil(args.min_steps / max(1, steps))
            )
        return super().set_initial_training_values(args, dataloader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `optim`, with a learning rate of its own for the head."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            args = self.args
            trained = cast(Any, self.model if model is None else model)
            kind, settings = self.get_optimizer_cls_and_kwargs(args, trained)
            groups = parameter_groups(
                trained, args.learning_rate, args.head_learning_rate
            )
            decay = {"weight_decay": args.weight_decay}
            self.optimizer = kind([{**g, **decay} for g in groups], **settings)
        return super().create_optimizer(model)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As in Trainer; decoded images are augmented and normalised on their device."""
        inputs = super()._prepare_inputs(inputs)
        if "pixels" not in inputs:
            return inputs
        collator: Any = self.data_collator if self.model.training else self._plain
        pixels = inputs.pop("pixels")
        return {**inputs, "pixel_values": collator.finish(pixels)}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits and labels of a batch; the logits of several crops are averaged in float32."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels", None)
        pixels = inputs["pixel_values"]
        crops = pixels.shape[1] if pixels.ndim == 5 else 1
        if crops > 1:
            inputs["pixel_values"] = pixels.flatten(0, 1)
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            logits = _logits(outputs)
            if crops > 1:
                logits = logits.float().unflatten(0, (-1, crops)).mean(dim=1)
                outputs = {"logits": logits}
            if labels is not None and self.compute_loss_func is not None:
                loss = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        loss = None if loss is None else loss.detach().mean()
        return loss, None if prediction_loss_only else logits.detach(), labels

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of evaluations that are alike the last one is the best: it was trained for longest."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if name in metrics and metrics[name] == self.state.best_metric:
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload what `save_model` writes and the model card next to it; nothing that shows images or paths."""
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        folder = Path(self.args.output_dir)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else None
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        if text is not None:  # PEFT changes a card that it finds
            card.write_text(text, encoding="utf-8")
        upload: Any = HfApi().upload_folder
        return upload(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            revision=revision or self.args.hub_revision,
            run_as_future=not blocking,
            allow_patterns=PUSHED_FILES,
        )


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
