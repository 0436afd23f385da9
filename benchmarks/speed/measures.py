# SPDX-License-Identifier: Apache-2.0
"""What `rows.yaml` can ask for: each takes the settings of a run and returns what is timed, or what gives a value."""

from __future__ import annotations

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

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
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
    encode_class_descriptions,
)
from peft_sage.layer import SageLayer


ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "examples" / "emoji_lt" / "tiny-clip"
TEMPLATES = [
    "a photo of a {}.",
    "a bad photo of the {}.",
    "a close-up of a {}.",
    "a {} in the wild.",
    "a drawing of a {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a {} at night.",
]
#: A run: timed if it returns nothing; otherwise it returns what is measured.
Run = Callable[[], float | None]


def vision_config(tower: dict[str, int]) -> dict[str, Any]:
    """Return the settings of transformers for a tower of `rows.yaml`."""
    return {
        "hidden_size": tower["width"],
        "intermediate_size": 4 * tower["width"],
        "num_hidden_layers": tower["blocks"],
        "num_attention_heads": tower["heads"],
        "patch_size": tower["patch"],
        "image_size": tower["image"],
    }


@cache
def frozen_tower(sizes: tuple[tuple[str, int], ...], device: str) -> nn.Module:
    """Return an image tower with random weights: speed does not depend on them."""
    tower = dict(sizes)
    torch.manual_seed(0)
    config = CLIPVisionConfig(**vision_config(tower), projection_dim=tower["embedding"])
    with torch.device(device):
        return CLIPVisionModelWithProjection(config).requires_grad_(False)


def classifier(run: SimpleNamespace) -> nn.Module:
    """Return a classifier with what its method trains. All share one copy of the frozen weights."""
    base = frozen_tower(tuple(run.sizes.items()), run.device)
    shared = (
        {}
        if run.method == "full"
        else {id(t): t for t in (*base.parameters(), *base.buffers())}
    )
    torch.manual_seed(0)
    model = SageClassifier(
        copy.deepcopy(base, shared), torch.randn(run.classes, run.sizes["embedding"])
    )
    if run.method in ("head", "full"):
        return model.requires_grad_(True) if run.method == "full" else model
    if run.method == "lora":
        targets = ["q_proj", "v_proj"]
        config = LoraConfig(
            r=run.r,
            lora_alpha=run.r,
            target_modules=targets,
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
        self.model, self.run = classifier(run).train(), run
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
        if getattr(run, "compile", False):
            self.loss = torch.compile(
                self.loss, fullgraph=True, backend=getattr(run, "backend", "inductor")
            )
            # The moving average of the loss gets its shape in the first step: compiled twice.
            for _ in range(3):
                self()

    def loss(self, dtype: str | None = None) -> torch.Tensor:
        dtype = getattr(torch, dtype or self.run.dtype)
        with torch.autocast(
            self.run.device, dtype=dtype, enabled=dtype != torch.float32
        ):
            outputs = self.model(**self.batch)
        return self.function(outputs, self.labels)

    def __call__(self) -> None:
        self.loss().backward()
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
    step, calls = Step(run), []
    layers = [
        module for module in step.model.modules() if isinstance(module, SageLayer)
    ]
    hooks = [
        m.register_forward_hook(
            lambda m, args, output: calls.append((m, args[0], output))
        )
        for m in layers
    ]
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


def agreement(run: SimpleNamespace) -> Run:
    """1 less the cosine between the gradients in bf16 and in float32, of all trained parameters as one vector."""

    def measure() -> float:
        step = Step(run)
        gradients = []
        for dtype in ("float32", "bfloat16"):
            parts = torch.autograd.grad(
                step.loss(dtype), step.trained, allow_unused=True
            )
            gradients.append(
                torch.cat(
                    [part.flatten().double() for part in parts if part is not None]
                )
            )
        return 1 - F.cosine_similarity(*gradients, dim=0).item()

    return measure


def importing(run: SimpleNamespace) -> Run:
    """Milliseconds of the processor for `import peft_sage` in a fresh process that has imported peft."""
    code = "import time, peft; start = time.process_time(); import peft_sage; print(time.process_time() - start)"

    def measure() -> float:
        output = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        return 1000 * float(output.stdout)

    return measure


def clip_model(run: SimpleNamespace) -> CLIPModel:
    """Return a whole CLIP with random weights; its text tower is two thirds as wide as the image tower."""
    torch.manual_seed(0)
    width, tokenizer = (
        max(32, run.sizes["width"] * 2 // 3),
        AutoTokenizer.from_pretrained(TOKENIZER),
    )
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 64),
    }
    text |= {"num_hidden_layers": run.sizes["blocks"], "vocab_size": 49408}
    text |= {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    vision, projection = vision_config(run.sizes), run.sizes["embedding"]
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    ).eval()


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def text(run: SimpleNamespace) -> Run:
    """Encode 8 texts for each of `texts` classes; the same by the tower alone; or from the disk."""
    tokenizer, clip = (
        AutoTokenizer.from_pretrained(TOKENIZER),
        clip_model(run).to(run.device),
    )
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bcdfglmnprstv" for b in "aeiou"]
    words = [
        [
            "".join(rng.choice(syllables, rng.integers(2, 5)))
            for _ in range(rng.integers(1, 5))
        ]
        for _ in range(run.texts)
    ]
    names = [f"{' '.join(parts)} {i}" for i, parts in enumerate(words)]
    if run.path != "tower":
        kept = (
            {"cache_dir": Path(_folder().name, "texts")} if run.path == "cached" else {}
        )

        def encode() -> None:
            encode_class_descriptions(clip, tokenizer, names, TEMPLATES, **kept)

        return encode
    ids = sorted(
        tokenizer([template.format(name) for name in names for template in TEMPLATES])[
            "input_ids"
        ],
        key=len,
    )
    batches = [
        tokenizer.pad({"input_ids": ids[i : i + 256]}, return_tensors="pt")
        for i in range(0, len(ids), 256)
    ]

    @torch.no_grad()
    def tower_alone() -> None:
        for batch in batches:
            clip.get_text_features(**batch.to(run.device))

    return tower_alone


