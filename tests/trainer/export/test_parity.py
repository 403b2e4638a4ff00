"""Tests that the parity check accepts equal outputs and names the first difference."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.trainer.export.conftest import PATIENT
from trainer.data import ImageSet
from trainer.errors import ExportError
from trainer.export.folding import fold
from trainer.export.formats import FloatArray, Predictor, convert_to_onnx, load_predictor
from trainer.export.parity import QUICK, THOROUGH, TOLERANCE, ParityCheck, ParityPlan, ParityResult, reference_logits
from trainer.export.parity_images import ParityImages
from trainer.export.reference import ReferenceModel
from trainer.export.repository import MAX_BATCH_SIZE, ONNX


def logits_of(images: torch.Tensor) -> torch.Tensor:
    """A model whose logits are the sums of ten rows, so that every image has its own."""
    return images[:, 0, :10].float().sum(dim=2) / 1000


def make_check(
    images: ParityImages,
    expected: FloatArray,
    plan: ParityPlan = PATIENT,
    log: Callable[[str], None] = lambda line: None,
) -> ParityCheck:
    return ParityCheck(images=images, reference=expected, plan=plan, log=log, tolerance=TOLERANCE)


def check_parity(
    name: str, predict: Predictor, images: ParityImages, expected: FloatArray, plan: ParityPlan = PATIENT
) -> list[ParityResult]:
    return make_check(images, expected, plan).run(name, predict)


def make_predictor(change: Callable[[FloatArray], FloatArray | None]) -> Predictor:
    """Returns a format with the model's outputs, except for a change."""

    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits = logits_of(torch.from_numpy(images)).numpy().copy()
        changed = change(logits)
        logits = logits if changed is None else changed
        return logits, torch.from_numpy(logits).softmax(dim=1).numpy()

    return predict


@pytest.fixture
def expected(images: ParityImages) -> FloatArray:
    return reference_logits(logits_of, images.batches(16, len(images)))


def test_equal_outputs_pass_with_their_figures(images: ParityImages, expected: FloatArray) -> None:
    def add(logits: FloatArray) -> FloatArray:
        return logits + np.float32(3e-5)

    found = check_parity("model.onnx", make_predictor(add), images, expected)
    assert [result.batch_size for result in found] == [256, 17, 3, 2, 1]
    assert {result.num_images for result in found} == {45}
    for result in found:
        assert result.largest_difference == pytest.approx(3e-5, rel=0.1)
        assert result.near_ties == 0


def test_one_differing_logit_of_one_image_is_refused(images: ParityImages, expected: FloatArray) -> None:
    def spoil_third_of_17(logits: FloatArray) -> None:
        if len(logits) == 17:
            logits[2, 7] += 3e-4

    with pytest.raises(ExportError, match=r"differ by more than 0\.0001") as refused:
        check_parity("model.pt", make_predictor(spoil_third_of_17), images, expected)
    message = str(refused.value)
    assert message.startswith("model.pt at batch size 17 returns logit 7 = ")
    assert f"for {images.describe(2)}, the trained model" in message
    assert f"{expected[2, 7]:.6g}" in message
    assert f"{expected[2, 7] + np.float32(3e-4):.6g}" in message


def test_another_class_is_refused_with_both_classes(images: ParityImages, expected: FloatArray) -> None:
    best = int(expected[44].argmax())
    other = (best + 1) % 10

    def prefer_other(logits: FloatArray) -> None:
        if len(logits) == 45:
            logits[44, other] = logits[44, best] + 1

    with pytest.raises(ExportError) as refused:
        check_parity("model.onnx", make_predictor(prefer_other), images, expected)
    assert str(refused.value).startswith(
        f"model.onnx at batch size 256 assigns {images.describe(44)} to class {other} (logits {other} and {best}: "
    )


def test_a_near_tie_may_get_another_class_and_is_counted(images: ParityImages, expected: FloatArray) -> None:
    expected[5] = 0.0
    expected[5, 3], expected[5, 4] = 2.0, 2.0 - 4e-5

    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits = logits_of(torch.from_numpy(images)).numpy().copy()
        is_tied = (images == tied).all(axis=(1, 2, 3))
        logits[is_tied] = expected[5]
        logits[is_tied, 4] += 8e-5
        return logits, torch.from_numpy(logits).softmax(dim=1).numpy()

    tied = next(images.batches(45, 45))[5].numpy()
    found = check_parity("model.onnx", predict, images, expected)
    assert [result.near_ties for result in found] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("plan", [QUICK, THOROUGH], ids=lambda plan: plan.name)
def test_small_batches_stop_at_the_time_limit(plan: ParityPlan, images: ParityImages, expected: FloatArray) -> None:
    hurried = replace(plan, small_s=-1.0)
    found = check_parity("model.pt", make_predictor(lambda logits: None), images, expected, hurried)
    assert {result.batch_size: result.num_images for result in found} == {256: 45, 17: 17, 3: 3, 2: 2, 1: 1}


def test_the_default_plan_leaves_time_to_convert_within_a_minute() -> None:
    limits = (QUICK.reference_s, QUICK.served_s, QUICK.largest_s)
    assert all(limit is not None for limit in limits)
    reference_s, served_s, largest_s = (limit or 0.0 for limit in limits)
    assert reference_s + served_s + 2 * largest_s + 3 * 4 * QUICK.small_s <= 35


