"""Tests that the parity check accepts equal outputs and names the first difference."""

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from trainer.data import ImageSet
from trainer.errors import ExportError
from trainer.export import parity
from trainer.export.folding import fold
from trainer.export.formats import FloatArray, Predictor, convert_to_onnx, load_predictor
from trainer.export.parity import ParitySample, check_parity, reference_logits
from trainer.export.reference import ReferenceModel
from trainer.export.repository import ONNX


def logits_of(images: torch.Tensor) -> torch.Tensor:
    """A model whose logits are the sums of ten rows, so that every image has its own."""
    return images[:, 0, :10].float().sum(dim=2) / 1000


def make_predictor(change: Callable[[FloatArray], FloatArray | None]) -> Predictor:
    """Returns a format with the model's outputs, except for a change."""

    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits = logits_of(torch.from_numpy(images)).numpy().copy()
        changed = change(logits)
        logits = logits if changed is None else changed
        return logits, torch.from_numpy(logits).softmax(dim=1).numpy()

    return predict


@pytest.fixture
def expected(sample: ParitySample) -> FloatArray:
    return reference_logits(logits_of, sample.batches(16, len(sample)))


def test_equal_outputs_pass_with_their_figures(sample: ParitySample, expected: FloatArray) -> None:
    def add(logits: FloatArray) -> FloatArray:
        return logits + np.float32(3e-5)

    found = check_parity("model.onnx", make_predictor(add), sample, expected)
    assert [result.batch_size for result in found] == [256, 17, 3, 2, 1]
    assert {result.num_images for result in found} == {45}
    for result in found:
        assert result.largest_difference == pytest.approx(3e-5, rel=0.1)
        assert result.near_ties == 0


def test_one_differing_logit_of_one_image_is_refused(sample: ParitySample, expected: FloatArray) -> None:
    def spoil_third_of_17(logits: FloatArray) -> None:
        if len(logits) == 17:
            logits[2, 7] += 3e-4

    with pytest.raises(ExportError, match=r"differ by more than 0\.0001") as refused:
        check_parity("model.pt", make_predictor(spoil_third_of_17), sample, expected)
    message = str(refused.value)
    assert message.startswith("model.pt at batch size 17 returns logit 7 = ")
    assert "for validation image 12, the trained model" in message
    assert f"{expected[2, 7]:.6g}" in message
    assert f"{expected[2, 7] + np.float32(3e-4):.6g}" in message


def test_another_class_is_refused_with_both_classes(sample: ParitySample, expected: FloatArray) -> None:
    best = int(expected[44].argmax())
    other = (best + 1) % 10

    def prefer_other(logits: FloatArray) -> None:
        if len(logits) == 45:
            logits[44, other] = logits[44, best] + 1

    with pytest.raises(ExportError) as refused:
        check_parity("model.onnx", make_predictor(prefer_other), sample, expected)
    assert str(refused.value).startswith(
        f"model.onnx at batch size 256 assigns training image 64 to class {other} (logits {other} and {best}: "
    )


def test_a_near_tie_may_fall_to_another_class_and_is_counted(sample: ParitySample, expected: FloatArray) -> None:
    expected[5] = 0.0
    expected[5, 3], expected[5, 4] = 2.0, 2.0 - 4e-5

    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits = logits_of(torch.from_numpy(images)).numpy().copy()
        is_tied = (images == tied).all(axis=(1, 2, 3))
        logits[is_tied] = expected[5]
        logits[is_tied, 4] += 8e-5
        return logits, torch.from_numpy(logits).softmax(dim=1).numpy()

    tied = next(sample.batches(45, 45))[5].numpy()
    found = check_parity("model.onnx", predict, sample, expected)
    assert [result.near_ties for result in found] == [1, 1, 1, 1, 1]


