# SPDX-License-Identifier: Apache-2.0
"""Data sets of `datasets`: from the Hub, from a folder of `save_to_disk`, or at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import HfApi

from .table import Request, Table, encoded


#: What `save_to_disk` leaves in a folder.
SAVED = {"dataset_dict.json", "state.json"}


def read_hub(request: Request) -> dict[str, Table]:
    """Read a data set of the Hub; a mistyped folder is refused at once, which `load_dataset` offline is slow to do."""
    source = request.source
    fault = "is neither a folder nor on the Hub"
    try:
        HfApi().dataset_info(source, timeout=5)
    except Exception as error:
        cached = Path(datasets.config.HF_DATASETS_CACHE, source.replace("/", "___"))
        if not cached.is_dir():
            raise ValueError(f"`source` {source!r} {fault}: {error}") from error
    return _load(request, load_dataset, fault)


def read_saved(request: Request) -> dict[str, Table]:
    return _load(
        request, load_from_disk, "is a folder of `save_to_disk` that cannot be read"
    )


def _load(request: Request, load: Callable[[str], Any], fault: str) -> dict[str, Table]:
    try:
        data = load(str(request.root or request.source))
    except Exception as error:
        raise ValueError(f"`source` {request.source!r} {fault}: {error}") from error
    return read_datasets(request, data)


def read_datasets(request: Request, data: Dataset | DatasetDict) -> dict[str, Table]:
    if isinstance(data, Dataset):
        return {"": _read(request, data, "the data set")}
    matched = request.match(data)
    return {key: _read(request, data[name], name) for key, name in matched.items()}


def _read(request: Request, data: Dataset, name: str) -> Table:
    chosen = request.choose_columns(data.column_names, f"Split {name!r} of `source`")
    columns: Any = data.select_columns(chosen).with_format("arrow")[:]
    image = request.image_column
    feature = data.features[request.label_column]
    try:
        images = encoded(data.select_columns([image]), image)
    except Exception as error:
        raise ValueError(
            f"Column {image!r}, {data.features[image]}, cannot be read as images: {error}"
        ) from error
    files = [f"row {row} of {name}" for row in range(len(data))]
    names = feature.names if isinstance(feature, ClassLabel) else None
    return request.table(columns, files, files.__getitem__, names, images=images)
