# SPDX-License-Identifier: Apache-2.0
"""Checks of all images before anything is computed."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import torch.distributed as dist
from tqdm.auto import tqdm

from ..pictures import available_cores, read_image
from .table import Table


def find_unreadable(
    tables: dict[str, Table], splits: dict[str, str]
) -> dict[str, dict[int, str]]:
    """Return the rows of each table whose images cannot be decoded, and why.

    Processes that are connected by `torch.distributed` share the work. A JPEG is decoded at an eighth of its size.

    Args:
        tables: The tables, by the keys of their splits.
        splits: Names of the splits, for errors.
    """
    connected = dist.is_available() and dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if connected else (0, 1)
    places = [(key, row) for key in tables for row in tables[key].rows.tolist()]
    places = places[rank::processes]
    bar = tqdm(total=len(places), desc="checking images", disable=rank > 0, leave=False)

    def check(place: tuple[str, int]) -> tuple[str, int, str | None]:
        key, row = place
        return key, row, _problem(tables[key], splits.get(key), row)

    found = []
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for start in range(0, len(places), 1024):
            part = places[start : start + 1024]
            found += [result for result in pool.map(check, part) if result[2]]
            bar.update(len(part))
    shares: list[Any] = [found]
    if connected:
        shares = [None] * processes
        dist.all_gather_object(shares, found)
    problems: dict[str, dict[int, str]] = {key: {} for key in tables}
    for key, row, problem in sorted(result for share in shares for result in share):
        problems[key][row] = problem
    return problems


def refuse_shared_files(tables: dict[str, Table], splits: dict[str, str]) -> None:
    """Raise ValueError if one file is in two splits or of two classes."""
    uses: dict[tuple[int, int], tuple[str, str]] = {}
    for key, table in tables.items():
        if table.paths is None:
            continue
        for row in table.rows.tolist():
            use = (splits[key], table.classes.names[table.labels[row]])
            file = os.stat(table.paths[row])  # whatever the links that lead to it
            first = uses.setdefault((file.st_dev, file.st_ino), use)
            if first != use:
                raise ValueError(
                    f"Image {table.files[row]!r} is in split {first[0]!r} as {first[1]!r} and in split {use[0]!r} as "
                    f"{use[1]!r}; every image has one split and one class."
                )


def _problem(table: Table, split: str | None, row: int) -> str | None:
    source = table.images[row]["image"] or {"bytes": None, "path": None}
    try:
        data = source["bytes"]
        data = Path(source["path"]).read_bytes() if data is None else data
        if data.startswith(b"\x89PNG"):
            # Its checksums tell, forty times faster than decoding.
            PIL.Image.open(io.BytesIO(data)).verify()
        else:
            read_image(data, min_side=1)
    except Exception:
        name = repr(table.files[row]) if table.paths else table.files[row]
        name += f", split {split!r}" if split else ""
        # Rare, so the reason may take its time.
        try:
            read_image(source, name)
        except ValueError as error:
            return str(error)
    return None
