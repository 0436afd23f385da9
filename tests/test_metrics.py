# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch


pytest.importorskip("torchmetrics")

from peft_sage.metrics import LongTailAccuracy  # noqa: E402


COUNTS = [500, 101, 100, 20, 19, 1, 0]  # two with many, medium and few, one with none
LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 6, 6])  # class 5 does not occur
PREDS = torch.tensor([0, 0, 0, 1, 1, 0, 2, 3, 5, 0, 0, 6])


def result(
    counts: list[int], preds: torch.Tensor, labels: torch.Tensor, **kwargs
) -> dict[str, torch.Tensor]:
    accuracy = LongTailAccuracy(counts, **kwargs)
    accuracy.update(preds, labels)
    return accuracy.compute()


def check(got: dict[str, torch.Tensor]) -> None:
    want = {
        "overall": 7 / 12,
        "macro": (0.75 + 0.5 + 1 + 0.5 + 0 + 0.5) / 6,
        "many": (0.75 + 0.5) / 2,
        "medium": (1 + 0.5) / 2,
        "few": 0.0,
        "none": 0.5,
        "worst": 0.0,
        "num_many": 2,
        "num_medium": 2,
        "num_few": 1,
        "num_none": 1,
    }
    assert {
        name: value.item() for name, value in got.items() if name != "per_class"
    } == pytest.approx(want)
    expected = torch.tensor([0.75, 0.5, 1, 0.5, 0, math.nan, 0.5])
    torch.testing.assert_close(got["per_class"], expected, equal_nan=True)


def test_every_number_by_hand():
    check(result(COUNTS, PREDS, LABELS))


def test_logits_and_several_batches():
    logits = torch.nn.functional.one_hot(PREDS, 7).half() - 0.5
    accuracy = LongTailAccuracy(COUNTS)
    for part in torch.arange(12).split(3):
        accuracy.update(logits[part], LABELS[part])
    check(accuracy.compute())
    accuracy.reset()
    accuracy.update(logits, LABELS)
    check(accuracy.compute())


def test_thresholds():
    got = result(COUNTS, PREDS, LABELS, many=500, few=101)
    assert (
        got["many"].isnan()
        and got["medium"] == (0.75 + 0.5) / 2
        and got["few"] == (1 + 0.5 + 0) / 3
    )


def test_empty_group_is_nan():
    got = result([500, 5], torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert math.isnan(got["medium"])
    assert got["macro"] == got["few"] == got["many"] == 1
    nothing = result([500, 5], torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    assert math.isnan(nothing["overall"]) and math.isnan(nothing["worst"])


@pytest.mark.parametrize(
    ("preds", "labels", "error", "match"),
    [
        (
            torch.zeros(2, 5),
            torch.tensor([0, 1]),
            ValueError,
            r"7 classes, got shape \(2, 5\)",
        ),
        (
            torch.zeros(3, dtype=torch.long),
            torch.tensor([0, 1]),
            ValueError,
            r"`preds` .* \(2,\), got \(3,\)",
        ),
        (torch.zeros(2, 7), torch.tensor([0, 7]), ValueError, "`labels` .* got 7 at 1"),
        (torch.zeros(2, 7), torch.zeros(2), TypeError, "`labels` .* torch.float32"),
    ],
)
def test_wrong_input_changes_nothing(preds, labels, error, match):
    accuracy = LongTailAccuracy(COUNTS)
    with pytest.raises(error, match=match):
        accuracy.update(preds, labels)
    assert not accuracy.total.any() and not accuracy.correct.any()


def test_wrong_settings():
    with pytest.raises(ValueError, match="all zero"):
        LongTailAccuracy([0, 0])
    with pytest.raises(ValueError, match="few=50 and many=20"):
        LongTailAccuracy(COUNTS, many=20, few=50)


def test_numbers_by_position():
    pandas = pytest.importorskip("pandas")
    accuracy = LongTailAccuracy(COUNTS)
    order = range(len(LABELS))[::-1]
    accuracy.update(PREDS.numpy(), pandas.Series(LABELS.tolist(), index=order))
    check(accuracy.compute())
