# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

from peft_sage import loss as loss_module
from peft_sage.loss import SageLoss
from peft_sage.mismatch import mismatch_from_counts


COUNTS = [400, 60, 9, 1, 0]
K = len(COUNTS)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(16, K, generator=generator), torch.randint(0, K, (16,), generator=generator)


def soft(labels: torch.Tensor) -> torch.Tensor:
    """Mixup of a batch with itself in reverse."""
    one_hot = F.one_hot(labels, K).float()
    return 0.7 * one_hot + 0.3 * one_hot.flip(0)


def value_and_grad(loss_fn, logits: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    loss = loss_fn(logits, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("labels_of", [lambda labels: labels, soft], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_corrections_is_cross_entropy(batch, labels_of, reduction, smoothing):
    logits, labels = batch[0], labels_of(batch[1])
    loss = SageLoss(COUNTS, tau=0, compensation=0, reduction=reduction, label_smoothing=smoothing)
    expected = value_and_grad(F.cross_entropy, logits, labels, reduction=reduction, label_smoothing=smoothing)
    for got, want in zip(value_and_grad(loss, logits, labels), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_without_compensation_is_logit_adjustment(batch, tau):
    logits, labels = batch

    def balanced_softmax(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weighted = torch.tensor([400.0, 60, 9, 1, 1]).pow(tau) * z.exp()  # Ren et al. 2020, eq. 3, with n_k^tau
        return -(weighted.gather(1, y[:, None]).squeeze(1) / weighted.sum(1)).log().mean()

    got, want = (value_and_grad(f, logits, labels) for f in (SageLoss(COUNTS, tau, 0), balanced_softmax))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_adjustment_is_the_documented_formula():
    delta, prior = torch.tensor([0.1, 0.2, 0.5, 1.0, 3.0]), [0.5, 0.2, 0.1, 0.1, 0.1]
    loss = SageLoss(COUNTS, tau=0.7, compensation=1.5, mismatch=delta, target_prior=prior)
    pi = torch.tensor([400.0, 60, 9, 1, 1]) / 471
    torch.testing.assert_close(loss.adjustment, 0.7 * (pi.log() - torch.tensor(prior).log()))
    torch.testing.assert_close(loss.mismatch, 2 + delta)
    from_counts = SageLoss(COUNTS, effective_dim=6, base_mismatch=0.5).mismatch
    torch.testing.assert_close(from_counts, 0.5 + mismatch_from_counts(COUNTS, 6))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compensation_takes_the_mismatch_from_the_right_logit(batch, dtype, smoothing, compiled):
    logits, labels = batch[0].to(dtype), batch[1]
    loss = SageLoss(COUNTS, compensation=1.5, label_smoothing=smoothing)

    def formula(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = z.float() + loss.adjustment - 1.5 * loss.mismatch * F.one_hot(y, K)
        return F.cross_entropy(z, y, label_smoothing=smoothing)

    expected = value_and_grad(formula, logits, labels)
    got = value_and_grad(torch.compile(loss, fullgraph=True) if compiled else loss, logits, labels)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_compensation_is_the_loss_of_logits_without_the_optimism(batch):
    """Training logits whose right entry is too high by the mismatch, as those of seen images are."""
    logits, labels = batch
    loss = SageLoss(COUNTS)
    seen = logits + loss.mismatch * F.one_hot(labels, K)
    torch.testing.assert_close(loss(seen, labels), SageLoss(COUNTS, compensation=0)(logits, labels))


def test_a_target_like_the_training_data_needs_no_prior_correction():
    counts = torch.tensor([80, 15, 5])
    torch.testing.assert_close(
        SageLoss(counts, compensation=0, target_prior=counts / 100).adjustment, torch.zeros(3), atol=1e-6, rtol=0
    )


def test_gradient_is_the_closed_form(batch):
    logits, labels = batch[0].double(), batch[1]
    loss = SageLoss(COUNTS, label_smoothing=0.1)
    value, grad = value_and_grad(loss, logits, labels)
    assert value.dtype == torch.float64
    one_hot = F.one_hot(labels, K)
    softmax = (logits + loss.adjustment - loss.mismatch * one_hot).softmax(1)
    torch.testing.assert_close(grad, (softmax - 0.9 * one_hot - 0.1 / K) / len(labels))
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


def test_logits_learned_with_compensation_end_higher_for_the_tail():
    """Two classes, one binary feature x; a logit for each (x, k), so that the optimum is known in closed form.

    With w = exp(z_1 - z_0) n_1 / n_0, a = exp(lambda delta_0), b = exp(lambda delta_1) and m_k images of (x, k), the
    derivative of the loss is zero where m_0 a w / (1 + a w) = m_1 b / (w + b), a quadratic equation in w.
    """
    counts = torch.tensor([900, 100])
    likelihood = torch.tensor([[0.8, 0.3], [0.2, 0.7]])  # P_s(x|k), rows x
    images = (likelihood * counts).round().long()  # images of each (x, k): 720, 30, 180, 70
    delta = torch.tensor([0.05, 0.6])

    def learned_margin(compensation: float) -> torch.Tensor:
        loss = SageLoss(counts, compensation=compensation, mismatch=delta, base_mismatch=0, reduction="none")
        z = torch.zeros(2, 2, requires_grad=True)
        optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            each = loss(z.repeat_interleave(2, dim=0), torch.tensor([0, 1, 0, 1]))
            total = (each * images.flatten()).sum() / images.sum()
            total.backward()
            return total

        optimizer.step(step)
        return z.detach()[:, 1] - z.detach()[:, 0]

    def optimum(compensation: float) -> torch.Tensor:
        a, b = (compensation * delta).exp()
        m0, m1 = images.T
        p, q = m0 * a, a * b * (m0 - m1)
        w = (-q + (q**2 + 4 * p * m1 * b).sqrt()) / (2 * p)
        return w.log() - (counts[1] / counts[0]).log()

    log_ratio = likelihood[:, 1].log() - likelihood[:, 0].log()
    torch.testing.assert_close(learned_margin(0.0), log_ratio, atol=1e-3, rtol=0)
    for compensation in (1.0, 2.0):
        torch.testing.assert_close(learned_margin(compensation), optimum(compensation), atol=1e-3, rtol=0)
    # The tail's logit rises on images like its own, and not on those of the head.
    _, on_its_own = zip(*(learned_margin(c).tolist() for c in (0.0, 1.0, 2.0)), strict=True)
    assert on_its_own[0] < on_its_own[1] < on_its_own[2]
    assert learned_margin(2.0)[0] < learned_margin(0.0)[0]


def test_ignored_images_do_not_count(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS, ignore_index=-1)
    padded = torch.cat([logits, torch.full((3, K), 7.0)]), torch.cat([labels, torch.full((3,), -1)])
    value, grad = value_and_grad(loss, *padded)
    want, want_grad = value_and_grad(loss, logits, labels)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, torch.cat([want_grad, torch.zeros(3, K)]))


def test_one_hot_probabilities_equal_indices(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS, label_smoothing=0.1, ignore_index=2)  # an index to ignore has no meaning for probabilities
    plain = SageLoss(COUNTS, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, F.one_hot(labels, K).half()), plain(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32(batch, dtype):
    logits, labels = batch[0].to(dtype), batch[1]
    loss = SageLoss([10**6, 10**4, 100, 1, 1])
    value, grad = value_and_grad(loss, logits, labels)
    want, want_grad = value_and_grad(loss, logits.float(), labels)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad.to(dtype))
    extreme = torch.full((1, K), -6e4, dtype=dtype).index_fill(1, torch.tensor([0]), 6e4)
    assert loss(extreme, torch.tensor([3])).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 2 * K, 2**18])
def test_half_precision_in_chunks_is_the_formula_in_float32(batch, reduction, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk)
    logits, labels = batch[0].bfloat16(), batch[1].clone()
    labels[3] = 2
    loss = SageLoss(COUNTS, reduction=reduction, ignore_index=2)
    exact = logits.double().requires_grad_()
    compensated = exact + loss.adjustment - loss.mismatch * F.one_hot(labels, K)
    want = F.cross_entropy(compensated, labels, reduction=reduction, ignore_index=2)
    (want_grad,) = torch.autograd.grad(want.sum(), exact)
    value, grad = value_and_grad(loss, logits, labels)
    torch.testing.assert_close(value, want.float())
    # Rounded where it is kept and where it is returned, and not where softmax - onehot cancels.
    torch.testing.assert_close(grad.double(), want_grad, rtol=2**-7, atol=0)
    with torch.no_grad():
        assert torch.equal(loss(logits, labels), value)


def test_half_precision_takes_masked_classes_and_weights_of_the_images():
    logits = torch.tensor([[0.0, -torch.inf, 1, 2, 3], [-torch.inf, 0, 1, 2, 3]]).bfloat16()
    labels, weights = torch.tensor([0, 1]), torch.tensor([2.0, -3.0])
    loss = SageLoss(COUNTS, reduction="none")
    exact = logits.double().requires_grad_()
    compensated = exact + loss.adjustment - loss.mismatch * F.one_hot(labels, K)
    (F.cross_entropy(compensated, labels, reduction="none") * weights).sum().backward()
    _, grad = value_and_grad(lambda z: loss(z, labels) * weights, logits)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2**-7, atol=0)


def test_half_precision_keeps_no_float32_copy_for_the_backward_pass(batch):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        SageLoss(COUNTS)(batch[0].bfloat16().requires_grad_(), batch[1])
    of_logits_size = [tensor for tensor in kept if tensor.numel() >= batch[0].numel()]
    assert [tensor.dtype for tensor in of_logits_size] == [torch.bfloat16]


def test_half_precision_says_that_it_has_no_second_derivative(batch):
    logits = batch[0].bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(SageLoss(COUNTS)(logits, batch[1]), logits, create_graph=True)
    twice = torch.autograd.functional.hessian(lambda z: SageLoss(COUNTS)(z, batch[1]), batch[0])
    assert twice.abs().sum() > 0


def test_buffers_keep_float32_and_their_values():
    loss = SageLoss(COUNTS)
    want = loss.adjustment.clone(), loss.mismatch.clone()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.bfloat16)):
        model = cast(nn.ModuleList([copy.deepcopy(loss), nn.Linear(2, 2)]))
        assert model[1].weight.dtype != torch.float32
        for buffer, value in zip((model[0].adjustment, model[0].mismatch), want, strict=True):
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, value)


