# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from peft_sage.loss import SageLoss


COUNTS = [400, 60, 9, 1, 0]
K = len(COUNTS)
EMBEDS = ("image_embeds", "class_embeds", "text_embeds", "base_image_embeds")


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, K, generator=generator)
    return logits, torch.randint(0, K, (16,), generator=generator)


def soft(labels: torch.Tensor) -> torch.Tensor:
    """Mixup of a batch with itself in reverse."""
    one_hot = F.one_hot(labels, K).float()
    return 0.7 * one_hot + 0.3 * one_hot.flip(0)


def value_and_grad(loss_fn, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    loss = loss_fn(logits, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("labels_of", [lambda labels: labels, soft])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_corrections_is_cross_entropy(batch, labels_of, reduction, smoothing):
    logits = batch[0]
    labels = labels_of(batch[1])
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    loss = SageLoss(COUNTS, tau=0, compensation=0, **settings)
    want = value_and_grad(F.cross_entropy, logits, labels, **settings)
    torch.testing.assert_close(
        value_and_grad(loss, logits, labels), want, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("absent", [1.0, 0.25])
def test_without_compensation_is_logit_adjustment(batch, tau, absent):
    def balanced_softmax(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # Ren et al. 2020, eq. 3, with n_k^tau
        weighted = torch.tensor([400.0, 60, 9, 1, absent]).pow(tau) * z.exp()
        own = weighted.gather(1, y[:, None]).squeeze(1)
        return -(own / weighted.sum(1)).log().mean()

    got, want = (
        value_and_grad(f, *batch)
        for f in (SageLoss(COUNTS, tau, 0, absent=absent), balanced_softmax)
    )
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def features_of_batch(labels: torch.Tensor, width: int = 4) -> dict:
    """An output of a classifier in training mode, in float64."""
    generator = torch.Generator().manual_seed(1)
    sizes = (len(labels), K, K, len(labels))
    embeds = {
        name: F.normalize(
            torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1
        )
        for name, rows in zip(EMBEDS, sizes, strict=True)
    }
    return with_logits(embeds | {"logit_scale": 5.0})


def with_logits(outputs: dict) -> dict:
    logits = 5.0 * outputs["image_embeds"] @ outputs["class_embeds"].T
    return outputs | {"logits": logits}


def pooled_covariance(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class by class, as one would write it down."""
    total = torch.zeros(values.shape[1], values.shape[1], dtype=values.dtype)
    for label in labels.unique():
        own = values[labels == label]
        total += sum(torch.outer(x, x) for x in own - own.mean(dim=0))
    return total / (len(labels) - len(labels.unique()))


def compensated(logits, labels, covariance):
    """The documented loss of each image, entry by entry; `covariance` (K, K) is that of the logits."""
    counts = torch.tensor([400.0, 60, 9, 1, 1], dtype=torch.float64)
    losses = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        gamma = 0.4 + 8 / counts[y]
        terms = []
        for k in range(K):
            spread = covariance[k, k] + covariance[y, y] - 2 * covariance[k, y]
            margin = (counts[k] / counts[y]).log() + gamma / 2 * spread
            terms.append(z[k] - z[y] + margin)
        losses.append(torch.stack(terms).logsumexp(0))
    return torch.stack(losses)


def test_of_logits_it_is_the_documented_formula_with_its_gradient(batch):
    logits = batch[0].double()
    labels = batch[1]
    got = value_and_grad(SageLoss(COUNTS, reduction="none"), logits, labels)
    want = value_and_grad(
        lambda z, y: compensated(z, y, pooled_covariance(z, y)), logits, labels
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_of_features_it_is_the_documented_formula_with_the_gradient_of_the_head(batch):
    outputs = features_of_batch(batch[1])
    labels = batch[1]
    covariance = pooled_covariance(outputs["image_embeds"], labels)

    def of(loss):
        leaves = {name: outputs[name].clone().requires_grad_() for name in EMBEDS[:2]}
        losses = loss(with_logits(outputs | leaves))
        losses.sum().backward()
        return losses.detach(), *[leaf.grad for leaf in leaves.values()]

    def documented(out):
        rows = 5 * out["class_embeds"]
        return compensated(out["logits"], labels, rows @ covariance @ rows.T)

    got = of(lambda out: SageLoss(COUNTS, reduction="none")(out, labels))
    torch.testing.assert_close(got, of(documented), rtol=1e-6, atol=1e-6)


def test_the_covariance_is_a_moving_average_in_which_batches_count_by_their_pairs(
    batch,
):
    labels = batch[1]
    loss = SageLoss(COUNTS)
    scatter = 0
    pairs = 0
    for part in (labels, labels[:6]):
        outputs = features_of_batch(part)
        loss(outputs, part)
        degrees = len(part) - len(part.unique())
        own = pooled_covariance(outputs["image_embeds"], part)
        scatter = 0.95 * scatter + degrees * own
        pairs = 0.95 * pairs + degrees
    torch.testing.assert_close(loss.covariance.matrix, scatter / pairs)
    # A batch without pairs says nothing, and takes nothing away; nor does one that overflowed.
    loss(features_of_batch(torch.arange(K)), torch.arange(K))
    infinite = torch.full((4, 4), torch.inf, dtype=torch.float64)
    loss.covariance.update(infinite, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(loss.covariance.matrix, scatter / pairs)


def test_a_reset_and_another_width_start_fresh(batch):
    wide, narrow = (features_of_batch(batch[1], width) for width in (6, 4))
    want = SageLoss(COUNTS)(narrow, batch[1])
    loss = SageLoss(COUNTS)
    loss(wide, batch[1])
    torch.testing.assert_close(loss(narrow, batch[1]), want)
    loss.reset()
    torch.testing.assert_close(loss(narrow, batch[1]), want)


def test_where_there_is_nothing_to_compensate_it_is_logit_adjustment(batch):
    logits, labels = batch
    adjusted = SageLoss(COUNTS, compensation=0)
    one_each = torch.arange(K)
    loss = SageLoss(COUNTS, text_prior=1.0, text_guidance=1.0)
    for given in ((logits[:K], one_each), (logits, soft(labels))):
        torch.testing.assert_close(SageLoss(COUNTS)(*given), adjusted(*given))
    with torch.no_grad():  # as Trainer evaluates
        torch.testing.assert_close(loss(logits, labels), adjusted(logits, labels))
    torch.testing.assert_close(loss.eval()(logits, labels), adjusted(logits, labels))


def test_smoothing_shares_the_target_but_not_the_noise(batch):
    """The noise has mean zero in the logits of whatever the target is; it stays in the denominator."""
    logits, labels = batch
    loss = SageLoss(COUNTS, label_smoothing=0.1, reduction="none")
    adjusted = logits + loss.adjustment
    hard = SageLoss(COUNTS, reduction="none")(logits, labels)
    target = adjusted.gather(1, labels[:, None])[:, 0]
    want = hard + 0.1 * (target - adjusted.mean(dim=1))
    torch.testing.assert_close(loss(logits, labels), want)


@pytest.mark.parametrize("labels_of", [lambda labels: labels, soft])
def test_absent_classes_left_out_change_nothing_for_the_others(batch, labels_of):
    """The loss and gradient are those without the class; in evaluation it has its place."""
    settings = {"text_prior": 0.3, "label_smoothing": 0.1}
    labels = batch[1].clamp(max=K - 2)
    outputs = features_of_batch(labels)
    others = with_logits(
        outputs | {name: outputs[name][:-1] for name in ("class_embeds", "text_embeds")}
    )
    left_out = SageLoss(COUNTS, absent=None, **settings)
    alone = SageLoss(COUNTS[:-1], **settings)
    prior = 1 - F.cosine_similarity(outputs["class_embeds"], outputs["text_embeds"])
    shift = 0.3 * (prior.mean() - prior[:-1].mean())
    targets = labels_of(labels)
    got = left_out(outputs, targets)
    want = alone(others, targets if targets.ndim == 1 else targets[:, :-1])
    torch.testing.assert_close(got, want + shift)
    left_out.text_prior = 0
    _, grad = value_and_grad(left_out, outputs["logits"].float(), targets)
    assert not grad[:, -1].any() and grad[:, :-1].any()
    with pytest.raises(
        ValueError, match="training images when `absent` is None, got 4"
    ):
        left_out(outputs, torch.full_like(labels, K - 1))
    last = torch.full_like(labels, K - 1)
    assert left_out.eval()(outputs, last) == SageLoss(COUNTS, **settings).eval()(
        outputs, last
    )


def test_the_text_terms_are_the_documented_formulas(batch):
    outputs = features_of_batch(batch[1])
    labels = batch[1]
    plain = SageLoss(COUNTS, reduction="none")(outputs, labels)
    prior = SageLoss(COUNTS, text_prior=0.3, reduction="none")(outputs, labels)
    distance = 1 - F.cosine_similarity(outputs["class_embeds"], outputs["text_embeds"])
    torch.testing.assert_close(prior, plain + 0.3 * distance.mean())
    guided = SageLoss(COUNTS, text_guidance=0.2, reduction="none")(outputs, labels)
    frozen, adapted = (
        torch.distributions.Categorical(
            logits=5 * outputs[name] @ outputs["text_embeds"].T
        )
        for name in ("base_image_embeds", "image_embeds")
    )
    divergence = torch.distributions.kl_divergence(frozen, adapted)
    torch.testing.assert_close(guided, plain + 0.2 * divergence)


@pytest.mark.parametrize(
    ("term", "missing"),
    [
        ("text_prior", "text_embeds"),
        ("text_prior", "class_embeds"),
        ("text_guidance", "base_image_embeds"),
        ("text_guidance", "image_embeds"),
    ],
)
def test_a_text_term_without_what_it_needs_is_refused(batch, term, missing):
    outputs = features_of_batch(batch[1])
    loss = SageLoss(COUNTS, **{term: 1.0})
    with pytest.raises(ValueError, match=f"`{term}` needs `{missing}`"):
        loss(outputs | {missing: None}, batch[1])
    with pytest.raises(ValueError, match=term):
        loss(outputs["logits"], batch[1])


@pytest.mark.parametrize("name", EMBEDS)
def test_embeddings_are_checked(batch, name):
    outputs = features_of_batch(batch[1])
    loss = SageLoss(COUNTS)
    right = outputs[name]
    for wrong in (right[:-1], right[:, 0], right * torch.nan, right.tolist()):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            loss(outputs | {name: wrong}, batch[1])
    with pytest.raises(ValueError, match="one width"):
        loss(outputs | {name: right[:, 1:]}, batch[1])
    assert loss.covariance.scatter.numel() == 0


def test_a_target_like_the_training_data_needs_no_prior_correction():
    counts = torch.tensor([80, 15, 5])
    loss = SageLoss(counts, compensation=0, target_prior=counts / 100)
    torch.testing.assert_close(loss.adjustment, torch.zeros(3), atol=1e-6, rtol=0)


def test_ignored_images_do_not_count(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS, ignore_index=-1)
    ignored = torch.full((3,), -1)
    padded = torch.cat([logits, torch.full((3, K), 7.0)]), torch.cat([labels, ignored])
    value, grad = value_and_grad(loss, *padded)
    want, want_grad = value_and_grad(loss, logits, labels)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, torch.cat([want_grad, torch.zeros(3, K)]))
    # Nothing but ignored images, or no images at all: nothing to learn, and no NaN.
    for rows in (slice(16, 19), slice(0, 0)):
        value, grad = value_and_grad(loss, padded[0][rows], padded[1][rows])
        assert value == 0 and not grad.any()
    # Trainer's number of images counts those of any other label than -100.
    with pytest.raises(ValueError, match="`ignore_index` must be -100 in Trainer"):
        loss(*padded, num_items_in_batch=19)


def test_one_hot_probabilities_equal_indices(batch):
    logits, labels = batch
    settings = {"compensation": 0, "label_smoothing": 0.1}
    # An index to ignore has no meaning for probabilities.
    loss = SageLoss(COUNTS, **settings, ignore_index=2)
    got = loss(logits, F.one_hot(labels, K).half())
    torch.testing.assert_close(got, SageLoss(COUNTS, **settings)(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_may_be_rounded_to_half_precision(dtype):
    logits = torch.randn(64, 1000)
    for labels in ((3 * logits).softmax(dim=1), torch.full_like(logits, 1e-3)):
        assert SageLoss([9] * 1000)(logits, labels.to(dtype)).isfinite()


@pytest.mark.parametrize(
    "labels",
    [
        [[1.0, 1, 0, 0, 0]],  # multi-hot
        [[0.0, 0, 0, 0, 0]],
        [[100.0, 0, 0, 0, 0]],  # per cent
        [[1.5, -0.5, 0, 0, 0]],  # logits
        [[float("nan"), 1, 0, 0, 0]],
        [[0.5, 0.4, 0, 0, 0]],
    ],
)
def test_soft_labels_that_are_no_probabilities_are_refused(labels):
    right = F.one_hot(torch.tensor([1]), K).float()
    labels = torch.cat([right, torch.tensor(labels)])
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=r"`labels` .* probabilities.* in row 1"):
            SageLoss(COUNTS)(torch.zeros(2, K), labels.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32(batch, dtype):
    logits = batch[0].to(dtype)
    labels = batch[1]
    loss = SageLoss([10**6, 10**4, 100, 1, 1])
    value, grad = value_and_grad(loss, logits, labels)
    want, want_grad = value_and_grad(loss, logits.float(), labels)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad.to(dtype))
    extreme = torch.full((1, K), -6e4, dtype=dtype)
    extreme[0, 0] = 6e4
    assert loss(extreme, torch.tensor([3])).isfinite()


def test_buffers_keep_float32_and_their_values():
    loss = SageLoss(COUNTS)
    model = nn.ModuleList([copy.deepcopy(loss), nn.Linear(2, 2)])
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        cast(model)
        for name in ("adjustment", "gamma"):
            buffer = getattr(model[0], name)
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, getattr(loss, name))


def test_under_autocast_it_is_computed_in_float32(batch):
    outputs = features_of_batch(batch[1])
    labels = batch[1]
    halves = {
        name: v.bfloat16() if isinstance(v, torch.Tensor) else v
        for name, v in outputs.items()
    }
    for given in (halves, halves["logits"]):
        want = SageLoss(COUNTS)(given, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = SageLoss(COUNTS)(given, labels)
        assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.slow
def test_compiles_to_one_graph(batch):
    outputs = features_of_batch(batch[1])
    labels = batch[1].clamp(max=K - 2)
    terms = {"label_smoothing": 0.1, "text_prior": 0.3, "text_guidance": 0.2}
    for given, settings in ((outputs, terms), (batch[0], {"absent": None})):
        loss, twin = (SageLoss(COUNTS, **settings) for _ in range(2))
        compiled = torch.compile(twin, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(given, labels), loss(given, labels))
        torch.testing.assert_close(twin.state_dict(), loss.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_follows_the_logits_to_their_device(batch):
    outputs = features_of_batch(batch[1])
    labels = batch[1]
    loss = SageLoss(COUNTS)
    want = loss(outputs, labels)
    moved = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in outputs.items()
    }
    torch.testing.assert_close(loss(moved, labels).cpu(), want)
    assert loss.adjustment.is_cuda and loss.covariance.scatter.is_cuda


def test_takes_the_logits_out_of_model_outputs(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS)
    outputs = ImageClassifierOutput(logits=logits), {"logits": logits}, (logits, None)
    for given in outputs:
        assert torch.equal(loss(given, labels), loss(logits, labels))


@pytest.mark.parametrize("labels_of", [lambda labels: labels, soft])
def test_parts_of_a_batch_add_up_to_the_whole(batch, labels_of):
    """As Trainer accumulates them: it counts all elements of the labels that are not -100."""
    logits = batch[0]
    labels = labels_of(batch[1])
    if labels.ndim == 1:
        labels[:3] = -100
    loss = SageLoss(COUNTS, compensation=0)  # which each part measures for itself
    count = (labels != -100).sum()
    parts = zip(logits.split(4), labels.split(4), strict=True)
    total = sum(loss(*part, num_items_in_batch=count) for part in parts)
    torch.testing.assert_close(total, loss(logits, labels))


COUNTED = pd.Series([0] * 7 + [1] * 9 + [3] * 8).value_counts()  # 1, 3, 0


@pytest.mark.parametrize(
    "counts",
    [
        (7, 9, 2, 8),
        torch.tensor([7.0, 9, 2, 8], dtype=torch.float16),
        np.array([8, 2, 9, 7])[::-1],
        pd.concat([COUNTED, pd.Series({2: 2})]),
        {3: 8, 2: np.int64(2), 1: 9, 0: 7},
        pd.Series([7, 9, 2, 8], index=[0, 1, 2, 3]).sort_values(),
    ],
)
def test_counts_come_in_any_form_and_by_their_index(counts):
    want = SageLoss([7, 9, 2, 8]).adjustment
    assert torch.equal(SageLoss(counts).adjustment, want)


def test_labels_are_counted_by_position():
    labels = pd.Series([0] * 7 + [2] * 3).sample(frac=1, random_state=0)
    loss = SageLoss.from_labels(labels, 4, tau=torch.tensor(0.5))
    assert torch.equal(loss.adjustment, SageLoss([7, 0, 3, 0], tau=0.5).adjustment)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"class_counts": [3, -1]}, "-1.0 for class 1"),
        ({"class_counts": [float("nan"), 2]}, "nan for class 0"),
        ({"class_counts": [0.75, 0.25]}, "not frequencies"),
        ({"class_counts": [0, 0]}, "all zero"),
        ({"class_counts": [[1, 2]]}, r"got \(1, 2\)"),
        ({"class_counts": {"cat": 3, "dog": 1}}, r"class indices 0 to 1.*got \['"),
        ({"class_counts": COUNTED}, r"class indices 0 to 2, each once; got \[3\]"),
        ({"class_counts": pd.Series([1, 2], index=[0, 0])}, "more than once"),
        ({"tau": True}, "`tau` must be a finite number, got True"),
        ({"compensation": -0.5}, "`compensation` must be a finite number, at least 0"),
        ({"text_prior": -1}, "`text_prior`"),
        ({"text_guidance": "auto"}, "`text_guidance`"),
        ({"label_smoothing": 1.5}, "`label_smoothing`.* at most 1, got 1.5"),
        ({"absent": 0}, "`absent`"),
        ({"ignore_index": 0.5}, "`ignore_index` must be an integer"),
        ({"reduction": "average"}, "'average'"),
        ({"target_prior": [0.5, 0.4]}, "with the sum 1, got .*0.4"),
        ({"target_prior": {"cat": 0.5, "dog": 0.5}}, "`target_prior` must be indexed"),
    ],
)
def test_wrong_settings(arguments, match):
    with pytest.raises(ValueError, match=match):
        SageLoss(**{"class_counts": [3, 1], **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_counts": None},
        {"class_counts": [True, False]},
        {"class_counts": {30, 4}},
        {"target_prior": "uniform"},
    ],
)
def test_settings_of_a_wrong_type(arguments):
    with pytest.raises(TypeError, match=f"`{next(iter(arguments))}`"):
        SageLoss(**{"class_counts": [3, 1], **arguments})


ZEROS = torch.zeros(2, K)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("outputs", "labels", "error", "match"),
    [
        (torch.zeros(2, 4), LABELS, ValueError, r"\(B, 5\), got \(2, 4\)"),
        (ZEROS, torch.tensor([0, K]), ValueError, r"got 5 at 1"),
        (ZEROS, torch.tensor([0, 1, 2]), ValueError, r"shape \(2,\), got \(3,\)"),
        (ZEROS, torch.zeros(2, 4), ValueError, r"\(2, 5\)"),
        (ZEROS, ZEROS.long(), ValueError, r"indices \(B,\) or probabilities"),
        (ZEROS, torch.zeros(2), TypeError, "torch.float32"),
        ({"loss": torch.zeros(())}, LABELS, ValueError, "logits"),
        ({"logits": None}, LABELS, TypeError, "NoneType"),
    ],
)
def test_wrong_input(outputs, labels, error, match):
    with pytest.raises(error, match=match):
        SageLoss(COUNTS)(outputs, labels)


def test_a_target_prior_is_read_by_its_index():
    shares = pd.Series([0, 1, 1, 2, 2, 2]).value_counts(normalize=True)
    assert list(shares.index) == [2, 1, 0]
    counts = [3, 2, 1]
    want = [1 / 6, 2 / 6, 3 / 6]
    got = SageLoss(counts, target_prior=shares).adjustment
    torch.testing.assert_close(got, SageLoss(counts, target_prior=want).adjustment)


def test_a_step_without_a_labelled_image_has_the_loss_zero():
    logits = torch.randn(2, 2, requires_grad=True)
    count = torch.tensor(0)
    loss = SageLoss([3, 1])(logits, torch.full((2,), -100), num_items_in_batch=count)
    loss.backward()
    assert loss == 0 and not logits.grad.any()