def test_a_slow_batch_size_stops_at_the_time_limit(
    sample: ParitySample, expected: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "TIME_LIMIT_S", -1.0)
    found = check_parity("model.pt", make_predictor(lambda logits: None), sample, expected)
    assert {result.batch_size: result.num_images for result in found} == {256: 45, 17: 17, 3: 3, 2: 2, 1: 1}


def test_a_format_with_missing_outputs_is_refused(sample: ParitySample, expected: FloatArray) -> None:
    with pytest.raises(ExportError) as refused:
        check_parity("model.pt", make_predictor(lambda logits: logits[:16]), sample, expected)
    assert str(refused.value) == "model.pt at batch size 256 does not run: 45 images gave 16 and 16 outputs"


def test_nan_is_a_difference(sample: ParitySample, expected: FloatArray) -> None:
    def spoil(logits: FloatArray) -> None:
        logits[0, 9] = np.nan

    with pytest.raises(ExportError, match="nan"):
        check_parity("model.onnx", make_predictor(spoil), sample, expected)


def test_probabilities_are_compared_too(sample: ParitySample, expected: FloatArray) -> None:
    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits = logits_of(torch.from_numpy(images)).numpy()
        return logits, logits

    with pytest.raises(ExportError, match="returns probability"):
        check_parity("model.onnx", predict, sample, expected)


def test_a_format_that_fails_at_one_batch_size_is_refused(sample: ParitySample, expected: FloatArray) -> None:
    def refuse_odd_sizes(logits: FloatArray) -> None:
        if len(logits) == 3:
            raise RuntimeError("Got: 3 Expected: 2\nand a long story")

    with pytest.raises(ExportError) as refused:
        check_parity("model.onnx", make_predictor(refuse_odd_sizes), sample, expected)
    assert str(refused.value) == "model.onnx at batch size 3 does not run: Got: 3 Expected: 2"


@pytest.mark.parametrize("change", [lambda logits: logits.astype(np.float64), lambda logits: logits[:, :9]])
def test_another_shape_or_type_is_refused(
    change: Callable[[FloatArray], FloatArray], sample: ParitySample, expected: FloatArray
) -> None:
    with pytest.raises(ExportError, match=r"returns float\d+ \[45, \d+\] instead of float32 \[45, 10\]"):
        check_parity("model.onnx", make_predictor(change), sample, expected)


def test_an_exported_model_with_one_changed_weight_is_refused(reference: ReferenceModel) -> None:
    classifier = copy.deepcopy(reference.classifier)
    parameter = classifier.get_parameter("network.fc2.bias")
    parameter.data[3] += 2e-4
    predict = load_predictor(ONNX, convert_to_onnx(fold(classifier), reference.golden[0][:2]))
    with pytest.raises(
        ExportError, match=r"model\.onnx at batch size 256 returns logit 3 = .* for validation image \d+, the "
    ):
        check_parity(ONNX, predict, reference.sample, reference.logits)


def test_the_sample_is_validation_images_and_then_training_images(sample: ParitySample) -> None:
    assert len(sample) == 45
    assert sample.num_validation == 40
    assert [len(batch) for batch in sample.batches(17, 45)] == [17, 17, 11]
    assert [len(batch) for batch in sample.batches(17, 20)] == [17, 3]
    assert sample.describe(0) == "validation image 10"
    assert sample.describe(39) == "validation image 49"
    assert sample.describe(40) == "training image 60"
    assert sample.labels.tolist() == [*(i % 10 for i in range(10, 50)), *(i % 10 for i in range(60, 65))]


def test_evenly_spread_training_images_fill_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "SAMPLE_SIZE", 10)
    images = ImageSet(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100))
    mixed = ParitySample((images, torch.arange(4)), (images, torch.arange(10, 71)))
    assert mixed.labels.tolist() == [0, 1, 2, 3, 10, 22, 34, 46, 58, 70]
    only_validation = ParitySample((images, torch.arange(20)), (images, torch.arange(50, 60)))
    assert only_validation.labels.tolist() == list(range(20))
