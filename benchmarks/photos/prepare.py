# SPDX-License-Identifier: Apache-2.0
"""First step of the photograph test bed: the splits of the images, and the stem's maps of their views.

python prepare.py DATA WORK

DATA is the folder of the photographs and of the stem's tflite file, WORK gets `splits.npz` and `stem/SPLIT/CHUNK.npz`
(1.7 GB). A chunk that exists is not computed again, so a run that was stopped goes on when it is called again. Two
cores with fast bfloat16 take five minutes.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .bed import keep_memory
from .stem import IMAGE_SIDE, Stem, load_stem


SEED = 0
CHUNK, BATCH = 1000, 200
GUESSES = 5

# Images of each class in each split, by file: the rest of a file is left out.
PARTS = {
    "cifar100-train": {
        "cifar100-pretrain": 250,
        "cifar100-validation": 50,
        "cifar100-pool": 200,
    },
    "cifar100-test": {"cifar100-test": 100},
    "tiny-imagenet-half": {
        "tiny-pretrain": 100,
        "tiny-pool": 90,
        "tiny-validation": 10,
        "tiny-test": 50,
    },
    "cifar10-part": {"cifar10-pretrain": 2000},
}
# Views of each image: the plain one, and random crops with flips. A split with no entry has the plain one.
VIEWS = {
    "cifar100-pretrain": 3,
    "cifar100-pool": 3,
    "tiny-pool": 3,
    "tiny-pretrain": 2,
    "cifar10-pretrain": 2,
}


@functools.cache
def read_column(data: Path, file: str, name: str) -> pa.Array:
    """A column of a file of images, "image" or "label", once in each process."""
    table = pq.read_table(data / f"{file}.parquet", columns=[name])
    return table[name].combine_chunks()


def read_names(data: Path, file: str) -> list[str]:
    """The class names of a file of images, as `datasets` stores them."""
    metadata = pq.read_schema(data / f"{file}.parquet").metadata[b"huggingface"]
    return json.loads(metadata)["info"]["features"]["label"]["names"]


def make_splits(data: Path) -> dict[str, np.ndarray]:
    """The rows and labels of each split, `SPLIT.rows` and `SPLIT.labels`: of each class as many, by the seed."""
    arrays = {}
    for file, sizes in PARTS.items():
        generator = np.random.default_rng([SEED, zlib.crc32(file.encode())])
        labels = read_column(data, file, "label").to_numpy()
        shuffled = [
            generator.permutation(np.flatnonzero(labels == label))
            for label in np.unique(labels)
        ]
        start = 0
        for split, size in sizes.items():
            rows = np.sort(
                np.concatenate([rows[start : start + size] for rows in shuffled])
            )
            arrays[f"{split}.rows"] = rows
            arrays[f"{split}.labels"] = labels[rows]
            start += size
    return arrays


def decode(images: list[dict]) -> Tensor:
    """The images (B, 3, H, W) between -1 and 1."""
    arrays = [
        np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
        for image in images
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_crops(count: int, generator: torch.Generator) -> Tensor:
    """Affine maps (B, 2, 3) onto random crops of half to all of the area, half of them flipped."""
    area = 0.5 + 0.5 * torch.rand(count, generator=generator)
    ratio = (4 / 3) ** (2 * torch.rand(count, generator=generator) - 1)
    width, height = (
        (area * ratio).sqrt().clamp(max=1),
        (area / ratio).sqrt().clamp(max=1),
    )
    across, down = (2 * torch.rand(2, count, generator=generator) - 1) * (
        1 - torch.stack([width, height])
    )
    flip = 1 - 2 * torch.randint(2, (count,), generator=generator)
    zero = torch.zeros(count)
    return torch.stack(
        [
            torch.stack([width * flip, zero, across], 1),
            torch.stack([zero, height, down], 1),
        ],
        1,
    )


def make_views(
    images: Tensor, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """The plain view of the images, then random crops, at the side that the stem is given."""
    for view in range(count):
        maps = (
            random_crops(len(images), generator)
            if view
            else torch.eye(2, 3).repeat(len(images), 1, 1)
        )
        grid = F.affine_grid(
            maps, [len(images), 3, IMAGE_SIDE, IMAGE_SIDE], align_corners=False
        )
        yield F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def compute_chunk(
    stem: Stem, images: list[dict], views: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The maps (B, views, 320, 3, 3) of the images, and the stem's best guesses (B, 5) at their ImageNet classes."""
    like = next(stem.parameters())
    maps = []
    guesses = []
    for start in range(0, len(images), BATCH):
        pixels = make_views(decode(images[start : start + BATCH]), views, generator)
        outputs = [
            stem(view.to(like, memory_format=torch.channels_last)) for view in pixels
        ]
        guesses.append(stem.classify(outputs[0]).topk(GUESSES).indices.cpu())
        maps.append(torch.stack(outputs, 1).half().cpu())
    return torch.cat(maps).contiguous().numpy(), torch.cat(guesses).numpy().astype(
        np.int16
    )


@functools.cache
def worker_stem(data: Path) -> Stem:
    """The stem, once in each process."""
    keep_memory()
    return load_stem(next(data.glob("mobilenet_v2*.tflite")))


def write_chunk(job: tuple[Path, Path, str, np.ndarray, int]) -> None:
    """Write one chunk of a split, unless it exists."""
    data, path, split, rows, number = job
    if path.exists():
        return
    file = next(file for file, sizes in PARTS.items() if split in sizes)
    images = read_column(data, file, "image").take(rows).to_pylist()
    # A chunk's crops are its own, whatever was computed before it.
    generator = torch.Generator().manual_seed(
        zlib.crc32(f"{SEED} {split} {number}".encode())
    )
    maps, guesses = compute_chunk(
        worker_stem(data), images, VIEWS.get(split, 1), generator
    )
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, maps=maps, guesses=guesses)
    os.replace(partial, path)


def make_jobs(
    data: Path, work: Path, arrays: dict[str, np.ndarray]
) -> list[tuple[Path, Path, str, np.ndarray, int]]:
    """The arguments of `write_chunk` for the chunks of all splits."""
    jobs = []
    for split in (split for sizes in PARTS.values() for split in sizes):
        folder = work / "stem" / split
        rows = arrays[f"{split}.rows"]
        folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(rows), CHUNK):
            path = folder / f"{start // CHUNK:03d}.npz"
            jobs.append((data, path, split, rows[start : start + CHUNK], start))
    return jobs


def main() -> None:
    """Write the splits and the maps of all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data",
        type=Path,
        help="folder of the photographs and of the stem's tflite file",
    )
    parser.add_argument("work", type=Path, help="folder of everything that is computed")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arrays = make_splits(arguments.data)
    np.savez(arguments.work / "splits.npz", **arrays)
    jobs = make_jobs(arguments.data, arguments.work, arrays)
    # A process of one thread for each core: threads that wait for each other are slow where others use the cores too.
    workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(
        workers, torch.set_num_threads, (1,)
    ) as pool:
        list(tqdm(pool.imap_unordered(write_chunk, jobs), "chunks", len(jobs)))


if __name__ == "__main__":
    main()
