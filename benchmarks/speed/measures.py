# SPDX-License-Identifier: Apache-2.0
"""What `rows.yaml` can ask for: each takes the settings of a run and returns what is timed, or what gives a value."""

import copy
import gc
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    TrainerCallback,
)

from peft_sage import (
    ImageCollator,
    SageClassifier,
    SageConfig,
    SageLoss,
    SageTrainer,
    SageTrainingArguments,
)
from peft_sage.layer import SageLayer


ROOT = Path(__file__).resolve().parents[2]
#: A run: timed if it returns nothing; otherwise it returns what is measured.
Run = Callable[[], float | None]


@cache
def frozen_tower(sizes: tuple[tuple[str, int], ...], device: str) -> nn.Module:
    """Return an image tower with random weights: speed does not depend on them."""
    tower = dict(sizes)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=tower["width"],
        intermediate_size=4 * tower["width"],
        num_hidden_layers=tower["blocks"],
        num_attention_heads=tower["heads"],
        patch_size=tower["patch"],
        image_size=tower["image"],
        projection_dim=tower["embedding"],
    )
    with torch.device(device):
        return CLIPVisionModelWithProjection(config).requires_grad_(False)


def classifier(run: SimpleNamespace) -> nn.Module:
    """Return a classifier with what its method trains. All share one copy of the frozen weights."""
    base = frozen_tower(tuple(run.sizes.items()), run.device)
    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    torch.manual_seed(0)
    model = SageClassifier(
        copy.deepcopy(base, shared), torch.randn(run.classes, run.sizes["embedding"])
    )
    if run.method == "head":
        return model
    if run.method == "lora":
        config = LoraConfig(
            r=run.r,
            lora_alpha=run.r,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["class_head"],
        )
    else:
        config = SageConfig(
            r=run.r,
            guidance_rows=0 if run.method == "adaptformer" else 64,
            init_weights=False,
        )
    return get_peft_model(model, config)


def loss_function(run: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """Return cross-entropy, or `SageLoss` with or without its text terms."""
    if run.loss == "ce":
        return lambda outputs, labels: F.cross_entropy(outputs["logits"], labels)
    counts = (1000 * 0.999 ** torch.arange(run.classes)).long().clamp(min=2)
    terms = {"text_prior": 1.0, "text_guidance": 0.4} if run.loss == "texts" else {}
    return SageLoss(counts, **terms).to(run.device)


class Step:
    """Forward, loss, backward and AdamW on a fixed batch."""

    def __init__(self, run: SimpleNamespace) -> None:
        self.model = classifier(run).train()
        self.run = run
        torch.manual_seed(1)
        shape = (run.batch, 3, run.sizes["image"], run.sizes["image"])
        self.batch = {"pixel_values": torch.randn(shape, device=run.device)}
        if run.loss == "texts":
            embeds = torch.randn(run.batch, run.sizes["embedding"], device=run.device)
            self.batch["base_image_embeds"] = F.normalize(embeds, dim=-1)
        # Pairs of a class, without which there is nothing to compensate.
        self.labels = torch.arange(run.batch, device=run.device) // 2 % run.classes
        self.function = loss_function(run)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def __call__(self) -> None:
        dtype = getattr(torch, self.run.dtype)
        with torch.autocast(
            self.run.device, dtype=dtype, enabled=dtype != torch.float32
        ):
            outputs = self.model(**self.batch)
        self.function(outputs, self.labels).backward()
        if getattr(self.run, "optimise", True):
            self.optimizer.step()
        self.optimizer.zero_grad()


def inference(run: SimpleNamespace) -> Run:
    """Forward in evaluation mode on a fixed batch."""
    step = Step(run)
    step.model.eval()

    @torch.inference_mode()
    def forward() -> None:
        step.model(**step.batch)

    return forward


def adapters(run: SimpleNamespace) -> Run:
    """What the adapters alone do in a step of training, or in inference: in whole steps it drowns in the noise."""
    step = Step(run)
    calls = []
    layers = [m for m in step.model.modules() if isinstance(m, SageLayer)]

    def keep(layer: SageLayer, args: Any, output: torch.Tensor) -> None:
        calls.append((layer, args[0], output))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        step.model(**step.batch)
    for hook in hooks:
        hook.remove()
    optimizer = torch.optim.AdamW(
        [p for layer in layers for p in layer.parameters() if p.requires_grad], lr=1e-5
    )

    @torch.inference_mode()
    def forward() -> None:
        for layer, tokens, output in calls:
            output + layer.update(tokens, "default")

    def train() -> None:
        for layer, tokens, output in calls:
            (output + layer.update(tokens.requires_grad_(), "default")).backward(output)
            tokens.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return train if run.train else forward


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living tensors that were made under it; on the CPU the allocator cannot be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            size = storage.nbytes()
            self.alive[storage._cdata] = weakref.finalize(
                storage, self._free, storage._cdata, size
            )
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]


def peak(run: SimpleNamespace) -> Run:
    """Bytes at most of weights, gradients, optimiser and activations in two steps."""

    def measure() -> float:
        frozen_tower.cache_clear()
        gc.collect()
        if run.device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step = Step(run)
            step(), step()
            return torch.cuda.max_memory_allocated() - before
        with LiveBytes() as count:
            step = Step(run)
            step(), step()
        return count.peak

    return measure


def importing(run: SimpleNamespace) -> Run:
    """Milliseconds of the processor for `import peft_sage` in a fresh process that has imported peft."""
    code = "import time, peft; start = time.process_time(); import peft_sage; print(time.process_time() - start)"

    def measure() -> float:
        command = [sys.executable, "-c", code]
        return 1000 * float(subprocess.check_output(command, cwd=ROOT))

    return measure


class StepClock(TrainerCallback):
    """Seconds from the second step of training to its end."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start after the first step, in which memory is found."""
        if state.global_step == 1:
            self.start = time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds = time.process_time() - self.start


def trainer(run: SimpleNamespace) -> Run:
    """Seconds of a training step by `SageTrainer`, or by a loop that is written by hand over the same data."""
    torch.manual_seed(1)
    side = run.sizes["image"]
    pixels = torch.randn(run.batch * run.steps, 3, side, side)
    items = [{"pixel_values": p, "label": i % 2} for i, p in enumerate(pixels)]

    folder = tempfile.TemporaryDirectory()

    def by_trainer() -> float:
        arguments = SageTrainingArguments(
            output_dir=folder.name,
            per_device_train_batch_size=run.batch,
            num_train_epochs=1,
            text_prior=1.0,
            text_guidance=0.0,
            patch_dropout=run.patch_dropout,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock = StepClock()
        SageTrainer(
            classifier(run), arguments, train_dataset=items, callbacks=[clock]
        ).train()
        return clock.seconds / (run.steps - 1)

    def by_hand() -> float:
        model = classifier(run).train().to(run.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        loss = SageLoss.from_labels([0, 1] * len(items), run.classes, text_prior=1.0)
        batches = DataLoader(
            items, run.batch, shuffle=True, collate_fn=ImageCollator(None)
        )
        for number, batch in enumerate(batches):
            if number == 1:
                start = time.process_time()
            labels = batch.pop("labels").to(run.device)
            pixels = batch["pixel_values"].to(run.device)
            loss(model(pixels), labels).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return (time.process_time() - start) / (run.steps - 1)

    return by_trainer if run.path == "trainer" else by_hand


MEASURES: dict[str, Callable[[SimpleNamespace], Run]] = {
    "step": Step,
    "inference": inference,
    "adapters": adapters,
    "peak": peak,
    "importing": importing,
    "trainer": trainer,
}
