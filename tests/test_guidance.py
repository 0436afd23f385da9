# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModel

from peft_sage import SageClassifier, encode_class_descriptions
from tests.conftest import byte_tokenizer, tiny_clip, tiny_siglip


def by_hand(model, tokenizer, text: str) -> torch.Tensor:
    """One text through the model's public interface, without batches or padding tricks."""
    padding = "max_length" if model.config.model_type == "siglip" else False
    inputs = tokenizer([text], return_tensors="pt", padding=padding, max_length=40, truncation=True)
    inputs = {"input_ids": inputs["input_ids"]}
    return F.normalize(model.get_text_features(**inputs).pooler_output[0], dim=-1)


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_rows_are_means_of_normalised_embeddings(make, batch_size):
    model, tokenizer = make(), byte_tokenizer()
    descriptions = {"cat": ["fur", "a long tail"], "dog": "barks", "ant": ["six legs", "fur", "tiny"]}
    rows = encode_class_descriptions(model, tokenizer, descriptions, batch_size=batch_size)
    assert rows.shape == (3, by_hand(model, tokenizer, "fur").numel()) and rows.dtype == torch.float32
    for row, texts in zip(rows, descriptions.values(), strict=True):
        texts = [texts] if isinstance(texts, str) else texts
        expected = F.normalize(torch.stack([by_hand(model, tokenizer, text) for text in texts]).mean(0), dim=-1)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_long_work_shows_a_progress_bar_on_the_main_process_only(clip, capsys, monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    def shown(count, **options):
        texts = [[f"text {i}"] for i in range(count)]
        encode_class_descriptions(clip, byte_tokenizer(), texts, batch_size=1, **options)
        return "Encoding class descriptions" in capsys.readouterr().err

    assert shown(21) == shown(2, progress_bar=True) == (rank == 0)
    assert not shown(20) and not shown(21, progress_bar=False)


def test_names_go_into_templates(clip):
    names = encode_class_descriptions(clip, byte_tokenizer(), ["cat", "{}"], templates=["a {}", "{} x"])
    texts = encode_class_descriptions(clip, byte_tokenizer(), [["a cat", "cat x"], ["a {}", "{} x"]])
    torch.testing.assert_close(names, texts)


def test_default_template(clip):
    names = encode_class_descriptions(clip, byte_tokenizer(), ["c", "d"])
    with warnings.catch_warnings(record=True):
        texts = encode_class_descriptions(clip, byte_tokenizer(), [["a photo of a c."], ["a photo of a d."]])
    torch.testing.assert_close(names, texts)


def test_repeated_names_are_warned_of_by_name(clip):
    with pytest.warns(UserWarning, match=r"\['crane'\]"):
        encode_class_descriptions(clip, byte_tokenizer(), ["crane", "cat", "crane"], templates=["{}"])


def test_identical_rows_are_an_error():
    clip = tiny_clip()
    # The tower pools the position of a token that the tokenizer never writes: the first position for every text.
    clip.text_model.eos_token_id = clip.config.text_config.eos_token_id = 299
    with pytest.raises(ValueError, match="same embedding.*eos_token_id"):
        encode_class_descriptions(clip, byte_tokenizer(), [["cat"], ["dog"], ["cow"]])


def test_long_texts_are_cut_with_one_warning(clip):
    long = "a very long description of a class that says it all"
    with pytest.warns(UserWarning, match="2 of 3 class descriptions are longer .* 40 tokens") as caught:
        rows = encode_class_descriptions(clip, byte_tokenizer(), [["cat"], [long], [long + " that goes on"]])
    assert len(caught) == 1 and rows.isfinite().all()
    torch.testing.assert_close(rows[1], rows[2])


def test_model_is_left_as_it_was(clip):
    clip.vision_model.train()
    encode_class_descriptions(clip, byte_tokenizer(), ["cat", "dog"], templates=["{}"])
    assert clip.vision_model.training and not clip.text_model.training
    assert all(p.grad is None for p in clip.parameters())


def test_errors(clip):
    with pytest.raises(ValueError, match="`batch_size`"):
        encode_class_descriptions(clip, byte_tokenizer(), ["cat"], batch_size=0)
    with pytest.raises(ValueError, match="no text tower"):
        encode_class_descriptions(CLIPVisionModel(clip.config.vision_config), byte_tokenizer(), ["cat"])


def test_unicode_and_emoji(clip):
    rows = encode_class_descriptions(clip, byte_tokenizer(), [["鳥"], ["🐦"], ["oiseau é"]])
    assert rows.isfinite().all()


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_classifier_encodes_through_its_clip(make):
    clip = make()
    classifier = SageClassifier(clip, 2)
    torch.testing.assert_close(
        encode_class_descriptions(classifier, byte_tokenizer(), [["cat"], ["dog"]]),
        encode_class_descriptions(clip, byte_tokenizer(), [["cat"], ["dog"]]),
    )


def test_tokenizer_that_is_a_function(clip):
    def tokenize(texts: list[str]) -> torch.Tensor:
        return byte_tokenizer()(texts, padding="max_length", max_length=40, return_tensors="pt")["input_ids"]

    torch.testing.assert_close(
        encode_class_descriptions(clip, tokenize, [["cat"], ["a dog"], ["an ox"]], batch_size=2),
        encode_class_descriptions(clip, byte_tokenizer(), [["cat"], ["a dog"], ["an ox"]]),
    )
