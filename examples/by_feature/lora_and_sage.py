# SPDX-License-Identifier: Apache-2.0
"""LoRA in the attention beside Sage at the MLP: both are trained, and each is saved in a folder of its own.

python examples/by_feature/lora_and_sage.py
"""

from pathlib import Path

import torch
from demo import evaluate, load, parse, report, train
from peft import LoraConfig, PeftModel, get_peft_model

from peft_sage import SageConfig, SageLoss


args = parse(__doc__)
classifier, splits, data = load(args)
counts = torch.as_tensor(data.class_counts())
sage = get_peft_model(classifier, SageConfig(), adapter_name="semantic")

# The second PeftModel goes around the model inside the first; the text tower stays as it is.
lora_config = LoraConfig(r=8, target_modules=r".*vision_model.*\.(q_proj|v_proj)")
both = get_peft_model(sage.get_base_model(), lora_config, adapter_name="attention")
# It has frozen everything but its own adapter.
sage.set_adapter("semantic")
for name, parameter in both.named_parameters():
    if "lora_" in name:
        parameter.requires_grad_(True)

train(both, splits["train"], SageLoss(counts), args)
report("LoRA and Sage", evaluate(both, splits["test"], counts))

folder = Path(args.output_dir)
sage.save_pretrained(folder, selected_adapters=["semantic"])
both.save_pretrained(folder, selected_adapters=["attention"])

sage_again = PeftModel.from_pretrained(
    load(args)[0], folder / "semantic", adapter_name="semantic"
)
base = sage_again.get_base_model()
both_again = PeftModel.from_pretrained(
    base, folder / "attention", adapter_name="attention"
).eval()
sage_again.set_adapter(
    "semantic"
)  # the second one has switched the head of the first off
image = splits["test"][0]["pixel_values"][None]
with torch.no_grad():
    print(
        "loaded equals saved:",
        torch.allclose(both_again(image).logits, both(image).logits, atol=1e-5),
    )
