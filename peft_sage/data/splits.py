# SPDX-License-Identifier: Apache-2.0
"""Which split a name means, splits for data that have none, and thinner ones."""

from collections import Counter
from collections.abc import Iterable

import numpy as np


#: What a split may be called as well, where none has the name that was asked for.
OTHER_NAMES = {
    "train": ["training"],
    "validation": ["valid", "val", "dev"],
    "test": ["testing"],
}


def match_splits(found: Iterable[str], wanted: dict[str, str]) -> dict[str, str]:
    """Return which of the names is which split; other spellings count where the wanted one is missing."""
    left = list(found)
    matched = {}
    for key, name in sorted(wanted.items(), key=lambda item: item[1] not in left):
        for candidate in [name, *OTHER_NAMES.get(name, [])]:
            hits = [other for other in left if other == candidate]
            hits += [other for other in left if other.lower() == candidate]
            if hits and key not in matched:
                matched[key] = hits[0]
                left.remove(hits[0])
    return matched


def draw_splits(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Draw about 70% of each class for training, 10% for validation and 20% for testing.

    A group stays together, which no splitter of scikit-learn does by classes of a few images. Every class of at least
    two groups has one in training and one in the test; a class of one is in training.

    Args:
        labels: (N,) class indices.
        groups: (N,) indices of the groups.

    Returns:
        (N,) keys of the splits.
    """
    generator = np.random.default_rng(seed)
    part_of: dict[int, str] = {}
    for label in np.unique(labels):
        members = groups[labels == label]
        sizes = Counter(members.tolist())
        drawn = sorted(
            generator.permutation(np.unique(members)).tolist(), key=sizes.__getitem__
        )
        room = {
            "test": max(0.2 * len(members), sizes[drawn[0]]),
            "validation": 0.1 * len(members),
        }
        # A group of several classes is where the first of them put it.
        for group in [group for group in drawn if group in part_of]:
            drawn.remove(group)
            if part_of[group] in room:
                room[part_of[group]] -= sizes[group]
        if drawn:
            part_of[drawn.pop()] = "train"
        for group in generator.permutation(drawn).tolist():
            fits = [part for part in room if sizes[group] <= room[part] + 0.5]
            part_of[group] = fits[0] if fits else "train"
            if fits:
                room[fits[0]] -= sizes[group]
    return np.array([part_of[group] for group in groups.tolist()])


def long_tailed_subset(
    labels: np.ndarray, num_classes: int, imbalance_ratio: float, seed: int
) -> np.ndarray:
    """Thin a training set to an exponential long tail.

    Class i of C keeps at most n_i = int(n_max * imb^(i / (C - 1))) images, drawn with the seed, where
    imb = 1 / imbalance_ratio and n_max is the size of the largest class; at least one, where it has any. It is the
    rule of CIFAR-100-LT (Cao et al. 2019, arXiv 1906.07413), with the classes in their own order; seed 0 draws its
    images.

    Args:
        labels: (N,) class indices.
        num_classes: C.
        imbalance_ratio: Images of the first class over images of the last, at least 1.
        seed: Decides which images stay.

    Returns:
        The sorted indices of the images that stay.

    Raises:
        ValueError: If `imbalance_ratio` is below 1, or beyond the images of the largest class.
    """
    largest = int(np.bincount(labels, minlength=num_classes).max())
    if not 1 <= imbalance_ratio <= largest:
        raise ValueError(
            f"`imbalance_ratio` must lie in [1, {largest}], up to the images of the largest class, got "
            f"{imbalance_ratio}."
        )
    # The published subsets of CIFAR-100-LT come from this older generator, class by class.
    generator = np.random.RandomState(seed)
    kept = []
    for label in range(num_classes):
        position = label / max(1, num_classes - 1)
        size = int(largest * (1 / imbalance_ratio) ** position)
        members = generator.permutation(np.flatnonzero(labels == label))
        kept.append(members[: max(1, size)])
    return np.sort(np.concatenate(kept))
