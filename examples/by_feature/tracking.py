# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, offline: accuracies by group and a picture of what the adapter attends to.

python examples/by_feature/tracking.py
tensorboard --logdir tracking
"""

from accelerate import Accelerator
from demo import evaluate, load, parse, report, train
from peft import get_peft_model

from peft_sage import SageConfig, SageLoss, attention_maps, plot_attention


args = parse(__doc__)
demo = load(args)
accelerator = Accelerator(log_with="tensorboard", project_dir=args.output_dir, cpu=True)
accelerator.init_trackers("logs", {"lr": args.lr, "epochs": args.epochs})

config = SageConfig(class_descriptions=demo.descriptions, modules_to_save=["class_head"])
model = get_peft_model(demo.classifier(), config)
loss = SageLoss(demo.class_counts)
epochs, args.epochs = args.epochs, 1
for epoch in range(epochs):
    train(model, demo.splits["train"], loss, args)
    scores = evaluate(model, demo.splits["validation"], demo.class_counts)
    report(f"epoch {epoch + 1}", scores)
    values = {name: scores[name].item() for name in ("overall", "macro", "many", "medium", "few", "worst")}
    accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=epoch)

    pixel_values = demo.splits["validation"][0]["pixel_values"][None]
    maps = attention_maps(model, pixel_values)[0]
    figure = plot_attention(demo.splits["validation"].picture(0), maps, model.peft_config["default"].row_names)
    accelerator.get_tracker("tensorboard", unwrap=True).add_figure("attention", figure, epoch)
accelerator.end_training()
