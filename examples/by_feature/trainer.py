# SPDX-License-Identifier: Apache-2.0
"""Trainer: one argument for the loss, one callback that measures the mismatch anew before each epoch.

python examples/by_feature/trainer.py
"""

from demo import load, parse
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_sage import LongTailCallback, SageConfig, SageLoss


args = parse(__doc__)
demo = load(args)
config = SageConfig(class_descriptions=demo.descriptions, modules_to_save=["class_head"])
model = get_peft_model(demo.classifier(), config)

loss = SageLoss(demo.class_counts)
long_tail = LongTailCallback(loss, demo.class_counts)
trainer = Trainer(
    model,
    TrainingArguments(
        args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=args.lr,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="macro",
        report_to=[],
    ),
    train_dataset=demo.splits["train"],
    eval_dataset=demo.splits["validation"],
    compute_loss_func=loss,
    callbacks=[long_tail],
    compute_metrics=long_tail.compute_metrics,
)
trainer.train()
print(trainer.evaluate(demo.splits["test"], metric_key_prefix="test"))
trainer.save_model()
