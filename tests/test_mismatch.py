# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn.functional as F

from peft_sage import mismatch as mismatch_module
from peft_sage.mismatch import estimate_mismatch, mismatch_from_counts


def clustered(counts: list[int], dim: int = 24, spread: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of any length around one random direction a class, in random order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    means = F.normalize(torch.randn(len(counts), dim, generator=generator), dim=1)
    features = means[labels] + spread * torch.randn(len(labels), dim, generator=generator)
    return features * torch.rand(len(labels), 1, generator=generator).add(0.5), labels


def equicorrelated(counts: list[int], cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of which any two of a class have the same cosine: one shared and one private axis each."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    shared, private = F.one_hot(labels).double(), torch.eye(len(labels), dtype=torch.float64)
    return torch.cat([math.sqrt(cosine) * shared, math.sqrt(1 - cosine) * private], dim=1), labels


def brute_force(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[float]:
    """mean_i [cos(f_i, m_k) - cos(f_i, m_{k,-i})], image by image."""
    features = F.normalize(features.double(), dim=1)
    result = []
    for k in range(num_classes):
        images = features[labels == k]
        gaps = [
            F.cosine_similarity(image, images.mean(0), dim=0)
            - F.cosine_similarity(image, torch.cat([images[:i], images[i + 1 :]]).mean(0), dim=0)
            for i, image in enumerate(images)
        ]
        result.append(float(torch.stack(gaps).mean()))
    return result


def test_counts_form():
    delta = mismatch_from_counts([10**7, 100, 20, 1, 0], effective_dim=6)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta[1:], torch.tensor([3 * math.log(1.01), 3 * math.log(1.05)] + 2 * [math.log(8)]))
    assert 0 < delta[0] < 1e-6  # tends to 0, and without being rounded to it
    assert (mismatch_from_counts(range(1, 500)).diff() < 0).all()


def test_counts_form_is_the_divergence_of_an_estimated_mean():
    """For a unit Gaussian whose mean is estimated from n samples, E KL = d / (2 n)."""
    generator = torch.Generator().manual_seed(0)
    n, dim = 200, 5
    means = torch.randn(2000, n, dim, generator=generator).mean(1)
    divergence = 0.5 * means.square().sum(1).mean()
    torch.testing.assert_close(mismatch_from_counts([n], dim)[0], divergence, rtol=0.05, atol=0)


@pytest.mark.parametrize("chunk", [1, 7 * 24, 2**18])
def test_measured_form_equals_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(mismatch_module, "_CHUNK_ELEMENTS", chunk)
    counts = [40, 12, 5, 3, 2]
    features, labels = clustered(counts)
    got = estimate_mismatch(features, labels, len(counts), scale=25.0, shrinkage=0.0)
    torch.testing.assert_close(got, 25 * torch.tensor(brute_force(features, labels, 5)), atol=1e-5, rtol=1e-4)


def test_groups_are_left_out_together():
    features, labels = clustered([40, 12, 6])
    groups = torch.arange(len(labels)) % 5
    got = estimate_mismatch(features, labels, 3, scale=25.0, shrinkage=0.0, groups=groups)
    unit = F.normalize(features.double(), dim=1)
    for k in range(3):
        gaps = []
        for image, group in zip(unit[labels == k], groups[labels == k], strict=True):
            others = unit[(labels == k) & (groups != group)]
            own = F.cosine_similarity(image, unit[labels == k].mean(0), dim=0)
            gaps.append(own - F.cosine_similarity(image, others.mean(0), dim=0))
        torch.testing.assert_close(got[k].double(), 25 * torch.stack(gaps).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 10.0])
def test_groups_of_one_image_change_nothing(shrinkage):
    features, labels = clustered([40, 12, 5, 1])
    groups = torch.randperm(len(labels)) + 7
    got = estimate_mismatch(features, labels, 5, scale=25.0, shrinkage=shrinkage, groups=groups)
    torch.testing.assert_close(got, estimate_mismatch(features, labels, 5, scale=25.0, shrinkage=shrinkage))


def test_copies_of_an_image_are_seen_through_by_groups():
    """Every image three times: as groups they are worth one image each, which leaving out one image does not tell."""
    features, labels = clustered([30, 10, 4])
    copies = features.repeat(3, 1), labels.repeat(3)
    groups = torch.arange(len(labels)).repeat(3)
    want = estimate_mismatch(features, labels, 3, scale=25.0)
    torch.testing.assert_close(estimate_mismatch(*copies, 3, scale=25.0, groups=groups), want)
    assert (estimate_mismatch(*copies, 3, scale=25.0) < 0.7 * want).all()


def test_wrong_groups():
    features, labels = clustered([4, 3])
    with pytest.raises(ValueError, match="`groups`"):
        estimate_mismatch(features, labels, 2, scale=25.0, groups=torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="`groups`"):
        estimate_mismatch(features, labels, 2, scale=25.0, groups=torch.zeros(7))
    with pytest.raises(TypeError, match="`groups`.*list"):
        estimate_mismatch(features, labels, 2, scale=25.0, groups=[0] * 7)
    with pytest.raises(ValueError, match="two groups"):
        estimate_mismatch(features, labels, 2, scale=25.0, groups=torch.zeros(7, dtype=torch.long))


def test_measured_form_is_accurate_for_large_classes():
    features, labels = clustered([20000], dim=8)
    reference = features.double(), labels
    got = estimate_mismatch(features, labels, 1, scale=1.0, shrinkage=0.0)
    torch.testing.assert_close(got, estimate_mismatch(*reference, 1, scale=1.0, shrinkage=0.0), rtol=1e-3, atol=0)
    assert 0 < got < 1e-3


@pytest.mark.parametrize("cosine", [0.1, 0.5, 0.95])
def test_equal_dispersion_gives_a_falling_mismatch_whatever_the_shrinkage(cosine):
    counts = [1, 2, 3, 4, 8, 30, 300]
    features, labels = equicorrelated(counts, cosine)
    free, drawn = (estimate_mismatch(features, labels, len(counts), 2.0, shrinkage) for shrinkage in (0.0, 50.0))
    torch.testing.assert_close(free, drawn, atol=1e-6, rtol=1e-5)  # own and pooled dispersion are one and the same
    assert (drawn.diff() < 0).all() and (drawn > 0).all()
    torch.testing.assert_close(drawn[0].item(), 2 * (1 - cosine))  # one image: the pooled dispersion itself
    leading_order = (1 - cosine) / (math.sqrt(cosine) * 300)
    torch.testing.assert_close(drawn[-1].item() / 2, leading_order, rtol=0.05, atol=0)


def test_pooled_dispersion_is_the_within_class_variance():
    counts = [30, 12, 4, 1]
    features, labels = clustered(counts)
    unit = F.normalize(features, dim=1)
    within = sum((unit[labels == k] - unit[labels == k].mean(0)).square().sum() for k in range(4)) / (46 - 3)
    torch.testing.assert_close(estimate_mismatch(features, labels, 4, scale=3.0)[3], 3 * within)


def test_small_classes_are_drawn_to_the_pooled_dispersion_and_large_ones_are_not():
    tight, wide = clustered([200, 3], spread=0.05), clustered([200, 3], spread=0.4)
    features, labels = torch.cat([tight[0], wide[0]]), torch.cat([tight[1], wide[1] + 2])
    own = estimate_mismatch(features, labels, 4, scale=1.0, shrinkage=0.0)
    drawn = estimate_mismatch(features, labels, 4, scale=1.0, shrinkage=10.0)
    assert own[1] < drawn[1] < drawn[3] < own[3]
    assert ((drawn - own).abs() / own)[[0, 2]].max() < 1.0 < ((drawn - own).abs() / own)[1]


def test_classes_with_one_image_or_none_are_finite_and_alike():
    features, labels = clustered([50, 10, 1])
    delta = estimate_mismatch(features, labels, 4, scale=25.0)
    assert delta.isfinite().all()
    assert delta[2] == delta[3] > delta[1] > delta[0]


def test_ignores_the_length_of_features_and_scales_linearly():
    features, labels = clustered([30, 5])
    delta = estimate_mismatch(features, labels, 2, scale=1.0)
    torch.testing.assert_close(estimate_mismatch(100 * features, labels, 2, scale=1.0), delta)
    torch.testing.assert_close(estimate_mismatch(features, labels, 2, scale=30.0), 30 * delta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_accumulated_in_float32(dtype):
    features, labels = clustered([5000, 50, 3])
    rounded = features.to(dtype)
    got = estimate_mismatch(rounded, labels, 3, scale=25.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, estimate_mismatch(rounded.float(), labels, 3, scale=25.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_mode_makes_no_difference(context):
    features, labels = clustered([9, 4, 2])
    want = estimate_mismatch(features, labels, 3, scale=25.0)
    with context():
        assert torch.equal(estimate_mismatch(features.clone(), labels.clone(), 3, scale=25.0), want)


def test_no_gradient_and_input_untouched():
    features, labels = clustered([30, 5])
    before = features.clone()
    assert not estimate_mismatch(features.requires_grad_(), labels, 2, scale=1.0).requires_grad
    assert torch.equal(features.detach(), before)


def test_identical_and_opposite_images_are_finite():
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1], [0, -1]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    delta = estimate_mismatch(features, labels, 2, scale=1.0, shrinkage=0.0)
    torch.testing.assert_close(delta[0], torch.tensor(0.0), atol=1e-6, rtol=0)
    assert delta.isfinite().all()


FEATURES, LABELS = torch.eye(4), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"features": torch.ones(4)}, ValueError, r"\(N, d\)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"\(3,\)"),
        ({"features": torch.eye(4).long()}, TypeError, "torch.int64"),
        ({"labels": torch.zeros(4)}, TypeError, "torch.float32"),
        ({"labels": torch.tensor([0, 0, 1, 2])}, ValueError, "got 2 at 3"),
        ({"features": torch.full((4, 4), float("nan"))}, ValueError, "finite"),
        ({"features": torch.zeros(4, 4)}, ValueError, "zero"),
        ({"scale": float("nan")}, ValueError, "`scale`"),
        ({"shrinkage": -1.0}, ValueError, "`shrinkage`"),
        ({"labels": torch.arange(4), "num_classes": 4}, ValueError, "no class with two images"),
    ],
)
def test_wrong_input(change, error, match):
    with pytest.raises(error, match=match):
        estimate_mismatch(**{"features": FEATURES, "labels": LABELS, "num_classes": 2, "scale": 1.0, **change})
