# SPDX-License-Identifier: Apache-2.0
"""One picture, whatever holds it: upright, 8 bits, RGB, on white; or an error that names it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from peft_sage.pictures import decoding_side, find_images, read_image


RED = (200, 10, 30)
WHITE = (255, 255, 255)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_palette(image, **options):
    return saved(image.convert("P", palette=Image.Palette.ADAPTIVE), **options)


def tiff(value, kind="TIFF"):
    return saved(Image.fromarray(np.full((2, 3), value)), kind)


def plain(mode, colour):
    return saved(Image.new(mode, (3, 2), colour))


RGB = Image.new("RGB", (3, 2), RED)
MOVING = {"save_all": True, "append_images": [Image.new("RGB", (3, 2), WHITE)]}
INK = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
GREY = (100, 100, 100)
CASES = {
    "16-bit grey": (tiff(np.uint16(25_700), "PNG"), GREY),
    "16-bit grey TIFF": (tiff(np.uint16(25_700)), GREY),
    "32-bit TIFF": (tiff(np.int32(25_700)), GREY),
    "dark 16-bit grey": (tiff(np.uint16(200), "PNG"), (1, 1, 1)),
    "float TIFF": (tiff(np.float32(0.4)), (102, 102, 102)),
    "float TIFF to 255": (tiff(np.float32(100.4)), GREY),
    "RGBA, transparent red": (plain("RGBA", (255, 0, 0, 0)), WHITE),
    "RGBA, half": (plain("RGBA", (200, 0, 100, 51)), (244, 204, 224)),
    "grey and alpha": (plain("LA", (0, 0)), WHITE),
    "palette": (with_palette(RGB), RED),
    "palette, transparent": (with_palette(RGB, transparency=0), WHITE),
    "RGB with a transparent colour": (saved(RGB, transparency=RED), WHITE),
    "CMYK TIFF": (saved(INK, "TIFF"), (255, 0, 0)),
    "CMYK JPEG": (saved(INK, "JPEG", quality=100), (255, 0, 0)),
    "1 bit": (plain("1", 1), WHITE),
    "1 x 1": (saved(Image.new("RGB", (1, 1), RED)), RED),
    "grey": (plain("L", 100), GREY),
    "animated": (saved(RGB, "GIF", **MOVING), RED),
    "array": (np.full((2, 3, 3), RED, np.uint8), RED),
    "16-bit array": (np.full((2, 3), 25_700, ">u2"), GREY),
    "array of floats": (np.full((2, 3, 3), 0.4), (102, 102, 102)),
    "array of integers": (np.full((2, 3, 1), 100), GREY),
    "array of truth values": (np.ones((2, 3), bool), WHITE),
    "array with alpha": (np.full((2, 3, 4), (255, 0, 0, 0), np.uint8), WHITE),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_picture(case, tmp_path):
    source, expected = CASES[case]
    image = read_image(source)
    assert (
        image.mode == "RGB"
        and image.getpixel((0, 0)) == image.getpixel((image.width - 1, 0)) == expected
    )
    if isinstance(source, bytes):
        (tmp_path / "x").write_bytes(source)
        path = str(tmp_path / "x")
        sources = [path, tmp_path / "x", Image.open(path)]
        sources += [{"bytes": source, "path": None}, {"bytes": None, "path": path}]
        for other in sources:
            assert read_image(other).tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_upright(orientation, kind):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("black", (0, 0, 8, 8))  # the upper left corner of a wide picture
    back = (None, None, 0, 3, 1, 5, 2, 6, 4)[orientation]  # PIL's numbers
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(saved(stored, kind, exif=exif))
    assert image.size == (32, 16)
    assert max(image.getpixel((3, 3))) < 60 and min(image.getpixel((28, 12))) > 200


def test_failures_name_the_picture(tmp_path, monkeypatch):
    noise = Image.effect_noise((64, 64), 90)
    files = {"empty.png": b"", "text.png": b"text"}
    for kind in ("JPEG", "PNG"):
        data = saved(noise, kind)
        files[f"half.{kind}"] = data[: len(data) // 2]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"Image '.*{name}' cannot be read"):
            read_image(tmp_path / name)
        with pytest.raises(
            ValueError, match="Image row 3 of split 'test' cannot be read"
        ):
            read_image({"bytes": data, "path": name}, name="row 3 of split 'test'")
    (tmp_path / "bomb.png").write_bytes(saved(Image.new("1", (500, 500))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(
        ValueError, match="bomb.png' cannot be read.*decompression bomb"
    ):
        read_image(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="absent.png' cannot be read: No such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 16, 16)), r"got .*\(3, 16, 16\)"),
        (np.zeros((0, 16)), "got float64"),
        (np.full((2, 2), -0.5), "-0.5 to -0.5"),
        (np.full((2, 2), np.nan), "nan"),
        (np.full((2, 2), 1e6), "must lie in"),
        (np.array([["a"]]), "must hold numbers"),
        (None, "NoneType"),
        ({"bytes": None, "path": None}, "NoneType"),
        (torch.zeros(3, 4, 4), "Tensor"),
    ],
)
def test_what_is_no_picture(source, message):
    with pytest.raises(ValueError, match=message):
        read_image(source)


def test_large_photographs_are_decoded_smaller_and_look_the_same():
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    photo = saved(
        Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC),
        "JPEG",
        quality=95,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    side = decoding_side(processor)
    assert side == 128 and decoding_side(CLIPImageProcessorPil(do_resize=False)) is None
    small = read_image(photo, min_side=side)
    assert small.size == (200, 150) and read_image(photo).size == (1600, 1200)
    whole, fast = (
        np.array(image.resize((64, 48), Image.Resampling.BICUBIC), float)
        for image in (read_image(photo), small)
    )
    assert np.abs(whole - fast).mean() < 0.6


def test_images_of_folders(tmp_path, monkeypatch):
    for name in (
        "b.JPG",
        "a.png",
        ".hidden.png",
        "notes.txt",
        "below/c.png",
        "[x]/d.tiff",
        "__MACOSX/a.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        RGB.save(tmp_path / name, "PNG")
    (tmp_path / "folder.png").mkdir()
    own = [tmp_path / "a.png", tmp_path / "b.JPG"]
    assert find_images(tmp_path) == find_images([str(tmp_path) + "/"]) == own
    assert find_images([tmp_path / "[x]", tmp_path / "notes.txt"]) == [
        tmp_path / "[x]/d.tiff",
        tmp_path / "notes.txt",
    ]
    below = [tmp_path / "[x]/d.tiff", tmp_path / "below/c.png"]
    assert find_images(tmp_path, recursive=True) == [*own, *below]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images("~/a.png") == own[:1]
    for name, message in [
        ("folder.png", "folder.png' contains no images; `recursive=True`"),
        ("absent", "absent' does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_images([tmp_path, tmp_path / name])
