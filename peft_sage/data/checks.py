# SPDX-License-Identifier: Apache-2.0
"""Checks of all images before anything is computed."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import PIL.Image
import torch.distributed as dist
from tqdm.auto import tqdm

from ..pictures import read_image
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
    found: dict[str, dict[int, str]] = {key: {} for key in tables}
    total = sum(len(table.rows[rank::processes]) for table in tables.values())
    with (
        ThreadPoolExecutor(_cores()) as pool,
        tqdm(total=total, desc="checking images", disable=rank > 0, leave=False) as bar,
    ):
        for key, table in tables.items():
            rows = table.rows[rank::processes]
            check = partial(_problem, table, splits.get(key))
            for start in range(0, len(rows), 1024):
                part = rows[start : start + 1024].tolist()
                for row, problem in zip(part, pool.map(check, part), strict=True):
                    if problem:
                        found[key][row] = problem
                bar.update(len(part))
    if connected:
        shares: list = [None] * processes
        dist.all_gather_object(shares, found)
        found = {
            key: dict(sorted(x for share in shares for x in share[key].items()))
            for key in tables
        }
    return found


def refuse_shared_files(tables: dict[str, Table], splits: dict[str, str]) -> None:
    """Raise ValueError if one file is in two splits or of two classes."""
    uses: dict[tuple[int, int], tuple[str, str]] = {}
    for key, table in tables.items():
        for row in table.rows.tolist() if table.paths else []:
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


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