def test_autocast(batch):
    logits, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(SageLoss(COUNTS)(logits, labels), SageLoss(COUNTS)(logits, labels).float())
        got = SageLoss(COUNTS)(logits.bfloat16(), labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, SageLoss(COUNTS)(logits.bfloat16(), labels))


@pytest.mark.slow
def test_compiles_to_one_graph(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS, label_smoothing=0.1)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(value_and_grad(compiled, logits, labels), value_and_grad(loss, logits, labels))
    loss.set_mismatch(torch.arange(K))  # seen by the compiled loss as well
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_follows_the_logits_to_their_device(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS)
    want = loss(logits, labels)
    torch.testing.assert_close(loss(logits.cuda(), labels).cpu(), want)
    assert loss.adjustment.is_cuda
    loss.set_mismatch(mismatch_from_counts(COUNTS))
    torch.testing.assert_close(loss(logits, labels), want)


def test_set_mismatch_equals_a_new_loss():
    delta = torch.tensor([0.0, 0.1, 0.4, 2.0, 2.0])
    loss = SageLoss(COUNTS, tau=0.5, compensation=2.0)
    loss.set_mismatch(torch.ones(K))
    loss.set_mismatch(delta)  # replaces, does not add up
    assert torch.equal(loss.mismatch, SageLoss(COUNTS, tau=0.5, compensation=2.0, mismatch=delta).mismatch)


