# SPDX-License-Identifier: Apache-2.0
"""What a user does with the Hub, in a process of its own: `HF_ENDPOINT` counts when huggingface_hub is imported."""

import json
import shutil
import tempfile

import huggingface_hub
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModel, CLIPModel, Trainer, TrainingArguments

from peft_sage import SageClassifier, SageConfig, SageLoss
from tests.conftest import byte_tokenizer, randomise, tiny_clip


CARD = "---\nlibrary_name: peft\n---\n# My own card\n"
IMAGES = torch.randn(4, 3, 16, 16)


def base() -> CLIPModel:
    return CLIPModel.from_pretrained("user/clip").eval()


def features(model) -> torch.Tensor:
    return model.eval().get_image_features(IMAGES).pooler_output


def round_trip(facts: dict) -> None:
    tiny_clip().push_to_hub("user/clip")
    byte_tokenizer().push_to_hub("user/clip")
    model = get_peft_model(
        base(),
        SageConfig(class_descriptions={"cat": "fur", "dog \N{DOG FACE}": "bark"}),
    )
    randomise(model)
    expected = features(model)
    model.push_to_hub("user/adapter", private=True)
    huggingface_hub.ModelCard(CARD).push_to_hub("user/adapter")
    model.push_to_hub("user/adapter")  # the card stays

    loaded = {
        "PeftModel": PeftModel.from_pretrained(base(), "user/adapter"),
        "low_cpu_mem_usage": PeftModel.from_pretrained(
            base(), "user/adapter", low_cpu_mem_usage=True
        ),
        "AutoPeftModel": AutoPeftModel.from_pretrained("user/adapter"),
        "AutoModel": AutoModel.from_pretrained("user/adapter"),
        "load_adapter": base(),
    }
    loaded["load_adapter"].load_adapter("user/adapter")
    facts.update(
        {
            route: torch.allclose(features(model), expected, atol=1e-6)
            for route, model in loaded.items()
        }
    )
    facts["class_names"] = PeftConfig.from_pretrained("user/adapter").class_names


def refusals(facts: dict) -> None:
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    model = base()
    before = [type(module) for module in model.modules()]
    for repo_id in ("user/adapter", "user/no-such-adapter"):
        try:
            PeftModel.from_pretrained(model, repo_id, token=False)
        except ValueError as error:
            facts[f"refused {repo_id}"] = str(error)
    facts["unchanged"] = [type(module) for module in model.modules()] == before


def trainer(facts: dict) -> None:
    config = SageConfig(guidance=torch.randn(3, 4), modules_to_save=["class_head"])
    model = get_peft_model(SageClassifier(base(), torch.randn(3, 16)), config)
    data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(IMAGES)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, hub_model_id="user/trained", max_steps=2, report_to=[], use_cpu=True
        )
        run = Trainer(
            model, args, train_dataset=data, compute_loss_func=SageLoss([9, 3, 1])
        )
        run.train()
        run.push_to_hub()
    model.eval()
    again = PeftModel.from_pretrained(
        SageClassifier(base(), torch.randn(3, 16)), "user/trained"
    )
    facts["Trainer"] = torch.allclose(
        again(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits, atol=1e-5
    )


def classifier(facts: dict) -> None:
    """The head alone, and the adapters of what was loaded."""
    made = SageClassifier.from_texts("user/clip", ["cat", "owl"]).eval()
    made.head.weight.data += torch.randn(2, 16)
    made.push_to_hub("user/head", private=True)
    loaded = SageClassifier.from_pretrained("user/head")
    get_peft_model(made, SageConfig())
    randomise(made)
    made.push_to_hub("user/whole")
    whole = SageClassifier.from_pretrained("user/whole")
    with torch.no_grad():
        facts["classifier"] = (
            torch.equal(loaded.head.weight, made.class_head.original_module.weight)
            and loaded.class_names == ["cat", "owl"]
            and torch.allclose(whole(IMAGES).logits, made.eval()(IMAGES).logits)
        )


if __name__ == "__main__":
    facts: dict = {}
    for job in (round_trip, trainer, classifier, refusals):
        job(facts)
    print("FACTS" + json.dumps(facts))
