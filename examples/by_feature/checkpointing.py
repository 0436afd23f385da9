# SPDX-License-Identifier: Apache-2.0
"""Checkpoint and resume with Trainer: run it, stop it (Ctrl-C, or `--stop-after STEPS`), run it again.

The checkpoints hold the adapter, the head and the state of the optimizer, not the base model.

python examples/by_feature/checkpointing.py --stop-after 30
python examples/by_feature/checkpointing.py
"""

from demo import load, parse
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from peft_sage import LongTailCallback, SageConfig, SageLoss


class StopAfter(TrainerCallback):
    """Ends the training early, as a queue's time limit would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


args = parse(__doc__, stop_after=0, save_steps=10)
demo = load(args)
config = SageConfig(class_descriptions=demo.descriptions, modules_to_save=["class_head"])
model = get_peft_model(demo.classifier(), config)
loss = SageLoss(demo.class_counts)
trainer = Trainer(
    model,
    TrainingArguments(
        args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to=[],
    ),
    train_dataset=demo.splits["train"],
    compute_loss_func=loss,
    callbacks=[LongTailCallback(loss, demo.class_counts), *([StopAfter(args.stop_after)] if args.stop_after else [])],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
trainer.save_model()
print(f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