def test_small_batches_compute_as_many_images_as_planned(images: ParityImages, expected: FloatArray) -> None:
    few = replace(PATIENT, num_images_of_small_batches=20)
    found = check_parity("model.pt", make_predictor(lambda logits: None), images, expected, few)
    assert {result.batch_size: result.num_images for result in found} == {256: 45, 17: 20, 3: 20, 2: 20, 1: 20}


def test_no_batch_is_larger_than_those_that_are_served() -> None:
    images = ImageSet(torch.zeros(10, 1, 400, 400, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64))
    few = ParityImages((images, torch.arange(10)), (images, torch.arange(0)), 0)

    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        return np.zeros((len(images), 10), np.float32), np.full((len(images), 10), 0.1, np.float32)

    found = make_check(few, np.zeros((10, 10), np.float32), PATIENT).run("model.pt", predict)
    assert [result.batch_size for result in found] == [8, 3, 2, 1]


def test_the_trained_model_and_the_largest_batch_stop_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageSet(torch.zeros(600, 1, 28, 28, dtype=torch.uint8), torch.zeros(600, dtype=torch.int64))
    many = ParityImages((images, torch.arange(600)), (images, torch.arange(0)), 0)
    batches = many.batches(MAX_BATCH_SIZE, 600)
    assert len(reference_logits(logits_of, batches, -1.0)) == MAX_BATCH_SIZE  # at least one batch
    hurried = replace(PATIENT, largest_s=-1.0)
    check = make_check(many, np.zeros((600, 10), np.float32), hurried)
    assert check.run("model.pt", make_predictor(lambda logits: None))[0].num_images == MAX_BATCH_SIZE
    # The file that is served may compute more images than the trained model has.
    check = replace(check, reference=check.reference[:300])
    outputs = check.compute("model.onnx", make_predictor(lambda logits: None), MAX_BATCH_SIZE, 600, None)
    assert len(outputs[0]) == 600
    assert check.run("model.onnx", make_predictor(lambda logits: None), outputs)[0].num_images == 300


def test_progress_names_the_file_the_batch_size_and_the_images(images: ParityImages, expected: FloatArray) -> None:
    logged: list[str] = []
    make_check(images, expected, log=logged.append).run("model.pt", make_predictor(lambda logits: None))
    assert logged[:3] == [
        "checking model.pt at batch size 256: image 1 of up to 45",
        "checking model.pt at batch size 17: image 1 of up to 45",
        "checking model.pt at batch size 17: image 18 of up to 45",
    ]


def test_a_format_with_missing_outputs_is_refused(images: ParityImages, expected: FloatArray) -> None:
    with pytest.raises(ExportError) as refused:
        check_parity("model.pt", make_predictor(lambda logits: logits[:16]), images, expected)
    assert str(refused.value) == "model.pt at batch size 256 returns float32 [16, 10] instead of float32 [45, 10]"


def test_nan_is_a_difference(images: ParityImages, expected: FloatArray) -> None:
    def spoil(logits: FloatArray) -> None:
        logits[0, 9] = np.nan

    with pytest.raises(ExportError, match="nan"):
        check_parity("model.onnx", make_predictor(spoil), images, expected)


def test_probabilities_are_compared_too(images: ParityImages, expected: FloatArray) -> None:
    def predict(images: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        logits = logits_of(torch.from_numpy(images)).numpy()
        return logits, logits

    with pytest.raises(ExportError, match="returns probability"):
        check_parity("model.onnx", predict, images, expected)


def test_a_format_that_fails_at_one_batch_size_is_refused(images: ParityImages, expected: FloatArray) -> None:
    def refuse_odd_sizes(logits: FloatArray) -> None:
        if len(logits) == 3:
            raise RuntimeError("Got: 3 Expected: 2\nand a long story")

    with pytest.raises(ExportError) as refused:
        check_parity("model.onnx", make_predictor(refuse_odd_sizes), images, expected)
    assert str(refused.value) == "model.onnx at batch size 3 does not run: Got: 3 Expected: 2"


def test_a_failure_without_a_text_is_named_by_its_class(images: ParityImages, expected: FloatArray) -> None:
    def fail(logits: FloatArray) -> None:
        raise MemoryError

    with pytest.raises(ExportError, match=r"model\.onnx at batch size [0-9]+ does not run: MemoryError$"):
        check_parity("model.onnx", make_predictor(fail), images, expected)


@pytest.mark.parametrize("change", [lambda logits: logits.astype(np.float64), lambda logits: logits[:, :9]])
def test_another_shape_or_type_is_refused(
    change: Callable[[FloatArray], FloatArray], images: ParityImages, expected: FloatArray
) -> None:
    with pytest.raises(ExportError, match=r"returns float\d+ \[45, \d+\] instead of float32 \[45, 10\]"):
        check_parity("model.onnx", make_predictor(change), images, expected)


def test_an_exported_model_with_one_changed_weight_is_refused(reference: ReferenceModel) -> None:
    classifier = copy.deepcopy(reference.classifier)
    parameter = classifier.get_parameter("network.fc2.bias")
    parameter.data[3] += 2e-4
    predict = load_predictor(ONNX, convert_to_onnx(fold(classifier), reference.golden[0][:2]))
    with pytest.raises(
        ExportError, match=r"model\.onnx at batch size 256 returns logit 3 = .* for validation image \d+, the "
    ):
        check_parity(ONNX, predict, reference.parity_images, reference.logits)
