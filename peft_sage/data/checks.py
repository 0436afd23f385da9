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


def find_unreadable(data: Dataset, splits: dict[str, str]) -> dict[int, str]:
    """Return the rows whose images cannot be decoded, and why.

    Processes that are connected by `torch.distributed` share the work. A JPEG is decoded at an eighth of its size.

    Args:
        data: Encoded images, with the columns `file`, `path` and `split`.
        splits: Names of the splits by their keys, for errors.
    """
    connected = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if connected else 0
    processes = dist.get_world_size() if connected else 1
    share = range(rank, len(data), processes)
    found = []
    bar = tqdm(total=len(share), desc="checking images", disable=rank > 0, leave=False)
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(share), 1024):
            rows = share[start : start + 1024]
            problems = pool.map(lambda row: _problem(data[row], splits), rows)
            found += [x for x in zip(rows, problems, strict=True) if x[1]]
            bar.update(len(rows))
    shares: list[Any] = [found]
    if connected:
        shares = [None] * processes
        dist.all_gather_object(shares, found)
    return dict(sorted(chain.from_iterable(shares)))


def refuse_shared_files(parts: dict[str, Dataset], splits: dict[str, str]) -> None:
    """Raise ValueError if one file is in two splits or of two classes."""
    uses: dict[tuple[int, int], tuple[str, str]] = {}
    for key, part in parts.items():
        names = part.features["label"].names
        for row in part.select_columns(["path", "file", "label"]):
            if row["path"] is None:
                continue
            use = splits[key], names[row["label"]]
            file = os.stat(row["path"])  # whatever the links that lead to it
            first = uses.setdefault((file.st_dev, file.st_ino), use)
            if first != use:
                raise ValueError(
                    f"Image {row['file']!r} is in split {first[0]!r} as {first[1]!r} and in split {use[0]!r} as "
                    f"{use[1]!r}; every image has one split and one class."
                )


def _problem(item: dict[str, Any], splits: dict[str, str]) -> str | None:
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
        name = item["file"] if item["path"] is None else repr(item["file"])
        if item["split"]:
            name += f", split {splits[item['split']]!r}"
        # Rare, so the reason may take its time.
        try:
            read_image(source, name)
        except ValueError as error:
            return str(error)
    return None
