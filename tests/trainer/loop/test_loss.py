"""The training loss."""

import pytest
import torch
import torch.nn.functional as F

from trainer.loop.loss import MixedLabels, TrainingLoss, class_weights, count_correct


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


FIRST, SECOND = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 0, 3, 2, 1, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0, 1.5])])
def test_mixtures_have_the_loss_of_their_mixed_targets(
    logits: torch.Tensor, smoothing: float, weights: torch.Tensor | None
) -> None:
    """torch's own loss for targets that are probabilities, with which label smoothing composes."""
    share = torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0, 0.4])
    loss = TrainingLoss(smoothing, weights)(logits, MixedLabels(FIRST, SECOND, share))
    one_hot = [F.one_hot(labels, 4).float() for labels in (FIRST, SECOND)]
    factors = [torch.ones(6) if weights is None else weights[labels] for labels in (FIRST, SECOND)]
    expected = sum(
        (part * factor * F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")).sum()
        for part, factor, target in zip((share, 1 - share), factors, one_hot, strict=True)
    )
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_plain_labels_have_torchs_loss_to_the_bit(logits: torch.Tensor, smoothing: float) -> None:
    expected = F.cross_entropy(logits, FIRST, label_smoothing=smoothing, reduction="sum")
    assert torch.equal(TrainingLoss(smoothing)(logits, FIRST), expected)


def test_the_label_with_the_larger_share_counts_as_the_right_one(logits: torch.Tensor) -> None:
    answers = logits.argmax(dim=1)
    other = (answers + 1) % 4
    assert count_correct(logits, answers) == 6
    assert count_correct(logits, MixedLabels(answers, other, torch.full((6,), 0.6))) == 6
    assert count_correct(logits, MixedLabels(answers, other, torch.full((6,), 0.4))) == 0
    assert count_correct(logits, MixedLabels(other, answers, torch.full((6,), 0.4))) == 6


def test_balanced_weights_are_in_inverse_proportion_and_have_a_mean_of_one() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = class_weights("balanced", labels, 4)
    assert weights is not None
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[2] == pytest.approx(6 * weights[0])
    assert class_weights("none", labels, 4) is None
