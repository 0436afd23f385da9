# SPDX-License-Identifier: Apache-2.0
"""Training on some of the patches: which towers allow it, what they see, and when."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from peft_sage import SageClassifier, SageConfig, SageTrainer
from peft_sage.patch_dropout import can_drop_patches, drop_patches, patch_dropout
from peft_sage.towers.embeddings import encode_image
from tests.conftest import tiny_clip, tiny_siglip
from tests.test_trainer import (
    TEXTS,
    TRAIN,
    VALIDATION,
    arguments,
    classifier,
    sage,
)
from tests.tower_models import TINY


@pytest.mark.parametrize(
    ("patches", "share", "kept"), [(9, 0.5, 4), (4, 0.5, 2), (8, 0, 8), (5, 0.99, 1)]
)
def test_each_image_keeps_its_class_token_and_some_of_its_own_patches(
    patches, share, kept
):
    tokens = torch.arange(64 * (1 + patches) * 2.0).view(64, 1 + patches, 2)
    part = drop_patches(tokens, share)
    assert part.shape == (64, 1 + kept, 2)
    assert torch.equal(part[:, 0], tokens[:, 0])
    chosen = [{*map(tuple, image.tolist())} for image in part]
    for image, own in zip(tokens, chosen, strict=True):
        assert len(own) == 1 + kept and own <= {*map(tuple, image.tolist())}
    positions = (part[:, 1:, 0] - tokens[:, :1, 0]) / 2
    assert positions.unique().tolist() == [*range(1, 1 + patches)]


@pytest.mark.parametrize(
    ("family", "allowed"),
    [
        ("clip-CLIPModel", True),
        ("siglip-SiglipModel", True),
        ("blip-BlipModel", True),
        ("dinov3_vit-DINOv3ViTModel", False),  # rotary positions
        ("swin-SwinModel", False),  # windows
        ("hiera-HieraModel", False),
    ],
)
def test_it_is_allowed_where_blocks_do_not_depend_on_the_order(family, allowed):
    tiny = next(tiny for tiny in TINY if tiny.id == family)
    model = tiny.build()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    images = tiny.inputs()
    assert can_drop_patches(model, lambda: encode_image(model, **images)) == allowed


def test_of_patches_that_are_alike_any_number_says_the_same():
    model = tiny_siglip()  # with a class token their weight in the attention changes
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.zero_()
    plain = torch.ones(2, 3, 16, 16)
    varied = torch.randn(2, 3, 16, 16)
    model.eval()
    expected = [encode_image(model, images) for images in (plain, varied)]
    with patch_dropout(model, 0.5):
        evaluated = encode_image(model, varied)
        model.train()
        trained = [encode_image(model, images) for images in (plain, varied)]
    torch.testing.assert_close(evaluated, expected[1])
    torch.testing.assert_close(trained[0], expected[0])
    assert (trained[1] - expected[1]).abs().max() > 0.01
    torch.testing.assert_close(encode_image(model, varied), expected[1])


def gradients(model, images):
    torch.manual_seed(5)
    model.zero_grad()
    model(pixel_values=images)["logits"].square().sum().backward()
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("how", ["checkpointing", "compile"])
def test_checkpointing_and_compile_see_the_same_patches(how):
    model = SageClassifier(tiny_clip(), TEXTS)
    model = get_peft_model(model, SageConfig(r=4, init_weights=False)).train()
    images = torch.randn(3, 3, 16, 16)
    with patch_dropout(model, 0.5):
        expected = gradients(model, images)
        if how == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert any(
                m for m in model.modules() if getattr(m, "gradient_checkpointing", 0)
            )
        else:
            model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(gradients(model, images), expected)


class Lengths(TrainerCallback):
    """The numbers of tokens in the second block, in training and in evaluation."""

    def __init__(self):
        self.seen = {True: set(), False: set()}

    def on_train_begin(self, *_, model, **kwargs):
        tower = model.get_submodule("base_model.model.model.vision_model")
        tower.encoder.layers[1].register_forward_pre_hook(self.look)

    def look(self, block, args):
        self.seen[block.training].add(args[0].shape[1])


def test_the_trainer_trains_on_half_of_the_patches_and_evaluates_on_all(tmp_path):
    model = sage()
    lengths = Lengths()
    seen = lengths.seen
    args = arguments(tmp_path, patch_dropout=0.5)
    trainer = SageTrainer(model, args, TRAIN, VALIDATION, callbacks=[lengths])
    trainer.train()
    assert seen == {True: {3}, False: {5}}
    assert trainer.patch_dropout == 0.5
    assert "each step sees 50% of the patches" in trainer._describe()
    model.train()(pixel_values=torch.randn(2, 3, 16, 16))
    assert seen[True] == {3, 5}  # by itself the model sees all


def test_where_nothing_is_won_all_patches_are_seen(tmp_path):
    args = arguments(tmp_path / "head", patch_dropout=0.5)
    head = SageTrainer(classifier(), args, TRAIN)
    off = SageTrainer(sage(), arguments(tmp_path / "off"), TRAIN)
    for trainer in (head, off):
        trainer.train()
        assert trainer.patch_dropout == 0 and "patches" not in trainer._describe()


def test_half_of_the_patches_take_half_of_the_operations():
    model = get_peft_model(classifier(), SageConfig(guidance=TEXTS, r=4)).train()
    images = torch.randn(4, 3, 16, 16)
    counts = []
    for share in (0.0, 0.5):
        with patch_dropout(model, share), FlopCounterMode(display=False) as counter:
            model(pixel_values=images)["logits"].sum().backward()
        counts.append(counter.get_total_flops())
    assert 0 < counts[1] < 0.65 * counts[0]
