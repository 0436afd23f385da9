# SPDX-License-Identifier: Apache-2.0
"""The choice of the text prior, on features whose best strength is known by construction."""

import pytest
import torch
import torch.nn.functional as F

from peft_sage import choose_text_prior, fitting
from peft_sage.text_prior import _folds


WIDTH = 16


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", 60)


def make_bed(counts: list[int], texts: str, noise: float = 0.5):
    """Features around class means; `texts` are those means, or have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    means, other = F.normalize(
        torch.randn(2, len(counts), WIDTH, generator=generator), dim=-1
    )
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    features = means[labels] + noise * torch.randn(
        len(labels), WIDTH, generator=generator
    )
    return features, labels, means if texts == "true" else other


COUNTS = [60, 40, 25, 15, 9, 6, 4, 3, 2, 2]


def test_true_texts_are_trusted_and_false_ones_are_not():
    true = choose_text_prior(*make_bed(COUNTS, "true"))
    false = choose_text_prior(*make_bed(COUNTS, "false"))
    assert true.strength >= 1 and false.strength <= 0.1
    assert true.scores[10] > true.scores[0] and false.scores[10] < false.scores[0]
    assert list(true.scores) == [0, 0.1, 0.3, 1, 3, 10]
    assert f"text prior {true.strength:g}" in str(true) and "10: " in str(true)


def test_it_is_seeded_and_leaves_the_random_state_alone():
    bed = make_bed(COUNTS, "true")
    state = torch.get_rng_state()
    once, again = (choose_text_prior(*bed, strengths=(0, 1), seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert once.scores == again.scores
    assert choose_text_prior(*bed, strengths=(0, 1), seed=4).scores != once.scores


def test_label_errors_have_a_low_probability():
    features, labels, texts = make_bed([30] * 5, "true", noise=0.2)
    labels[::30] = (labels[::30] + 1) % 5
    probability = choose_text_prior(
        features, labels, texts, strengths=(0, 1)
    ).label_probability
    assert set(range(0, 150, 30)) <= set(probability.argsort()[:8].tolist())


def test_each_image_is_held_out_once_but_for_classes_that_it_is_alone_in():
    features, labels, texts = make_bed([9, 2, 1, 0, 5], "true")
    prior = choose_text_prior(features, labels, texts, strengths=(0, 1))
    assert prior.label_probability.isnan().tolist() == (labels == 2).tolist()
    fold = _folds(labels, None, 3, torch.Generator().manual_seed(0))
    assert torch.bincount(fold[labels == 0]).tolist() == [3, 3, 3]  # stratified
    assert len(fold[labels == 1].unique()) == 2


def test_groups_stay_together():
    features, labels, texts = make_bed([12, 12, 6], "true")
    groups = torch.arange(len(labels)) // 3
    fold = _folds(labels, groups, 3, torch.Generator().manual_seed(0))
    for group in groups.unique():
        assert len(fold[groups == group].unique()) == 1
    assert len(fold[labels == 0].unique()) == 3
    # Each class is one group: nothing can be held out.
    with pytest.raises(ValueError, match="two images .or groups."):
        choose_text_prior(features, labels, texts, groups=labels)
    # The third class is one group, and stays.
    prior = choose_text_prior(
        features,
        labels,
        texts,
        groups=torch.where(labels == 2, 99, groups),
        strengths=(0, 1),
    )
    assert prior.label_probability.isnan().tolist() == (labels == 2).tolist()


def test_a_sample_stands_for_the_training_set_by_its_counts():
    """Of the counts only their ratios matter to the adjustment, and their size to the compensation."""
    bed = make_bed([20, 20, 20], "true", noise=1.0)
    of = [
        choose_text_prior(*bed, class_counts=counts, strengths=(0,))
        for counts in ([20, 20, 20], [2000, 20, 20])
    ]
    assert of[0].scores != of[1].scores
    assert choose_text_prior(*bed, strengths=(0,)).scores == of[0].scores


def test_extreme_data_gives_an_answer():
    features, labels, texts = make_bed(COUNTS, "true")
    for given in (torch.ones_like(features), features.half(), 1e4 * features):
        assert choose_text_prior(given, labels, texts, strengths=(0, 1)).strength in (
            0,
            1,
        )
    assert choose_text_prior(
        features, labels, texts, folds=50, strengths=(0, 1)
    ).strength in (0, 1)
    one_class = choose_text_prior(
        features[:60], labels[:60], texts[:1], strengths=(0, 1)
    )
    assert one_class.strength == 0 and one_class.scores == {0: 1, 1: 1}


FEATURES, LABELS, TEXTS = make_bed([4, 4], "true")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"features": FEATURES[:, :5]},
            ValueError,
            r"`text_embeds` must have the shape \(M, 5\), got \(2, 16\)",
        ),
        (
            {"features": FEATURES.long()},
            TypeError,
            "`features` must be a tensor of floats",
        ),
        ({"features": FEATURES * torch.nan}, ValueError, "`features` must be finite"),
        (
            {"features": FEATURES * 0},
            ValueError,
            "`features` must have no rows of zeros",
        ),
        ({"text_embeds": TEXTS[0]}, ValueError, "`text_embeds`"),
        (
            {"labels": LABELS[1:]},
            ValueError,
            r"`labels` must have the shape \(8,\), got \(7,\)",
        ),
        ({"labels": LABELS + 1}, ValueError, r"`labels` must lie in \[0, 2\), got 2"),
        ({"labels": LABELS.float()}, TypeError, "`labels`"),
        ({"labels": ["owl", "owl"]}, TypeError, "`labels`"),
        (
            {"labels": torch.arange(2), "features": FEATURES[:2]},
            ValueError,
            "a class with two images",
        ),
        (
            {"class_counts": [1, 2, 3]},
            ValueError,
            r"`class_counts` must have the shape \(2,\), got \(3,\)",
        ),
        ({"class_counts": [-1, 2]}, ValueError, "`class_counts`"),
        (
            {"strengths": ()},
            ValueError,
            "`strengths` must be a finite number, at least 0, got None",
        ),
        (
            {"strengths": (0, -1)},
            ValueError,
            "`strengths` must be a finite number, at least 0, got -1",
        ),
        ({"folds": 1}, ValueError, "`folds` must be an integer, at least 2, got 1"),
        ({"groups": LABELS.float()}, TypeError, "`groups`"),
        ({"groups": LABELS[1:]}, ValueError, "`groups`"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        choose_text_prior(
            **{
                "features": FEATURES,
                "labels": LABELS,
                "text_embeds": TEXTS,
                **arguments,
            }
        )