def test_state_dict_brings_a_measured_mismatch_back():
    trained = SageLoss(COUNTS)
    trained.set_mismatch(torch.arange(K).float())
    resumed = SageLoss(COUNTS)
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(resumed.mismatch, trained.mismatch)
    assert set(resumed.state_dict()) == {"mismatch"} and not list(resumed.parameters())


def test_from_labels_counts():
    labels = [0] * 7 + [2] * 3
    torch.testing.assert_close(
        SageLoss.from_labels(labels, 4, tau=0.5).adjustment, SageLoss([7, 0, 3, 0], tau=0.5).adjustment
    )


def test_repr_names_the_settings():
    text = repr(SageLoss(COUNTS, tau=0.25, compensation=0.75, reduction="sum"))
    for part in ("num_classes=5", "tau=0.25", "compensation=0.75", "reduction='sum'"):
        assert part in text


def test_takes_the_logits_out_of_model_outputs(batch):
    logits, labels = batch
    loss = SageLoss(COUNTS)
    for outputs in (ImageClassifierOutput(logits=logits), {"logits": logits}, (logits, None)):
        assert torch.equal(loss(outputs, labels), loss(logits, labels))


class TinyClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, K)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.linear(x))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_trainer_with_gradient_accumulation_takes_the_step_of_the_whole_batch(tmp_path, batch, kind):
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
    Trainer(model, arguments, train_dataset=dataset, compute_loss_func=SageLoss(COUNTS)).train()

    reference = TinyClassifier()
    SageLoss(COUNTS)(reference(images), labels).backward()
    for got, start in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.detach(), start.detach() - 0.5 * start.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"class_counts": [3, -1]}, "-1.0 for class 1"),
        ({"class_counts": [float("nan"), 2]}, "nan for class 0"),
        ({"class_counts": [float("inf"), 2]}, "inf for class 0"),
        ({"class_counts": [0.75, 0.25]}, "not frequencies"),
        ({"class_counts": [0, 0]}, "all zero"),
        ({"class_counts": []}, r"shape \(K,\)"),
        ({"class_counts": [[1, 2]]}, r"shape \(1, 2\)"),
        ({"class_counts": 5}, r"shape \(\)"),
        ({"tau": float("nan")}, "`tau`"),
        ({"compensation": float("inf")}, "`compensation`"),
        ({"label_smoothing": 1.5}, "`label_smoothing`"),
        ({"reduction": "average"}, "'average'"),
        ({"mismatch": "features"}, "'features'"),
        ({"mismatch": torch.zeros(3)}, r"\(3,\)"),
        ({"mismatch": torch.tensor([0.1, -0.1])}, "`mismatch`"),
        ({"mismatch": torch.tensor([0.1, float("nan")])}, "`mismatch`"),
        ({"target_prior": [0.5, 0.4]}, "sum of 0.9"),
        ({"target_prior": [1.2, -0.2]}, "`target_prior`"),
        ({"target_prior": [float("nan"), 0.5]}, "`target_prior`"),
        ({"target_prior": [1.0]}, r"\(1,\)"),
        ({"effective_dim": 0.0}, "`effective_dim`"),
        ({"base_mismatch": -1.0}, "`base_mismatch`"),
    ],
)
def test_wrong_settings(arguments, match):
    with pytest.raises(ValueError, match=match):
        SageLoss(**{"class_counts": [3, 1], **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_counts": {"cat": 3, "dog": 1}},
        {"class_counts": None},
        {"class_counts": [True, False]},
        {"mismatch": None},
        {"target_prior": "uniform"},
    ],
)
def test_settings_of_a_wrong_type(arguments):
    with pytest.raises(TypeError, match=f"`{next(iter(arguments))}`"):
        SageLoss(**{"class_counts": [3, 1], **arguments})


