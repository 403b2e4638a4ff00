"""The constant predictor's losses against sums written out, and which trainings are warned about."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.evaluation.baseline import Baseline
from trainer.evaluation.evaluate import Evaluation

ABC = ("a", "b", "c")


def validation(labels: list[int], predicted: list[int], loss: float) -> Evaluation:
    ones = torch.ones(len(labels))
    return Evaluation(
        labels=torch.tensor(labels),
        predicted=torch.tensor(predicted),
        confidence=ones,
        label_probability=ones,
        loss=loss,
    )


def kinds(baseline: Baseline, train_loss: float | None, seen: Evaluation) -> list[str]:
    return [warning.kind for warning in baseline.check(train_loss, seen)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("counts", [(18, 18, 18), (400, 6, 0), (1, 2, 3)])
def test_the_losses_are_those_of_the_best_constant_predictor(counts: tuple[int, ...], smoothing: float) -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    baseline = Baseline.of(labels, ABC, smoothing)
    logits = baseline.prediction.clamp(min=1e-12).log().expand(len(labels), 3)

    def loss(logits: torch.Tensor, smoothing: float) -> float:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing).item()

    assert baseline.train_loss == pytest.approx(loss(logits, smoothing), abs=1e-9)
    assert baseline.loss(labels) == pytest.approx(loss(logits, 0.0), abs=1e-9)
    for other in torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double():
        assert loss(other.expand_as(logits), smoothing) >= baseline.train_loss - 1e-9
    # With label smoothing even the right answer has a loss: the lowest is that of the smoothed target itself.
    right = (F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3).clamp(min=1e-12).double().log()
    assert baseline.lowest_train_loss == pytest.approx(loss(right, smoothing), abs=1e-6)


def test_the_loss_of_three_equal_classes_is_ln_3() -> None:
    baseline = Baseline.of(torch.tensor([0, 1, 2] * 18), ABC, 0.0)
    assert baseline.train_loss == pytest.approx(math.log(3))
    (warning,) = baseline.check(1.0990, validation([0, 1, 2, 0, 1], [0, 2, 1, 1, 0], 1.1003))
    assert warning.text == (
        "the network predicts no better than the class frequencies: train loss 1.0990 (frequencies alone: 1.0986), "
        "validation loss 1.1003 (frequencies alone: 1.0986), validation accuracy 20.00 %; try another --lr-scale or "
        "more --epochs, and check the labels"
    )


LABELS = [number % 10 for number in range(500)]
MIXED = [number // 10 % 10 for number in range(500)]
"""Predictions of all classes, right for a tenth of the labels."""


@pytest.mark.parametrize(
    ("train_loss", "val_loss", "predicted", "expected"),
    [
        (2.303, 2.303, MIXED, ["no-gain"]),
        (2.26, 2.28, MIXED, ["no-gain"]),  # a little below ln 10 = 2.3026
        (8.0, 1e6, MIXED, ["no-gain"]),  # a learning rate that is much too high
        (2.303, 2.303, [3] * 500, ["no-gain", "one-class"]),
        (None, 2.303, MIXED, ["no-gain"]),  # the training loss is unknown
        (0.4, 4.0, [3] * 500, ["one-class"]),  # it learned, but not what validation shows: faulty statistics of norms
        (0.4, 4.0, [3] * 499 + [4], []),  # 99.8 %
        (1.5, 2.4, MIXED, []),  # the curves show overfitting
        (2.303, 1.1, LABELS, []),  # the mean of a first epoch says little
        (2.30, 2.29, LABELS[:200] + MIXED[200:], []),  # tiny logits, which classify well
        (0.1, 0.1, LABELS, []),
    ],
)
def test_only_a_training_that_learns_nothing_is_warned_about(
    train_loss: float | None, val_loss: float, predicted: list[int], expected: list[str]
) -> None:
    baseline = Baseline.of(torch.tensor(LABELS), tuple("abcdefghij"), 0.0)
    assert kinds(baseline, train_loss, validation(LABELS, predicted, val_loss)) == expected


def test_label_smoothing_shifts_both_ends_of_the_scale() -> None:
    """With smoothing 0.2 and ten classes, 2.26 is 3 % of the way from 2.303 to the lowest loss, 0.867; 2.2 is 7 %."""
    baseline = Baseline.of(torch.tensor(LABELS), tuple("abcdefghij"), 0.2)
    assert (baseline.train_loss, baseline.lowest_train_loss) == (
        pytest.approx(2.3026, abs=1e-4),
        pytest.approx(0.8669, abs=1e-4),
    )
    seen = validation(LABELS, MIXED, 2.303)
    assert kinds(baseline, 2.26, seen) == ["no-gain"]
    assert kinds(baseline, 2.2, seen) == []
    # Without smoothing 2.2 is less than a twentieth of the way.
    assert kinds(Baseline.of(torch.tensor(LABELS), tuple("abcdefghij"), 0.0), 2.2, seen) == ["no-gain"]


def test_a_rare_class_changes_the_scale() -> None:
    """400 images against 6: the loss 0.077 is that of the frequencies, and 98.5 % of the predictions are right."""
    labels = [0] * 400 + [1] * 6
    baseline = Baseline.of(torch.tensor(labels), ("many", "few"), 0.0)
    assert baseline.train_loss == pytest.approx(0.0769, abs=1e-4)
    assert kinds(baseline, 0.078, validation(labels, [0] * 406, 0.078)) == ["no-gain", "one-class"]
    assert kinds(baseline, 0.01, validation(labels, labels, 0.01)) == []
    (warning,) = baseline.check(0.01, validation(labels, [0] * 406, 0.5))
    assert "predicts the class 'many' for all 406 validation images, of which 400 are of that class" in warning.text


def test_a_class_rarer_than_a_thousandth_may_be_predicted_that_rarely() -> None:
    labels = [0] * 1999 + [1]
    baseline = Baseline.of(torch.tensor(labels), ("many", "few"), 0.0)
    assert kinds(baseline, 1e-4, validation(labels, labels, 1e-4)) == []
    assert kinds(baseline, 1e-4, validation(labels, [0] * 2000, 1e-4)) == ["one-class"]


def test_nearly_all_predictions_of_one_class() -> None:
    labels = [number % 2 for number in range(2000)]
    baseline = Baseline.of(torch.tensor(labels), ("even", "odd"), 0.0)
    (warning,) = baseline.check(0.3, validation(labels, [1] * 1999 + [0], 0.3))
    assert "predicts the class 'odd' for 1,999 of 2,000 validation images, of which 1,000 are" in warning.text


@pytest.mark.parametrize("labels", [[0], [1, 1, 1]])
def test_validation_images_of_one_class_give_no_warning(labels: list[int]) -> None:
    baseline = Baseline.of(torch.tensor([0, 1, 2]), ABC, 0.0)
    assert baseline.check(1.1, validation(labels, labels, 1.1)) == []


def test_training_images_of_one_class_have_no_baseline_to_beat() -> None:
    baseline = Baseline.of(torch.tensor([0, 0]), ABC, 0.0)
    assert baseline.check(0.0, validation([0, 1], [0, 0], 0.7)) == []
