# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import CLIPVisionModelWithProjection

from peft_sage import SageClassifier, SageConfig, encode_class_descriptions
from tests.conftest import byte_tokenizer, tiny_clip, tiny_siglip


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_untrained_it_is_zero_shot(make, pixel_values):
    model, tokenizer = make(), byte_tokenizer()
    names = ["cat", "dog", "cow"]
    embeddings = encode_class_descriptions(model, tokenizer, names, templates=["{}"])
    padding = "max_length" if model.config.model_type == "siglip" else "longest"
    inputs = tokenizer(names, return_tensors="pt", padding=padding, max_length=40)
    with torch.no_grad():
        own = model(input_ids=inputs["input_ids"], pixel_values=pixel_values).logits_per_image
        ours = SageClassifier(model, embeddings, scale=10.0)(pixel_values).logits
        own = (own - getattr(model, "logit_bias", 0)) / model.logit_scale.exp()
    torch.testing.assert_close(ours, 10 * own, rtol=1e-4, atol=1e-5)


def test_loss_is_cross_entropy(clip, pixel_values):
    classifier = SageClassifier(clip, torch.randn(5, 16))
    labels = torch.tensor([0, 4, 2, 2])
    output = classifier(pixel_values, labels=labels)
    assert torch.equal(output.loss, F.cross_entropy(output.logits, labels))
    assert classifier(pixel_values).loss is None


def test_head_is_invariant_to_the_size_of_its_rows(clip, pixel_values):
    classifier = SageClassifier(clip, torch.randn(5, 16))
    before = classifier(pixel_values).logits
    with torch.no_grad():
        classifier.class_head.weight *= 7
    torch.testing.assert_close(classifier(pixel_values).logits, before)


def test_vision_only_model_and_a_number_of_classes(clip, pixel_values):
    vision = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    assert SageClassifier(vision, 5)(pixel_values).logits.shape == (4, 5)


def test_set_class_embeddings_reaches_the_trained_head(clip, pixel_values):
    model = get_peft_model(SageClassifier(clip, 5), SageConfig(modules_to_save=["class_head"]))
    embeddings = torch.randn(8, 16)
    model.set_class_embeddings(embeddings)
    expected = SageClassifier(tiny_clip(), embeddings)(pixel_values).logits
    torch.testing.assert_close(model(pixel_values).logits, expected)
    with pytest.raises(ValueError, match=r"shape \(K, 16\), got \(8, 15\)"):
        model.set_class_embeddings(torch.randn(8, 15))


def test_half_precision_tower_with_float32_head(clip, pixel_values):
    classifier = SageClassifier(clip.to(torch.bfloat16), torch.randn(5, 16))
    assert classifier(pixel_values.bfloat16()).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("embeddings", "scale", "error", "message"),
    [
        ([[1.0]], 25.0, TypeError, "`text_embeds`"),
        (0, 25.0, ValueError, "`text_embeds` must be at least one class, got 0"),
        (torch.randn(5), 25.0, ValueError, "`text_embeds` must have the shape"),
        (torch.full((2, 16), float("nan")), 25.0, ValueError, "`text_embeds` must be finite"),
        (torch.randn(5, 16), 0.0, ValueError, "`scale` must be positive"),
    ],
)
def test_errors(clip, embeddings, scale, error, message):
    with pytest.raises(error, match=message):
        SageClassifier(clip, embeddings, scale)