def _photograph(path: Path, rng: np.random.Generator) -> None:
    """Write a smooth random picture with a little noise, of the size that photographs have in iNaturalist."""
    smooth = PIL.Image.fromarray(
        rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    ).resize((800, 600))
    noisy = np.clip(np.array(smooth) + rng.normal(0, 6, (600, 800, 1)), 0, 255).astype(
        np.uint8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(noisy).save(path, quality=90)


@cache
def _photographs(count: int) -> list[str]:
    folder, rng = Path(_folder().name, "photographs"), np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        _photograph(file, rng)
    return [str(file) for file in files]


def photos(run: SimpleNamespace) -> Run:
    """Decode, resize and crop `photos` JPEG files in this process; the seconds of a core."""
    processor, files = CLIPImageProcessor(), _photographs(run.photos)
    plain = ImageCollator(processor)
    crops = ImageCollator(processor, "resized-crop-flip")
    column = datasets.Dataset.from_dict({"image": files})
    column = column.cast_column("image", datasets.Image())

    def by_pil(index: int) -> np.ndarray:
        image = PIL.Image.open(files[index]).convert("RGB")
        width, height = (round(side * 224 / min(image.size)) for side in image.size)
        left, top = (width - 224) // 2, (height - 224) // 2
        resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + 224, top + 224)))

    def by_datasets(index: int) -> Any:
        return processor(column[index]["image"].convert("RGB"), return_tensors="pt")

    read = {
        "centre": lambda index: plain.prepare([files[index]]),
        "crops": lambda index: crops([files[index]]),
        "pil": by_pil,
        "datasets": by_datasets,
    }[run.path]

    def measure() -> float:
        start = time.process_time()
        for index in range(len(files)):
            read(index)
        return time.process_time() - start

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

    def by_trainer() -> float:
        arguments = SageTrainingArguments(
            output_dir=_folder().name,
            per_device_train_batch_size=run.batch,
            num_train_epochs=1,
            min_steps=0,
            text_prior=1.0,
            text_guidance=0.0,
            save_strategy="no",
            eval_strategy="no",
            load_best_model_at_end=False,
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
    "agreement": agreement,
    "importing": importing,
    "text": text,
    "photos": photos,
    "trainer": trainer,
}
