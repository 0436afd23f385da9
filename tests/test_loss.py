# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from peft_sage.loss import SageLoss


COUNTS = [400, 60, 9, 1, 0]
K = len(COUNTS)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(16, K, generator=generator), torch.randint(
        0, K, (16,), generator=generator
    )


def soft(labels: torch.Tensor) -> torch.Tensor:
    """Mixup of a batch with itself in reverse."""
    one_hot = F.one_hot(labels, K).float()
    return 0.7 * one_hot + 0.3 * one_hot.flip(0)


def value_and_grad(
    loss_fn, logits: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    loss = loss_fn(logits, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize(
    "labels_of", [lambda labels: labels, soft], ids=["indices", "probabilities"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_corrections_is_cross_entropy(batch, labels_of, reduction, smoothing):
    logits, labels = batch[0], labels_of(batch[1])
    loss = SageLoss(
        COUNTS, tau=0, compensation=0, reduction=reduction, label_smoothing=smoothing
    )
    expected = value_and_grad(
        F.cross_entropy, logits, labels, reduction=reduction, label_smoothing=smoothing
    )
    for got, want in zip(value_and_grad(loss, logits, labels), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_without_compensation_is_logit_adjustment(batch, tau):
    logits, labels = batch

    def balanced_softmax(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weighted = (
            torch.tensor([400.0, 60, 9, 1, 1]).pow(tau) * z.exp()
        )  # Ren et al. 2020, eq. 3, with n_k^tau
        return (
            -(weighted.gather(1, y[:, None]).squeeze(1) / weighted.sum(1)).log().mean()
        )

    got, want = (
        value_and_grad(f, logits, labels)
        for f in (SageLoss(COUNTS, tau, 0), balanced_softmax)
    )
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def features_of_batch(labels: torch.Tensor, width: int = 4) -> dict[str, torch.Tensor]:
    """An output of a classifier in training mode, in float64."""
    generator = torch.Generator().manual_seed(1)

    def unit(rows: int) -> torch.Tensor:
        return F.normalize(
            torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1
        )

    embeds = {
        "image_embeds": unit(len(labels)),
        "class_embeds": unit(K),
        "text_embeds": unit(K),
    }
    embeds |= {"base_image_embeds": unit(len(labels)), "logit_scale": 5.0}
    return with_logits(embeds)


def with_logits(outputs: dict) -> dict:
    return outputs | {
        "logits": outputs["logit_scale"]
        * outputs["image_embeds"]
        @ outputs["class_embeds"].T
    }


def pooled_covariance(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class by class, as one would write it down."""
    total = torch.zeros(values.shape[1], values.shape[1], dtype=values.dtype)
    for label in labels.unique():
        own = values[labels == label]
        total += sum(torch.outer(x, x) for x in own - own.mean(dim=0))
    return total / (len(labels) - len(labels.unique()))


def compensated(
    logits: torch.Tensor, labels: torch.Tensor, covariance: torch.Tensor
) -> torch.Tensor:
    """The documented loss of each image, entry by entry; `covariance` (K, K) is that of the logits."""
    counts = torch.tensor([400.0, 60, 9, 1, 1], dtype=torch.float64)
    losses = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        spread = [
            covariance[k, k] + covariance[y, y] - 2 * covariance[k, y] for k in range(K)
        ]
        gamma = 0.4 + 8 / counts[y]
        terms = [
            z[k] - z[y] + (counts[k] / counts[y]).log() + gamma / 2 * spread[k]
            for k in range(K)
        ]
        losses.append(torch.stack(terms).logsumexp(0))
    return torch.stack(losses)


def test_of_logits_it_is_the_documented_formula_with_its_gradient(batch):
    logits, labels = batch[0].double(), batch[1]
    got = value_and_grad(SageLoss(COUNTS, reduction="none"), logits, labels)
    want = value_and_grad(
        lambda z, y: compensated(z, y, pooled_covariance(z, y)), logits, labels
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_of_features_it_is_the_documented_formula_with_the_gradient_of_the_head(batch):
    outputs, labels = features_of_batch(batch[1]), batch[1]
    covariance = pooled_covariance(outputs["image_embeds"], labels)

    def of(loss):
        rows = outputs["class_embeds"].clone().requires_grad_()
        images = outputs["image_embeds"].clone().requires_grad_()
        losses = loss(
            with_logits(outputs | {"class_embeds": rows, "image_embeds": images})
        )
        losses.sum().backward()
        return losses.detach(), rows.grad, images.grad

    got = of(lambda out: SageLoss(COUNTS, reduction="none")(out, labels))

    def of_logits(out):  # scale 5
        return 25 * out["class_embeds"] @ covariance @ out["class_embeds"].T

    want = of(lambda out: compensated(out["logits"], labels, of_logits(out)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_first_batch_is_the_same_of_features_and_of_logits(batch):
    outputs = features_of_batch(batch[1])
    got, want = (
        SageLoss(COUNTS)(given, batch[1]) for given in (outputs, outputs["logits"])
    )
    torch.testing.assert_close(got, want)


def test_it_bounds_the_expected_loss_of_new_images(batch):
    """Monte Carlo over the noise that the compensation stands for."""
    outputs, labels = features_of_batch(batch[1]), batch[1]
    loss, adjusted = (
        SageLoss(COUNTS, compensation=factor, reduction="none") for factor in (1, 0)
    )
    noise = torch.randn(
        4000, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    noise = (
        noise
        @ torch.linalg.cholesky(pooled_covariance(outputs["image_embeds"], labels)).T
    )
    images = outputs["image_embeds"] + loss.gamma[labels, None].sqrt() * noise
    logits = (5.0 * images @ outputs["class_embeds"].T).flatten(0, 1)
    expected = adjusted(logits, labels.repeat(4000)).view(4000, -1).mean(dim=0)
    bound = loss(outputs, labels)
    assert (bound > expected).all() and (expected > adjusted(outputs, labels)).all()


def test_the_covariance_is_a_moving_average_in_which_batches_count_by_their_pairs(
    batch,
):
    labels = batch[1]
    loss = SageLoss(COUNTS)
    first, second = features_of_batch(labels), features_of_batch(labels[:6])
    loss(first, labels)
    loss(second, labels[:6])
    sizes = [len(part) - len(part.unique()) for part in (labels, labels[:6])]
    parts = [
        pooled_covariance(out["image_embeds"], part)
        for out, part in ((first, labels), (second, labels[:6]))
    ]
    want = (0.95 * sizes[0] * parts[0] + sizes[1] * parts[1]) / (
        0.95 * sizes[0] + sizes[1]
    )
    torch.testing.assert_close(loss.covariance.matrix, want)
    # A batch without pairs says nothing, and takes nothing away.
    loss(features_of_batch(torch.arange(K)), torch.arange(K))
    torch.testing.assert_close(loss.covariance.matrix, want)


def test_an_overflown_batch_leaves_no_trace(batch):
    loss = SageLoss(COUNTS)
    loss(features_of_batch(batch[1]), batch[1])
    before = loss.covariance.scatter.clone()
    loss.covariance.update(
        torch.full((4, 4), torch.inf, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    )
    assert torch.equal(loss.covariance.scatter, before)


def test_where_there_is_nothing_to_compensate_it_is_logit_adjustment(batch):
    logits, labels = batch
    adjusted, loss = (
        SageLoss(COUNTS, compensation=0),
        SageLoss(COUNTS, text_prior=1.0, text_guidance=1.0),
    )
    one_each = torch.arange(K)
    torch.testing.assert_close(
        SageLoss(COUNTS)(logits[:K], one_each), adjusted(logits[:K], one_each)
    )
    torch.testing.assert_close(
        SageLoss(COUNTS)(logits, soft(labels)), adjusted(logits, soft(labels))
    )
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
    torch.testing.assert_close(
        loss(logits, labels), hard + 0.1 * (target - adjusted.mean(dim=1))
    )


def test_the_text_terms_are_the_documented_formulas(batch):
    outputs, labels = features_of_batch(batch[1]), batch[1]
    plain = SageLoss(COUNTS, reduction="none")(outputs, labels)
    prior = SageLoss(COUNTS, text_prior=0.3, reduction="none")(outputs, labels)
    distance = 1 - F.cosine_similarity(outputs["class_embeds"], outputs["text_embeds"])
    torch.testing.assert_close(prior, plain + 0.3 * distance.mean())
    guided = SageLoss(COUNTS, text_guidance=0.2, reduction="none")(outputs, labels)
    frozen, seen = (
        torch.distributions.Categorical(
            logits=5 * outputs[name] @ outputs["text_embeds"].T
        )
        for name in ("base_image_embeds", "image_embeds")
    )
    torch.testing.assert_close(
        guided, plain + 0.2 * torch.distributions.kl_divergence(frozen, seen)
    )
    same = outputs | {
        "base_image_embeds": outputs["image_embeds"],
        "class_embeds": outputs["text_embeds"],
    }
    same = with_logits(same)
    both = SageLoss(COUNTS, text_prior=2.0, text_guidance=3.0)
    torch.testing.assert_close(both(same, labels), SageLoss(COUNTS)(same, labels))


def test_the_text_terms_count_once_whatever_the_accumulation(batch):
    outputs, labels = features_of_batch(batch[1]), batch[1]
    loss = SageLoss(COUNTS, compensation=0, text_prior=0.3, text_guidance=0.2)

    def part(rows: slice) -> dict:
        names = ("logits", "image_embeds", "base_image_embeds")
        return {
            name: value[rows] if name in names else value
            for name, value in outputs.items()
        }

    parts = [
        loss(part(rows), labels[rows], num_items_in_batch=16)
        for rows in (slice(0, 5), slice(5, 16))
    ]
    torch.testing.assert_close(sum(parts), loss(outputs, labels))


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        ({"text_prior": 1.0}, "text_embeds", "`text_prior` needs `text_embeds`"),
        ({"text_prior": 1.0}, "class_embeds", "`text_prior` needs `class_embeds`"),
        (
            {"text_guidance": 1.0},
            "base_image_embeds",
            "`text_guidance` needs `base_image_embeds`",
        ),
        (
            {"text_guidance": 1.0},
            "image_embeds",
            "`text_guidance` needs `image_embeds`",
        ),
    ],
)
def test_a_text_term_without_what_it_needs_is_refused(
    batch, settings, missing, message
):
    outputs = features_of_batch(batch[1])
    with pytest.raises(ValueError, match=message):
        SageLoss(COUNTS, **settings)(outputs | {missing: None}, batch[1])
    with pytest.raises(ValueError, match=next(iter(settings))):
        SageLoss(COUNTS, **settings)(outputs["logits"], batch[1])


@pytest.mark.parametrize(
    "name", ["image_embeds", "class_embeds", "text_embeds", "base_image_embeds"]
)
def test_embeddings_are_checked(batch, name):
    outputs = features_of_batch(batch[1])
    for wrong in (
        outputs[name][:-1],
        outputs[name][:, 0],
        outputs[name] * torch.nan,
        outputs[name].tolist(),
    ):
        loss = SageLoss(COUNTS)
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            loss(outputs | {name: wrong}, batch[1])
        assert loss.covariance.scatter.numel() == 0
    with pytest.raises(ValueError, match="one width"):
        SageLoss(COUNTS)(outputs | {name: outputs[name][:, 1:]}, batch[1])


def test_a_target_like_the_training_data_needs_no_prior_correction():
    counts = torch.tensor([80, 15, 5])
    torch.testing.assert_close(
        SageLoss(counts, compensation=0, target_prior=counts / 100).adjustment,
        torch.zeros(3),
        atol=1e-6,
        rtol=0,
    )


def test_ignored_images_do_not_count(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS, ignore_index=-1)
    padded = (
        torch.cat([logits, torch.full((3, K), 7.0)]),
        torch.cat([labels, torch.full((3,), -1)]),
    )
    value, grad = value_and_grad(loss, *padded)
    want, want_grad = value_and_grad(loss, logits, labels)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, torch.cat([want_grad, torch.zeros(3, K)]))


def test_one_hot_probabilities_equal_indices(batch):
    logits, labels = batch
    settings = {"compensation": 0, "label_smoothing": 0.1}
    loss = SageLoss(
        COUNTS, **settings, ignore_index=2
    )  # an index to ignore has no meaning for probabilities
    plain = SageLoss(COUNTS, **settings)
    torch.testing.assert_close(
        loss(logits, F.one_hot(labels, K).half()), plain(logits, labels)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32(batch, dtype):
    logits, labels = batch[0].to(dtype), batch[1]
    loss = SageLoss([10**6, 10**4, 100, 1, 1])
    value, grad = value_and_grad(loss, logits, labels)
    want, want_grad = value_and_grad(loss, logits.float(), labels)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad.to(dtype))
    extreme = torch.full((1, K), -6e4, dtype=dtype).index_fill(
        1, torch.tensor([0]), 6e4
    )
    assert loss(extreme, torch.tensor([3])).isfinite()


def test_buffers_keep_float32_and_their_values():
    loss = SageLoss(COUNTS)
    want = loss.adjustment.clone(), loss.gamma.clone()
    for cast in (
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.bfloat16),
    ):
        model = cast(nn.ModuleList([copy.deepcopy(loss), nn.Linear(2, 2)]))
        assert model[1].weight.dtype != torch.float32
        for buffer, value in zip(
            (model[0].adjustment, model[0].gamma), want, strict=True
        ):
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, value)


def test_under_autocast_it_is_computed_in_float32(batch):
    outputs, labels = features_of_batch(batch[1]), batch[1]
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
    outputs, labels = features_of_batch(batch[1]), batch[1]
    settings = {"label_smoothing": 0.1, "text_prior": 0.3, "text_guidance": 0.2}
    for given in (outputs, batch[0]):
        loss, twin = (
            SageLoss(COUNTS, **(settings if given is outputs else {})) for _ in range(2)
        )
        compiled = torch.compile(twin, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(given, labels), loss(given, labels))
        torch.testing.assert_close(twin.state_dict(), loss.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_follows_the_logits_to_their_device(batch):
    outputs, labels = features_of_batch(batch[1]), batch[1]
    loss = SageLoss(COUNTS)
    want = loss(outputs, labels)
    moved = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in outputs.items()
    }
    torch.testing.assert_close(loss(moved, labels).cpu(), want)
    assert loss.adjustment.is_cuda and loss.covariance.scatter.is_cuda


def test_the_moving_average_is_saved_copied_and_resumed(batch):
    outputs, labels = features_of_batch(batch[1]), batch[1]
    trained = SageLoss(COUNTS)
    trained(outputs, labels)
    resumed = SageLoss(COUNTS)
    resumed.load_state_dict(trained.state_dict())
    assert set(resumed.state_dict()) == {
        "covariance.scatter",
        "covariance.degrees_of_freedom",
    } and not list(resumed.parameters())
    want = copy.deepcopy(trained)(outputs, labels)
    for loss in (trained, resumed):
        assert torch.equal(loss(outputs, labels), want)


def test_from_labels_counts():
    labels = [0] * 7 + [2] * 3
    torch.testing.assert_close(
        SageLoss.from_labels(labels, 4, tau=0.5).adjustment,
        SageLoss([7, 0, 3, 0], tau=0.5).adjustment,
    )


def test_takes_the_logits_out_of_model_outputs(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS)
    for outputs in (
        ImageClassifierOutput(logits=logits),
        {"logits": logits},
        (logits, None),
    ):
        assert torch.equal(loss(outputs, labels), loss(logits, labels))


class TinyClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, K)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.linear(x))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_trainer_with_gradient_accumulation_takes_the_step_of_the_whole_batch(
    tmp_path, batch, kind
):
    images = torch.randn(len(batch[1]), 3, generator=torch.Generator().manual_seed(1))
    labels = batch[1].clone() if kind == "indices" else soft(batch[1])
    if kind == "indices":
        labels[:3] = -100  # micro-batches of unequal numbers of images
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=1,
        learning_rate=0.5,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = TinyClassifier()
    dataset = [{"x": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    # Not the compensation: each micro-batch measures its own.
    loss = SageLoss(COUNTS, compensation=0)
    Trainer(model, arguments, train_dataset=dataset, compute_loss_func=loss).train()

    reference = TinyClassifier()
    loss(reference(images), labels).backward()
    for got, start in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            got.detach(), start.detach() - 0.5 * start.grad, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"class_counts": [3, -1]}, "-1.0 for class 1"),
        ({"class_counts": [float("nan"), 2]}, "nan for class 0"),
        ({"class_counts": [float("inf"), 2]}, "inf for class 0"),
        ({"class_counts": [0.75, 0.25]}, "not frequencies"),
        ({"class_counts": [0, 0]}, "all zero"),
        ({"class_counts": []}, r"shape \(K,\)"),
        ({"class_counts": [[1, 2]]}, r"got \(1, 2\)"),
        ({"class_counts": 5}, r"got \(\)"),
        ({"tau": float("nan")}, "`tau`"),
        ({"compensation": float("inf")}, "`compensation`"),
        ({"compensation": -0.5}, "`compensation`"),
        ({"text_prior": -1}, "`text_prior`"),
        ({"text_guidance": "auto"}, "`text_guidance`"),
        ({"label_smoothing": 1.5}, "`label_smoothing`"),
        ({"reduction": "average"}, "'average'"),
        ({"target_prior": [0.5, 0.4]}, "with the sum 1, got .*0.4"),
        ({"target_prior": [1.2, -0.2]}, "`target_prior`"),
        ({"target_prior": [float("nan"), 0.5]}, "`target_prior`"),
        ({"target_prior": [1.0]}, "2 positive numbers"),
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
        {"target_prior": "uniform"},
    ],
)
def test_settings_of_a_wrong_type(arguments):
    with pytest.raises(TypeError, match=f"`{next(iter(arguments))}`"):
        SageLoss(**{"class_counts": [3, 1], **arguments})


@pytest.mark.parametrize(
    "counts", [range(1, 4), (1, 2, 3), torch.tensor([1.0, 2, 3], dtype=torch.float16)]
)
def test_counts_come_in_any_form(counts):
    assert torch.equal(SageLoss(counts).adjustment, SageLoss([1, 2, 3]).adjustment)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("outputs", "labels", "error", "match"),
    [
        (torch.zeros(2, 4), LABELS, ValueError, r"\(B, 5\), got \(2, 4\)"),
        (torch.zeros(K), LABELS, ValueError, r"\(B, 5\)"),
        (torch.zeros(2, K), torch.tensor([0, K]), ValueError, r"got 5 at 1"),
        (torch.zeros(2, K), torch.tensor([0, -1]), ValueError, r"got -1 at 1"),
        (
            torch.zeros(2, K),
            torch.tensor([0, 1, 2]),
            ValueError,
            r"shape \(2,\), got \(3,\)",
        ),
        (torch.zeros(2, K), torch.zeros(2, 4), ValueError, r"\(2, 5\)"),
        (
            torch.zeros(2, K),
            torch.zeros(2, K, dtype=torch.long),
            ValueError,
            r"indices \(B,\) or probabilities",
        ),
        (torch.zeros(2, K), torch.zeros(2), TypeError, "torch.float32"),
        (torch.zeros(2, K), torch.tensor([True, False]), TypeError, "torch.bool"),
        (torch.zeros(2, K), None, TypeError, "NoneType"),
        (torch.zeros(2, K, dtype=torch.long), LABELS, TypeError, "torch.int64"),
        ({"loss": torch.zeros(())}, LABELS, ValueError, "logits"),
        ({"logits": None}, LABELS, TypeError, "NoneType"),
    ],
)
def test_wrong_input(outputs, labels, error, match):
    with pytest.raises(error, match=match):
        SageLoss(COUNTS)(outputs, labels)
