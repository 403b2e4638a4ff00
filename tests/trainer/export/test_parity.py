"""The gate lets through what answers alike, and says where something does not."""

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
from trainer.export.formats import Answer, Floats, convert_to_onnx, open_format
from trainer.export.parity import ParitySample, check_parity, reference_logits
from trainer.export.repository import ONNX
from trainer.export.trained import Trained


def logits_of(images: torch.Tensor) -> torch.Tensor:
    """A model: the sums of ten rows, so that every image has its own logits."""
    return images[:, 0, :10].float().sum(dim=2) / 1000


def make_answer(change: Callable[[Floats], Floats | None]) -> Answer:
    """A format that answers as the model does, but for a change."""

    def answer(images: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        logits = logits_of(torch.from_numpy(images)).numpy().copy()
        changed = change(logits)
        logits = logits if changed is None else changed
        return logits, torch.from_numpy(logits).softmax(dim=1).numpy()

    return answer


@pytest.fixture
def reference(sample: ParitySample) -> Floats:
    return reference_logits(logits_of, sample.batches(16, len(sample)))


def test_what_answers_alike_passes_with_its_figures(sample: ParitySample, reference: Floats) -> None:
    def add(logits: Floats) -> Floats:
        return logits + np.float32(3e-5)

    found = check_parity("model.onnx", make_answer(add), sample, reference)
    assert [agreement.batch_size for agreement in found] == [256, 17, 3, 2, 1]
    assert {agreement.num_images for agreement in found} == {45}
    for agreement in found:
        assert agreement.largest_difference == pytest.approx(3e-5, rel=0.1)
        assert agreement.near_ties == 0


def test_one_logit_of_one_image_is_enough_to_be_refused(sample: ParitySample, reference: Floats) -> None:
    def spoil_third_of_17(logits: Floats) -> None:
        if len(logits) == 17:
            logits[2, 7] += 3e-4

    with pytest.raises(ExportError, match=r"more than 0\.0001 apart") as refused:
        check_parity("model.pt", make_answer(spoil_third_of_17), sample, reference)
    said = str(refused.value)
    assert said.startswith("model.pt at batch size 17 answers validation image 12 with logit 7 = ")
    assert f"{reference[2, 7]:.6g}" in said
    assert f"{reference[2, 7] + np.float32(3e-4):.6g}" in said


def test_another_class_is_refused_by_name(sample: ParitySample, reference: Floats) -> None:
    best = int(reference[44].argmax())
    other = (best + 1) % 10

    def prefer_other(logits: Floats) -> None:
        if len(logits) == 45:
            logits[44, other] = logits[44, best] + 1

    with pytest.raises(ExportError) as refused:
        check_parity("model.onnx", make_answer(prefer_other), sample, reference)
    assert str(refused.value).startswith(
        f"model.onnx at batch size 256 takes training image 64 for class {other} (logits {other} and {best}: "
    )


def test_a_near_tie_may_fall_either_way_and_is_counted(sample: ParitySample, reference: Floats) -> None:
    reference[5] = 0.0
    reference[5, 3], reference[5, 4] = 2.0, 2.0 - 4e-5

    def answer_for(images: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        logits = logits_of(torch.from_numpy(images)).numpy().copy()
        theirs = (images == tied).all(axis=(1, 2, 3))
        logits[theirs] = reference[5]
        logits[theirs, 4] += 8e-5
        return logits, torch.from_numpy(logits).softmax(dim=1).numpy()

    tied = next(sample.batches(45, 45))[5].numpy()
    found = check_parity("model.onnx", answer_for, sample, reference)
    assert [agreement.near_ties for agreement in found] == [1, 1, 1, 1, 1]


def test_a_size_that_takes_long_is_looked_at_for_a_while(
    sample: ParitySample, reference: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "PATIENCE_S", -1.0)
    found = check_parity("model.pt", make_answer(lambda logits: None), sample, reference)
    assert {agreement.batch_size: agreement.num_images for agreement in found} == {256: 45, 17: 17, 3: 3, 2: 2, 1: 1}


def test_a_format_that_loses_images_is_refused(sample: ParitySample, reference: Floats) -> None:
    with pytest.raises(ExportError) as refused:
        check_parity("model.pt", make_answer(lambda logits: logits[:16]), sample, reference)
    assert str(refused.value) == "model.pt at batch size 256 does not run: 45 images got 16, 16 answers"


def test_not_a_number_is_a_difference(sample: ParitySample, reference: Floats) -> None:
    def spoil(logits: Floats) -> None:
        logits[0, 9] = np.nan

    with pytest.raises(ExportError, match="nan"):
        check_parity("model.onnx", make_answer(spoil), sample, reference)


def test_probabilities_are_compared_too(sample: ParitySample, reference: Floats) -> None:
    def answer(images: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        logits = logits_of(torch.from_numpy(images)).numpy()
        return logits, logits

    with pytest.raises(ExportError, match="with probability"):
        check_parity("model.onnx", answer, sample, reference)


def test_a_format_that_knows_one_batch_size_is_refused(sample: ParitySample, reference: Floats) -> None:
    def refuse_odd_sizes(logits: Floats) -> None:
        if len(logits) == 3:
            raise RuntimeError("Got: 3 Expected: 2\nand a long story")

    with pytest.raises(ExportError) as refused:
        check_parity("model.onnx", make_answer(refuse_odd_sizes), sample, reference)
    assert str(refused.value) == "model.onnx at batch size 3 does not run: Got: 3 Expected: 2"


@pytest.mark.parametrize("change", [lambda logits: logits.astype(np.float64), lambda logits: logits[:, :9]])
def test_another_shape_or_type_is_refused(
    change: Callable[[Floats], Floats], sample: ParitySample, reference: Floats
) -> None:
    with pytest.raises(ExportError, match=r"gives float\d+ \[45, \d+\], not float32 \[45, 10\]"):
        check_parity("model.onnx", make_answer(change), sample, reference)


def test_an_exported_model_with_one_changed_weight_is_refused(trained: Trained) -> None:
    classifier = copy.deepcopy(trained.classifier)
    parameter = classifier.get_parameter("network.fc2.bias")
    parameter.data[3] += 2e-4
    answer = open_format(ONNX, convert_to_onnx(fold(classifier), trained.golden[0][:2]))
    with pytest.raises(
        ExportError, match=r"model\.onnx at batch size 256 answers validation image \d+ with logit 3 = "
    ):
        check_parity(ONNX, answer, trained.sample, trained.logits)


def test_the_sample_is_validation_images_and_then_training_images(sample: ParitySample) -> None:
    assert len(sample) == 45
    assert sample.num_validation == 40
    assert [len(batch) for batch in sample.batches(17, 45)] == [17, 17, 11]
    assert [len(batch) for batch in sample.batches(17, 20)] == [17, 3]
    assert sample.describe(0) == "validation image 10"
    assert sample.describe(39) == "validation image 49"
    assert sample.describe(40) == "training image 60"
    assert sample.labels.tolist() == [*(i % 10 for i in range(10, 50)), *(i % 10 for i in range(60, 65))]


def test_training_images_make_up_the_number_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "NUM_IMAGES", 10)
    images = ImageSet(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100))
    few = ParitySample((images, torch.arange(4)), (images, torch.arange(10, 71)))
    assert few.labels.tolist() == [0, 1, 2, 3, 10, 22, 34, 46, 58, 70]
    enough = ParitySample((images, torch.arange(20)), (images, torch.arange(50, 60)))
    assert enough.labels.tolist() == list(range(20))
