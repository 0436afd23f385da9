# SPDX-License-Identifier: Apache-2.0
"""One way from pictures to pixels: the processor's own, in threads, in workers, kept or augmented."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil

from peft_sage import ImageCollator, read_image


PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
)


class Compose:
    """Torchvision's `Compose` of a resizing, `ToTensor` and `Normalize`, as open_clip has it."""

    def __init__(self):
        self.transforms = [
            lambda image: image.resize((16, 16), Image.Resampling.BICUBIC),
            lambda image: torch.tensor(np.array(image)).permute(2, 0, 1) / 255,
            lambda pixels: (
                (pixels - 0.4) / torch.tensor([0.2, 0.3, 0.1])[:, None, None]
            ),
        ]

    def __call__(self, image):
        for transform in self.transforms:
            image = transform(image)
        return image


def pictures(count=5):
    random = np.random.default_rng(0)
    shapes = [(20 + 7 * k, 40, 3) for k in range(count)]
    arrays = [random.integers(0, 255, shape, dtype=np.uint8) for shape in shapes]
    return [Image.fromarray(array) for array in arrays]


def items(count=5, **columns):
    return [
        {"image": picture, "label": k % 3} | columns
        for k, picture in enumerate(pictures(count))
    ]


@pytest.mark.parametrize("processor", [PROCESSOR, Compose()], ids=["clip", "compose"])
def test_pixels_are_those_of_the_image_processor(processor, tmp_path):
    hidden = Image.new("RGBA", (30, 20), (0, 0, 0, 0))  # white, where it is seen
    hidden.save(tmp_path / "x.png")
    given = [*pictures(), hidden, str(tmp_path / "x.png"), np.asarray(hidden)]
    read = [read_image(picture) for picture in given]
    if processor is PROCESSOR:
        expected = processor(images=read, return_tensors="pt")["pixel_values"]
    else:
        expected = torch.stack([processor(picture) for picture in read])
    collate = ImageCollator(processor)
    assert torch.equal(collate(given)["pixel_values"], expected)
    as_dicts = [{"image": picture, "label": 2} for picture in given]
    batch = collate(as_dicts)
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [2] * len(given)
    pixels = collate.prepare(given)
    assert pixels.dtype == torch.uint8 and collate.size == pixels.shape[-2:]
    torch.testing.assert_close(collate.finish(pixels), expected, atol=1e-5, rtol=0)
    more = [{"base_image_embeds": torch.ones(16), **item} for item in as_dicts]
    batch = collate.collate_pixels(more)
    assert torch.equal(batch["pixels"], pixels)
    assert batch["base_image_embeds"].shape == (len(given), 16)
    assert batch.keys() == {"pixels", "labels", "base_image_embeds"}


def test_what_a_data_set_has_transformed_is_stacked():
    ready = [{"pixel_values": torch.full((3, 2, 2), k), "labels": k} for k in range(3)]
    batch = ImageCollator(None)(ready)
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    soft = ImageCollator(None)([{**ready[0], "labels": [0.5, 0.5]}])["labels"]
    assert soft.tolist() == [[0.5, 0.5]]


def test_crops_and_flips_are_random_in_training_only():
    collate = ImageCollator(PROCESSOR, "crop-flip")
    pixels = collate.prepare(pictures())
    plain = ImageCollator(PROCESSOR)(items())["pixel_values"]
    torch.manual_seed(0)
    drawn = collate(items())["pixel_values"]
    assert not torch.equal(collate.finish(pixels), drawn)
    torch.manual_seed(0)
    assert torch.equal(collate.finish(pixels), drawn)
    assert torch.equal(collate.eval()(items())["pixel_values"], plain)
    assert not torch.equal(collate.train()(items())["pixel_values"], plain)
    whole = ImageCollator(PROCESSOR, "crop-flip", crop_scale=1.0)
    grey = torch.full((2, 3, 16, 16), 90, dtype=torch.uint8)
    torch.testing.assert_close(whole.finish(grey), whole.eval().finish(grey))


def test_a_function_augments_the_original_picture():
    seen = []

    def augment(picture):
        seen.append(picture.size)
        return Image.new("RGB", picture.size, "white")

    collate = ImageCollator(PROCESSOR, augment)
    assert not collate.makes_pixels and collate.eval().makes_pixels
    collate.train()
    assert collate(items())["pixel_values"].amin() > 1
    assert seen == [picture.size for picture in pictures()]
    patches = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4)
    expected = patches(
        images=[Image.new("RGB", (40, 20), "white")], return_tensors="pt"
    )
    batch = ImageCollator(patches, augment)(pictures(1))
    assert batch.keys() == expected.keys()
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_five_crops_are_the_centre_and_the_corners_of_the_enlarged_image():
    image = pictures(1)[0].resize((60, 40))
    crops = ImageCollator(PROCESSOR).prepare([image], crops=5)[0]
    assert crops.shape == (5, 3, 16, 16) and crops.dtype == torch.uint8
    enlarged = np.array(image.resize((27, 18), Image.Resampling.BICUBIC))
    corners = [(1, 5), (0, 0), (0, 11), (2, 0), (2, 11)]
    for crop, (top, left) in zip(crops, corners, strict=True):
        expected = enlarged[top : top + 16, left : left + 16]
        np.testing.assert_array_equal(crop.permute(1, 2, 0), expected)
    assert ImageCollator(PROCESSOR).finish(crops[None]).shape == (1, 5, 3, 16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ImageCollator(PROCESSOR, "flip"), "`augment` must be None.*'flip'"),
        (lambda: ImageCollator(PROCESSOR, crop_scale=0), r"`crop_scale` must lie in"),
        (
            lambda: ImageCollator(
                Siglip2ImageProcessorPil(patch_size=8, max_num_patches=4), "crop-flip"
            ),
            "`augment` .* Siglip2ImageProcessorPil cuts them into patches",
        ),
        (lambda: ImageCollator(None)(pictures()), "`image_processor` is needed"),
        (lambda: ImageCollator(PROCESSOR)([]), "`items` is empty"),
        (lambda: ImageCollator(PROCESSOR)([{"img": 1}]), "`image_column` names"),
        (lambda: ImageCollator(PROCESSOR).prepare([], crops=3), "`crops` must be"),
    ],
)
def test_what_cannot_be_done_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