@pytest.mark.parametrize("counts", [range(1, 4), (1, 2, 3), torch.tensor([1.0, 2, 3], dtype=torch.float16)])
def test_counts_come_in_any_form(counts):
    assert torch.equal(SageLoss(counts).adjustment, SageLoss([1, 2, 3]).adjustment)


def test_a_refused_mismatch_changes_nothing():
    loss = SageLoss(COUNTS)
    want = loss.mismatch.clone()
    with pytest.raises(ValueError, match="`mismatch`"):
        loss.set_mismatch(torch.full((K,), -1.0))
    assert torch.equal(loss.mismatch, want)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("outputs", "labels", "error", "match"),
    [
        (torch.zeros(2, 4), LABELS, ValueError, r"\(B, 5\), got \(2, 4\)"),
        (torch.zeros(K), LABELS, ValueError, r"\(B, 5\)"),
        (torch.zeros(2, K), torch.tensor([0, K]), ValueError, r"got 5 at 1"),
        (torch.zeros(2, K), torch.tensor([0, -1]), ValueError, r"got -1 at 1"),
        (torch.zeros(2, K), torch.tensor([0, 1, 2]), ValueError, "2 class indices"),
        (torch.zeros(2, K), torch.zeros(2, 4), ValueError, r"\(2, 5\)"),
        (torch.zeros(2, K), torch.zeros(2, K, dtype=torch.long), ValueError, "torch.int64"),
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
