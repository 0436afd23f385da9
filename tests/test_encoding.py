# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Replace
from transformers import CLIPVisionModel

from peft_sage import encode_class_descriptions, pool_guidance
from tests.conftest import byte_tokenizer, tiny_clip, tiny_siglip


def by_hand(model, tokenizer, text: str) -> torch.Tensor:
    """One text through the model's public interface, without batches or padding tricks."""
    padding = "max_length" if model.config.model_type == "siglip" else False
    inputs = tokenizer(
        [text], return_tensors="pt", padding=padding, max_length=40, truncation=True
    )
    inputs = {"input_ids": inputs["input_ids"]}
    return F.normalize(model.get_text_features(**inputs).pooler_output[0], dim=-1)


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_rows_are_means_of_normalised_embeddings(make, batch_size):
    model = make()
    tokenizer = byte_tokenizer()
    descriptions = {
        "cat": ["fur", "a long tail"],
        "dog": "barks",
        "ant": ["six legs", "fur", "tiny"],
    }
    rows = encode_class_descriptions(
        model, tokenizer, descriptions, batch_size=batch_size
    )
    assert (
        rows.shape == (3, by_hand(model, tokenizer, "fur").numel())
        and rows.dtype == torch.float32
    )
    for row, texts in zip(rows, descriptions.values(), strict=True):
        texts = [texts] if isinstance(texts, str) else texts
        expected = F.normalize(
            torch.stack([by_hand(model, tokenizer, text) for text in texts]).mean(0),
            dim=-1,
        )
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_names_go_into_templates(clip):
    names = encode_class_descriptions(
        clip, byte_tokenizer(), ["cat", "{}"], templates=["a {}", "{} x"]
    )
    texts = encode_class_descriptions(
        clip, byte_tokenizer(), [["a cat", "cat x"], ["a {}", "{} x"]]
    )
    torch.testing.assert_close(names, texts)


def test_identical_rows_are_an_error():
    clip = tiny_clip()
    # The tower pools the position of a token that the tokenizer never writes: the first position for every text.
    clip.text_model.eos_token_id = clip.config.text_config.eos_token_id = 299
    with pytest.raises(ValueError, match="same embedding.*eos_token_id"):
        encode_class_descriptions(clip, byte_tokenizer(), [["cat"], ["dog"], ["cow"]])


def test_long_texts_are_cut_with_one_warning(clip):
    long = "a very long description of a class that says it all"
    with pytest.warns(
        UserWarning, match="2 of 3 class descriptions were cut to 40 tokens"
    ) as caught:
        rows = encode_class_descriptions(
            clip, byte_tokenizer(), [["cat"], [long], [long + " that goes on"]]
        )
    assert len(caught) == 2 and rows.isfinite().all()
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
        encode_class_descriptions(
            CLIPVisionModel(clip.config.vision_config), byte_tokenizer(), ["cat"]
        )


def test_tokenizer_that_is_a_function(clip):
    def tokenize(texts: list[str]) -> torch.Tensor:
        return byte_tokenizer()(
            texts, padding="max_length", max_length=40, return_tensors="pt"
        )["input_ids"]

    torch.testing.assert_close(
        encode_class_descriptions(
            clip, tokenize, [["cat"], ["a dog"], ["an ox"]], batch_size=2
        ),
        encode_class_descriptions(
            clip, byte_tokenizer(), [["cat"], ["a dog"], ["an ox"]]
        ),
    )


def test_texts_that_are_equal_to_the_tokenizer_are_named(clip):
    tokenizer = byte_tokenizer()
    lower = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        model_max_length=40,
    )
    lower.backend_tokenizer.normalizer = Lowercase()
    for names, tokenizer in (
        (["snowy_owl", "snowy owl", "cow"], byte_tokenizer()),
        (["Owl", "owl", "cow"], lower),
    ):
        with pytest.warns(UserWarning, match=f"'{names[0]}' and '{names[1]}'"):
            rows = encode_class_descriptions(clip, tokenizer, names)
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    with pytest.warns(UserWarning, match="0 and 2"):
        encode_class_descriptions(clip, tokenizer, [["a"], ["b"], ["a"]])


def test_kept_rows_are_of_this_tokenizer_and_activation_on_any_machine(clip, tmp_path):
    names = ["a cat", "an owl"]

    def rows(tokenizer=None, folder=tmp_path):
        tokenizer = tokenizer or byte_tokenizer()
        return encode_class_descriptions(clip, tokenizer, names, cache_dir=folder)

    first = rows()
    before = list(tmp_path.iterdir())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(rows(), first)
    finally:
        torch.set_num_threads(threads)
    assert list(tmp_path.iterdir()) == before
    before[0].write_bytes(before[0].read_bytes()[:-9])
    with pytest.warns(UserWarning, match="is damaged: the texts are encoded again"):
        assert torch.equal(rows(), first)
    assert torch.equal(rows(), first) and list(tmp_path.iterdir()) == before
    other = byte_tokenizer()
    other.backend_tokenizer.normalizer = Replace("a", "e")
    torch.testing.assert_close(rows(other), rows(other, tmp_path / "new"))
    assert not torch.allclose(rows(other), first, atol=1e-3)
    left = byte_tokenizer()
    left.padding_side = "left"
    torch.testing.assert_close(rows(left), rows(left, tmp_path / "new"))
    for layer in clip.text_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.ReLU()
    torch.testing.assert_close(rows(), rows(folder=tmp_path / "new"))
    assert not torch.allclose(rows(), first, atol=1e-3)


# Pooling


def grouped(
    num_groups: int = 6, size: int = 20, spread: float = 0.05
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around orthogonal directions, in random order, and those directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(num_groups, 16)
    rows = directions.repeat(size, 1) + spread * torch.randn(
        num_groups * size, 16, generator=generator
    )
    return F.normalize(
        rows[torch.randperm(len(rows), generator=generator)], dim=1
    ), directions


def test_few_rows_stay_as_they_are():
    rows, _ = grouped()
    torch.testing.assert_close(pool_guidance(3 * rows, len(rows)), rows)


def test_the_result_is_unit_rows_of_float32_whatever_comes_in():
    rows, _ = grouped()
    pooled = pool_guidance(rows.double(), 7)
    assert pooled.shape == (7, 16) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(7))


def test_every_row_is_near_to_its_mean_and_the_means_are_those_of_their_rows():
    rows, directions = grouped(spread=0.4)
    pooled = pool_guidance(rows, 9)
    assert torch.equal(pool_guidance(rows, 9), pooled)
    assert (rows @ pooled.T).amax(1).mean() > (rows @ rows[:9].T).amax(1).mean()
    nearest = (rows @ pooled.T).argmax(1)
    for group in nearest.unique():  # a fixed point of k-means
        torch.testing.assert_close(
            pooled[group], F.normalize(rows[nearest == group].sum(0), dim=0)
        )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"guidance": [[1.0, 0.0]]}, TypeError, "`guidance`.*list"),
        ({"guidance": torch.ones(4, 2), "num_rows": 0}, ValueError, "`num_rows`.*0"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        pool_guidance(**arguments)
