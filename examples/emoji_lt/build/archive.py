# SPDX-License-Identifier: Apache-2.0
"""The packed pretraining data, and augmented images of it."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Archive:
    """Drawings by concept, and the embeddings of their captions. Concepts of emoji come first, then those of icons.

    Attributes:
        texts: All texts that were encoded.
        embeddings: Their sentence embeddings (t, 384).
        centres: Mean embedding (c, 384) of the captions of each concept, of length 1.
        caption_rows: How many of `texts` are captions of a concept.
        pixels: Drawings (n, 64, 64, 4) uint8, colours on white and alpha.
        clutter: Rows of `pixels` that are shown as clutter only.
        members: Rows of `pixels` for each concept.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        layout = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        names = ("emoji", "styles", "icons")
        emoji, styles, icons = (np.load(folder / f"{name}.npz") for name in names)
        self.texts: list[str] = layout["texts"]
        embeddings = np.load(folder / "texts.npz")["embeddings"]
        self.embeddings = torch.from_numpy(embeddings).float().to(device)

        num_emoji = layout["emoji"] // layout["per_emoji"]
        num_icons = layout["icon"] // layout["per_icon"]
        self.caption_rows = layout["emoji"] + layout["icon"]
        width = self.embeddings.shape[1]
        captions = self.embeddings[: self.caption_rows]
        emoji_captions, icon_captions = captions.split(
            [layout["emoji"], layout["icon"]]
        )
        centres = torch.cat(
            [
                emoji_captions.view(num_emoji, -1, width).mean(dim=1),
                icon_captions.view(num_icons, -1, width).mean(dim=1),
            ]
        )
        self.centres = F.normalize(centres, dim=-1)

        pixels = [emoji["pixels"], styles["pixels"], icons["pixels"]]
        self.pixels = torch.from_numpy(np.concatenate(pixels)).to(device)
        clutter = emoji["clutter"]
        self.clutter = torch.from_numpy(np.flatnonzero(clutter)).to(device)
        concept = np.concatenate(
            [
                np.where(clutter, -1, emoji["concept"]),
                styles["concept"],
                icons["concept"] + num_emoji,
            ]
        )
        self.members = defaultdict(list)
        for row, owner in enumerate(concept.tolist()):
            if owner >= 0:
                self.members[owner].append(row)
        drawn = np.array(sorted(self.members))
        self.drawn_emoji = drawn[drawn < num_emoji]
        self.drawn_icons = drawn[drawn >= num_emoji]

    def batch(
        self, size: int, icon_share: float, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw two drawings of each of `size` / 2 concepts.

        Returns:
            Rows of `pixels` (size,), in two halves with the same concepts, and the concepts (size / 2,).
        """
        num_icons = int(size // 2 * icon_share)
        emoji = rng.choice(self.drawn_emoji, size // 2 - num_icons, replace=False)
        icons = rng.choice(self.drawn_icons, num_icons)
        concepts = np.concatenate([emoji, icons])
        rows = [rng.choice(self.members[c]) for _ in range(2) for c in concepts]
        device = self.pixels.device
        return torch.tensor(rows, device=device), torch.tensor(concepts, device=device)


def premultiplied(pixels: Tensor) -> Tensor:
    """Turn uint8 colours on white with alpha, (n, h, w, 4), into premultiplied colours and alpha, (n, 4, h, w)."""
    colours, alpha = (pixels.permute(0, 3, 1, 2).float() / 255).split([3, 1], dim=1)
    colours = (colours - (1 - alpha)).clamp_min(0)
    return torch.cat([colours, alpha], dim=1)


def place(
    drawings: Tensor,
    scale: Tensor,
    shift: Tensor,
    angle: Tensor,
    size: int,
) -> Tensor:
    """Put premultiplied drawings on transparent canvases: scaled, rotated, flipped at random and shifted.

    Args:
        drawings: (n, 4, h, w).
        scale: Width of the drawing over that of the canvas (n,).
        shift: Centre of the drawing in the canvas (n, 2), -1 to 1.
        angle: In radians (n,).
        size: Side of the canvas in pixels.

    Returns:
        (n, 4, size, size).
    """
    cos = torch.cos(angle) / scale
    sin = torch.sin(angle) / scale
    flip = torch.where(torch.rand_like(scale) < 0.3, -1.0, 1.0)
    across = torch.stack([cos * flip, sin * flip], dim=-1)
    down = torch.stack([-sin, cos], dim=-1)
    matrix = torch.stack([across, down], dim=1)
    moved = -(matrix @ shift[..., None])
    theta = torch.cat([matrix, moved], dim=-1)
    shape = [
        len(drawings),
        4,
        size,
        size,
    ]
    grid = F.affine_grid(theta, shape, align_corners=False)
    return F.grid_sample(drawings, grid, align_corners=False)


def recolour(drawings: Tensor) -> Tensor:
    """Jitter hue, brightness and contrast of premultiplied drawings, and turn a tenth of them grey."""
    n, device = len(drawings), drawings.device
    colours, alpha = drawings.split([3, 1], dim=1)
    jitter = 0.08 * torch.randn(n, 3, 3, device=device)
    mix = torch.eye(3, device=device) + jitter
    grey = torch.rand(n, 1, 1, device=device) < 0.1
    mix = torch.where(grey, mix.mean(dim=1, keepdim=True), mix)
    colours = torch.einsum("nij,njhw->nihw", mix, colours)
    brightness = 0.06 * torch.randn(n, 1, 1, 1, device=device)
    colours = colours + brightness * alpha
    colours = colours.clamp_min(0).minimum(alpha)
    return torch.cat([colours, alpha], dim=1)


def backgrounds(
    n: int,
    size: int,
    white: float,
    device: torch.device,
) -> Tensor:
    """Make backgrounds (n, 3, size, size): a share `white` of them white, the rest plain or textured."""
    plain = torch.rand(n, 3, 1, 1, device=device)
    coarse = 0.3 * torch.randn(n, 3, 4, 4, device=device)
    fine = 0.1 * torch.randn(n, 1, size, size, device=device)
    strength = torch.rand(2, n, 1, 1, 1, device=device)
    smooth = F.interpolate(coarse, size=size, mode="bilinear")
    texture = plain + strength[0] * smooth + strength[1] * fine
    kind = torch.rand(n, 1, 1, 1, device=device)
    made = torch.where(kind < (1 + white) / 2, plain, texture)
    return made.masked_fill(kind < white, 1.0).clamp(0, 1)


def paste(image: Tensor, layer: Tensor) -> Tensor:
    """Lay premultiplied layers (n, 4, h, w) over images (n, 3, h, w)."""
    colours, alpha = layer.split([3, 1], dim=1)
    return colours + image * (1 - alpha)


def views(
    archive: Archive,
    rows: Tensor,
    scene_share: float,
    size: int,
) -> Tensor:
    """Make augmented images: most show one drawing, the others are scenes with a smaller one among clutter.

    Args:
        archive: Source of the drawings.
        rows: Rows of `archive.pixels` (n,).
        scene_share: Share of scenes.
        size: Side of the images in pixels.

    Returns:
        (n, 3, size, size), normalised as the image processor does.
    """
    n, device = len(rows), rows.device
    scenes = max(1, int(n * scene_share))
    scene = torch.randperm(n, device=device) < scenes
    image = backgrounds(n, size, 0.85, device)
    image[scene] = backgrounds(scenes, size, 0.1, device)
    for _ in range(4):
        drawn = torch.randint(len(archive.clutter), (scenes,), device=device)
        clutter = archive.pixels[archive.clutter[drawn]]
        clutter = recolour(premultiplied(clutter))
        scale = torch.empty(scenes, device=device).uniform_(0.25, 0.5)
        shift = torch.empty(scenes, 2, device=device).uniform_(-0.9, 0.9)
        angle = 0.5 * torch.randn(scenes, device=device)
        layer = place(clutter, scale, shift, angle, size)
        image[scene] = paste(image[scene], layer)
    uniform = torch.rand(n, device=device)
    scale = torch.where(scene, 0.35 + 0.35 * uniform, 0.65 + 0.45 * uniform)
    room = torch.where(scene, (1 - scale) * 1.1, (1 - scale).abs() + 0.08)
    shift = (2 * torch.rand(n, 2, device=device) - 1) * room[:, None]
    angle = 0.12 * torch.randn(n, device=device)
    drawings = recolour(premultiplied(archive.pixels[rows]))
    layer = place(drawings, scale, shift, angle, size)
    image = paste(image, layer)
    return (image - 0.5) / 0.5
