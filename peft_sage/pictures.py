# SPDX-License-Identifier: Apache-2.0
"""One picture from whatever holds it, alike in training and in prediction."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.ImageOps
from PIL.Image import Image


_ENDINGS = "a?png|avif|bmp|dib|gif|heic|heif|j2k|jfif|jp2|jpe|jpe?g|jxl|p[bgnp]m|tga|tiff?|webp"


def read_image(
    source: Any, name: str | None = None, min_side: int | None = None
) -> Image:
    """Read one image as it is to be seen: upright, 8 bits, RGB, transparent parts on white, the first frame.

    16-bit values are divided by 257. Floats in [0, 1] are multiplied by 255; a picture with larger ones is taken to
    lie in [0, 255], or else in [0, 65535].

    Args:
        source: A path, an open file, the bytes of one, a dictionary (`{"bytes": ..., "path": ...}`, as `datasets` has
            it), a PIL image, or an array (H, W) or (H, W, 1, 3 or 4).
        name: What errors call it, as "row 3 of split 'test'". Default: its path.
        min_side: A JPEG may be decoded smaller than it is, which is faster, with at least this many pixels a side.

    Raises:
        ValueError: If it cannot be read. The message holds the name.
    """
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if name is None and isinstance(source, (str, os.PathLike)):
        name = repr(os.fspath(source))
    try:
        if isinstance(source, PIL.Image.Image):
            return _upright_rgb(source)
        if isinstance(source, np.ndarray):
            return _upright_rgb(_from_array(source))
        is_file = isinstance(source, (str, os.PathLike)) or hasattr(source, "read")
        if not is_file and not isinstance(source, bytes):
            raise TypeError(
                f"a path, a file, bytes, a PIL image or a numpy array is needed, got {type(source).__name__}"
            )
        with PIL.Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source
        ) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            return _upright_rgb(image)
    # Damaged files make pillow raise almost anything; a picture that is too large has an error of its own.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "empty, or no format that pillow knows (HEIC: pillow-heif)"
        image_name = f"Image {name}" if name else "Image"
        raise ValueError(f"{image_name} cannot be read: {reason}") from error


def decoding_side(image_processor: Any) -> int | None:
    """Return the `min_side` of [`read_image`] that leaves twice the resolution a processor resizes to."""
    size = getattr(image_processor, "size", None)
    if not size or not getattr(image_processor, "do_resize", False):
        return None
    return 2 * max(side for side in dict(size).values() if side)


def find_images(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    recursive: bool = False,
) -> list[Path]:
    """List files, and the images of folders in the order of their names; hidden files and folders are left out.

    Args:
        paths: Files and folders, which may begin with `~`.
        recursive: Whether to search the folders in a folder, too.

    Raises:
        ValueError: If a path does not exist or a folder contains no images. The path is named.
    """
    found: list[Path] = []
    for given in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        path = Path(given) if os.path.exists(given) else Path(os.path.expanduser(given))
        if not path.exists():
            raise ValueError(f"{str(given)!r} does not exist.")
        if not path.is_dir():
            found.append(path)
            continue
        images = list(_images_in(path, recursive))
        if not images:
            hint = "" if recursive else "; `recursive=True` searches its subfolders"
            raise ValueError(f"Folder {str(given)!r} contains no images{hint}.")
        found += images
    return found


def _images_in(folder: Path, recursive: bool) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in sorted(folders) if recursive and is_shown(name)]
        yield from (Path(parent, name) for name in sorted(files) if is_image_name(name))


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_shown(name: str) -> bool:
    """Whether a file or folder is neither hidden nor what macOS leaves in an archive."""
    return not name.startswith(".") and name != "__MACOSX"


def is_image_name(name: str) -> bool:
    """Whether a file of a folder counts as an image: it has an image's ending and is not hidden."""
    return re.fullmatch(rf"(?is)[^.].*\.({_ENDINGS})", name) is not None


def _upright_rgb(image: Image) -> Image:
    image.load()
    # A damaged EXIF block says nothing about the pixels.
    with suppress(Exception):
        if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
            image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _from_array(np.asarray(image), is_16_bit=image.mode.startswith("I"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(
            PIL.Image.new("RGBA", image.size, "white"), image
        )
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any], is_16_bit: bool = False) -> Image:
    """Scale an array to 8 bits."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    is_picture = array.size and (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    )
    if not is_picture or array.dtype.kind not in "buif":
        raise ValueError(
            f"an array must hold numbers (H, W) or (H, W, 1, 3 or 4), got {array.dtype} {array.shape}"
        )
    if array.dtype == np.uint8:
        return PIL.Image.fromarray(array)
    low = float(array.min())
    high = float(array.max())
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"its values must lie in [0, 65535], got {low:g} to {high:g}")
    factor = 1 / 257 if is_16_bit or array.dtype.name == "uint16" or high > 255 else 1.0
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and high <= 1):
        factor = 255.0
    return PIL.Image.fromarray((array * factor).round().astype(np.uint8))
