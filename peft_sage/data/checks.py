# SPDX-License-Identifier: Apache-2.0
"""Checks of all images before anything is computed."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import PIL.Image
import torch.distributed as dist
from datasets import Dataset
from tqdm.auto import tqdm

from ..pictures import available_cores, read_image


def find_unreadable(
    parts: dict[str, Dataset], splits: dict[str, str]
) -> dict[str, dict[int, str]]:
    """Return the rows of each part whose images cannot be decoded, and why.

    Processes that are connected by `torch.distributed` share the work. A JPEG is decoded at an eighth of its size.

    Args:
        parts: Data sets of encoded images, by the keys of their splits.
        splits: Names of the splits, for errors.
    """
    connected = dist.is_available() and dist.is_initialized()
    rank = 0
    processes = 1
    if connected:
        rank = dist.get_rank()
        processes = dist.get_world_size()
    places: list[tuple[str, int]] = []
    for key, part in parts.items():
        places += ((key, row) for row in range(len(part)))
    places = places[rank::processes]
    bar = tqdm(total=len(places), desc="checking images", disable=rank > 0, leave=False)

    def check(place: tuple[str, int]) -> tuple[str, int, str | None]:
        key, row = place
        return key, row, _problem(parts[key], splits.get(key), row)

    found = []
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(places), 1024):
            share = places[start : start + 1024]
            found += [result for result in pool.map(check, share) if result[2]]
            bar.update(len(share))
    shares: list[Any] = [found]
    if connected:
        shares = [None] * processes
        dist.all_gather_object(shares, found)
    problems: dict[str, dict[int, str]] = {key: {} for key in parts}
    for key, row, problem in sorted(chain.from_iterable(shares)):
        problems[key][row] = problem
    return problems


def refuse_shared_files(parts: dict[str, Dataset], splits: dict[str, str]) -> None:
    """Raise ValueError if one file is in two splits or of two classes."""
    uses: dict[tuple[int, int], tuple[str, str]] = {}
    for key, part in parts.items():
        if "path" not in part.column_names:
            continue
        names = part.features["label"].names
        for row in part.select_columns(["path", "file", "label"]):
            use = splits[key], names[row["label"]]
            file = os.stat(row["path"])  # whatever the links that lead to it
            first = uses.setdefault((file.st_dev, file.st_ino), use)
            if first != use:
                raise ValueError(
                    f"Image {row['file']!r} is in split {first[0]!r} as {first[1]!r} and in split {use[0]!r} as "
                    f"{use[1]!r}; every image has one split and one class."
                )


def _problem(part: Dataset, split: str | None, row: int) -> str | None:
    item = part[row]
    source = item["image"] or {"bytes": None, "path": None}
    try:
        data = source["bytes"]
        if data is None:
            data = Path(source["path"]).read_bytes()
        if data.startswith(b"\x89PNG"):
            # Its checksums tell, forty times faster than decoding.
            PIL.Image.open(io.BytesIO(data)).verify()
        else:
            read_image(data, min_side=1)
    except Exception:
        name = repr(item["file"]) if "path" in item else item["file"]
        if split:
            name += f", split {split!r}"
        # Rare, so the reason may take its time.
        try:
            read_image(source, name)
        except ValueError as error:
            return str(error)
    return None
