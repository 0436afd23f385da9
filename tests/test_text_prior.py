# SPDX-License-Identifier: Apache-2.0
"""The choice of the text prior, on features whose best strength is known by construction."""

import pytest
import torch
import torch.nn.functional as F

from peft_sage import SageLoss, choose_text_prior, fit_head, fitting


WIDTH = 16


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(fitting, "STEPS", 60)


def make_bed(counts: list[int], texts: str, noise: float = 0.5):
    """Features around class means; `texts` are those means, or have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, len(counts), WIDTH)
    means, other = F.normalize(torch.randn(shape, generator=generator), dim=-1)
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


def test_label_errors_have_a_low_probability_and_another_likeliest_class():
    features, true, texts = make_bed([30] * 5, "true", noise=0.2)
    labels = true.clone()
    wrong = torch.arange(0, 150, 30)
    labels[wrong] = (labels[wrong] + 1) % 5
    prior = choose_text_prior(features, labels, texts, strengths=(0, 1))
    assert set(wrong.tolist()) <= set(prior.label_probability.argsort()[:8].tolist())
    assert torch.equal(prior.predicted_label[wrong], true[wrong])


def held_out(prior):
    assert torch.equal(prior.predicted_label < 0, prior.label_probability.isnan())
    return prior.predicted_label >= 0


def test_each_image_is_held_out_but_for_classes_that_it_is_alone_in():
    features, labels, texts = make_bed([9, 2, 1, 0, 5], "true")
    prior = choose_text_prior(features, labels, texts, strengths=(0, 1))
    assert torch.equal(held_out(prior), labels != 2)


def test_groups_stay_together():
    """Copies of an image are held out from the same head, and get the same answer."""
    features, labels, texts = make_bed([12, 12], "true")
    groups = torch.arange(24) // 3
    bed = (features[::3].repeat_interleave(3, dim=0), labels, texts)
    settings = {"strengths": (0,), "folds": 4}

    def copies(**given):
        prior = choose_text_prior(*bed, **settings, **given)
        return prior.label_probability.view(8, 3).std(dim=1)

    assert (copies(groups=groups) < 1e-6).all() and (copies() > 1e-6).any()
    # Each class is one group: nothing can be held out.
    with pytest.raises(ValueError, match="two images .or groups."):
        choose_text_prior(*bed, groups=labels)
    # The second class is one group, and stays.
    prior = choose_text_prior(*bed, groups=groups.where(labels == 0, 99), **settings)
    assert torch.equal(held_out(prior), labels == 0)


def test_absent_classes_are_given_a_place_by_the_data():
    """True texts answer for classes without images, false ones do not, and cost the others."""
    counts = [0 if k % 3 == 0 else 25 for k in range(24)]
    true, false = (
        choose_text_prior(*make_bed(counts, texts), strengths=(0, 1))
        for texts in ("true", "false")
    )
    # The less they count, the more strength holds the others to their texts, beyond what was tried.
    assert true.scores[1] > true.scores[0]
    assert (true.strength, true.absent) in [(3, 0.1), (9, None)]
    assert "classes without images" in str(true)
    assert false.strength <= 1 and false.absent == 1
    assert "classes without images" not in str(false)
    fixed = choose_text_prior(*make_bed(counts, "true"), strengths=(1,))
    assert fixed.strength == 1 and fixed.absent != 1
    # Without such classes there is nothing to choose.
    assert choose_text_prior(*make_bed(COUNTS, "true")).absent == 1
    # Left out of the softmax, with no prior, they stay at their texts.
    features, labels, texts = make_bed(counts, "true")
    loss = SageLoss.from_labels(labels, 24, absent=None)
    rows = fit_head(features, labels, texts, loss)
    torch.testing.assert_close(rows[::3], texts[::3])
    assert ((rows * texts).sum(dim=1)[1::3] < 0.99).all()


def test_a_fitted_head_ends_where_training_with_the_loss_ends():
    """The gradient of a head on frozen features is that of `SageLoss` through its own steps."""
    features, labels, texts = make_bed(COUNTS, "true")
    features = F.normalize(features, dim=-1)
    loss = SageLoss.from_labels(labels, len(COUNTS), text_prior=0.3)
    fitted = fit_head(features, labels, texts, loss)
    torch.testing.assert_close(fitted.norm(dim=-1), torch.ones(len(COUNTS)))
    assert not loss.covariance.scatter.numel()
    weight = texts.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=fitting.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fitting.STEPS)
    for _ in range(fitting.STEPS):  # batches of all images, as there are few
        rows = F.normalize(weight, dim=-1)
        outputs = {
            "logits": fitting.SCALE * features @ rows.T,
            "image_embeds": features,
            "class_embeds": rows,
            "text_embeds": texts,
            "logit_scale": fitting.SCALE,
        }
        optimizer.zero_grad()
        loss(outputs, labels).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(
        fitted, F.normalize(weight.detach(), dim=-1), atol=1e-3, rtol=1e-3
    )
    with pytest.raises(ValueError, match="`loss` must be of the 10 classes"):
        fit_head(features, labels, texts, SageLoss([1, 2]))


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
    for given in (torch.ones_like(features), 1e4 * features.half()):
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
        ({"features": FEATURES[:, :5]}, ValueError, "`text_embeds` .* got .2, 16."),
        ({"features": FEATURES.long()}, TypeError, "`features` must be .* floats"),
        ({"features": FEATURES * torch.nan}, ValueError, "`features` must be finite"),
        ({"features": FEATURES * 0}, ValueError, "`features` .* no rows of zeros"),
        ({"labels": LABELS[1:]}, ValueError, "`labels` .* got .7,."),
        ({"labels": LABELS + 1}, ValueError, "`labels` must lie in .* got 2"),
        ({"labels": ["owl", "owl"]}, TypeError, "`labels`"),
        ({"class_counts": [1, 2, 3]}, ValueError, "`class_counts` .* got .3,."),
        ({"strengths": ()}, ValueError, "`strengths` .* got None"),
        ({"strengths": (0, -1)}, ValueError, "`strengths` .* at least 0, got -1"),
        ({"folds": 1}, ValueError, "`folds` must be an integer, at least 2, got 1"),
        ({"groups": LABELS[1:]}, ValueError, "`groups`"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    given = {"features": FEATURES, "labels": LABELS, "text_embeds": TEXTS}
    with pytest.raises(error, match=message):
        choose_text_prior(**given | arguments)


def test_a_fitted_head_refuses_smoothed_labels():
    """It would ignore them."""
    loss = SageLoss.from_labels(LABELS, 2, label_smoothing=0.1)
    with pytest.raises(ValueError, match="`label_smoothing=0` here, got 0.1"):
        fit_head(FEATURES, LABELS, TEXTS, loss)
