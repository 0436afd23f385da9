# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a CLIP-like model on long-tailed images.

On your own images (`photos/CLASS/*.jpg`, or `photos/train/CLASS/*.jpg` and `photos/test/CLASS/*.jpg`):

    python finetune.py --dataset photos --model openai/clip-vit-base-patch16

On several GPUs: `accelerate launch finetune.py ...`. Without arguments it runs on the demo, drawings and a small CLIP,
if the folder `emoji_lt` is next to this file. It trains adapters and head, reports the accuracy on classes with many,
medium and few training images, saves what it trained, and checks that the saved files give it back.
"""

# ruff: noqa: E402
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import HfArgumentParser


# Has to come before torch: threads that spin while they wait make a busy machine slow.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
DEMO = Path(__file__).parent / "emoji_lt"
DEMO_MODEL = str(DEMO / "tiny-clip") if DEMO.is_dir() else None


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def find_source(name: str | None, flag: str, kind: str) -> str:
    """Return a path as an absolute one, a repository by its name; ValueError if there is neither."""
    if name is None:
        raise ValueError(f"{flag} is missing: there is no demo next to finetune.py")
    path = os.path.abspath(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    if name.startswith((".", "/", "~")):
        raise ValueError(f"{flag} {name!r} does not exist")
    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().repo_info(name, repo_type=kind, timeout=4)
    except RepositoryNotFoundError:
        raise ValueError(f"{flag} {name!r} is neither here nor on the Hub") from None
    except Exception as error:
        raise ValueError(
            f"{flag} {name!r} does not exist here, and the Hub cannot be asked: {error}"
        ) from error
    return name


@dataclass
class DataArguments:
    _argument_group_name = "Data"
    dataset: str | None = option(
        str(DEMO) if DEMO.is_dir() else None,
        "Folder of class folders (photos/CLASS/*.jpg) or tables; a table; a Hub id",
    )
    descriptions: str | None = option(None, "JSON or CSV with texts for each class")
    image_column: str = option("image", "Column with images or file names")
    label_column: str = option("label", "Column with the classes")
    group_column: str | None = option(None, "Column of what must not be divided")
    train_split: str = option("train", "Split to train on")
    validation_split: str = option("validation", "Split that chooses the epoch")
    test_split: str = option("test", "Split that is reported")
    on_bad_image: Literal["error", "skip"] = option("error", "If one is unreadable")
    imbalance_ratio: float | None = option(None, "Thin the training images to a tail")

    def __post_init__(self) -> None:
        self.dataset = find_source(self.dataset, "--dataset", "dataset")
        if self.descriptions and not Path(self.descriptions).is_file():
            raise ValueError(f"--descriptions {self.descriptions!r} is not a file")


@dataclass
class ModelArguments:
    _argument_group_name = "Model"
    model: str | None = option(DEMO_MODEL, "Hub id or folder of a CLIP-like model")
    method: Literal["sage", "adaptformer", "lora", "head"] = option("sage", "Adapter")
    loss: Literal["sage", "la", "ce"] = option("sage", "la: logit adjustment")
    r: int = option(16, "Width of adapter or LoRA")
    last_blocks: int | None = option(None, "Blocks to adapt, from the last; or all")
    guidance_rows: int = option(64, "Most rows that the adapters attend to")

    def __post_init__(self) -> None:
        self.model = find_source(self.model, "--model", "model")
        if Path(self.model, "adapter_config.json").is_file():
            raise ValueError(
                f"--model {self.model!r} is an adapter: give its base model"
            )
        for name, low in (("r", 1), ("last_blocks", 1), ("guidance_rows", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} must be at least {low}, got {value}")


if __name__ == "__main__" and not {"--config", "-h", "--help"} & {*sys.argv}:
    try:  # what follows takes seconds to import
        kinds: Any = (DataArguments, ModelArguments)
        parser = HfArgumentParser(kinds, allow_abbrev=False)
        parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

from peft import LoraConfig, PeftConfig

from peft_sage import SageClassifier, SageConfig, SageTrainer
from peft_sage.command_line import RunArguments, check_run, claim_output_dir, run
from peft_sage.run_files import check_saved_model, fingerprint
from peft_sage.towers.mlps import find_mlps


#: Logit adjustment and cross-entropy are the Sage loss without its other terms.
NO_TEXTS = {"compensation": 0.0, "text_prior": 0.0, "text_guidance": 0.0}
LOSSES = {"sage": {}, "la": NO_TEXTS, "ce": NO_TEXTS | {"tau": 0.0}}


def peft_config(args: ModelArguments, classifier: SageClassifier) -> PeftConfig | None:
    """What is trained in addition to the head."""
    depth, layers = len(find_mlps(classifier)), None
    if args.last_blocks is not None:
        layers = list(range(max(0, depth - args.last_blocks), depth))
    if args.method == "head":
        return None
    if args.method == "lora":
        return LoraConfig(
            r=args.r,
            lora_alpha=args.r,
            target_modules=["q_proj", "v_proj", "query", "value"],
            exclude_modules=r".*text_model.*",
            layers_to_transform=layers,
        )
    rows = 0 if args.method == "adaptformer" else args.guidance_rows
    return SageConfig(r=args.r, guidance_rows=rows, layers_to_transform=layers)


def finetune(
    data_args: DataArguments, model_args: ModelArguments, args: RunArguments
) -> Any:
    """Do the whole job; return its `RunResults`."""
    # They take seconds to import, and wrong flags are known before.
    from peft_sage.data import load_images
    from peft_sage.report import RunResults, write_report

    for name, value in LOSSES[model_args.loss].items():
        setattr(args, name, value)
    settings = vars(data_args) | vars(model_args)
    check_run(args)
    claim_output_dir(args, settings, args.overwrite_output_dir, write=False)
    push, args.push_to_hub = args.push_to_hub, False  # at the end, with the card
    is_main, folder = args.process_index == 0, Path(str(args.output_dir))

    reading = {**vars(data_args), "source": data_args.dataset, "seed": args.seed}
    del reading["dataset"], reading["imbalance_ratio"]
    data = load_images(**reading)
    if data_args.imbalance_ratio is not None:
        data = data.thin(data_args.imbalance_ratio, args.seed)
    if is_main:
        print(data)
    # On a CPU the gradient of fused attention is slow in bfloat16.
    fused_is_slow = args.bf16 and args.use_cpu
    attention: Any = {"attn_implementation": "eager"} if fused_is_slow else {}
    with args.main_process_first():
        classifier = SageClassifier.from_texts(
            str(model_args.model),
            data.texts,
            cache_dir=folder / "text_embeds",
            **attention,
        )
    config = peft_config(model_args, classifier)
    trainer = SageTrainer(
        classifier, args, data.train, data.validation, peft_config=config
    )
    trainer.grouped_by = data.grouped_by
    settings["data"] = fingerprint([*data.train["file"], *data.train["label"]])
    claim_output_dir(args, settings, args.overwrite_output_dir)
    trainer.train(args.resume_from_checkpoint)

    method = model_args.method
    results = RunResults.collect(trainer, data, method=method, settings=settings)
    trainer.save_model()
    if is_main:
        print(results)
        write_report(folder, results, data, repo_id=args.hub_model_id)
        if not trainer.is_fsdp_enabled:  # then no process has the whole model
            check_saved_model(trainer.classifier, folder, data.test)
        print(f"Look at {folder / 'report.html'}")
    if push:
        print(f"Pushed to {trainer.push_to_hub()}")
    return results


if __name__ == "__main__":
    run(finetune, (DataArguments, ModelArguments, RunArguments), str(__doc__))
