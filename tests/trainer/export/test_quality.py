"""Tests of the quality check: the comparison of two versions, and the objections to a new one."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoy.promotion import roll_back, write_promotion
from trainer.export.quality import INTERVALS, MCNEMAR, Correctness, compare, constant_class, decide, mcnemar
from trainer.export.repository import RepositoryModel


def correctness(right: int, wrong: int, sha256: str = "a") -> Correctness:
    """Returns the correctness of a version that classifies the first images correctly, the others not."""
    return Correctness.of(np.arange(right + wrong) < right, sha256, right + wrong)


def put_version(model: RepositoryModel, manifest: object, name: str = "manifest.json") -> Path:
    """Publishes a version with this manifest, JSON or text."""
    content = manifest if isinstance(manifest, str) else json.dumps(manifest)
    version = model.publish({"model.onnx": b"weights"}, lambda _: content.encode())
    (version / "manifest.json").rename(version / name)
    return version


def manifest_of(model: RepositoryModel, of: Correctness) -> dict[str, Any]:
    metrics = {"num_val": of.num_images, "val_errors": of.num_images - of.num_right}
    return {"labels": model.labels, "metrics": metrics, "validation": of.to_json()}


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (4, 0), (5, 0), (0, 6), (10, 2), (7, 4), (4, 7)])
def test_mcnemar_is_the_probability_of_so_many_heads_or_more(counts: tuple[int, int]) -> None:
    throws = list(itertools.product((0, 1), repeat=sum(counts)))
    as_bad = sum(sum(throw) >= counts[0] for throw in throws)
    assert mcnemar(*counts) == pytest.approx(as_bad / len(throws))


def test_mcnemar_of_thousands_of_images() -> None:
    assert mcnemar(2600, 2400) == pytest.approx(0.004883649737517518 / 2)
    assert mcnemar(5000, 0) == 0.0
    assert mcnemar(0, 5000) == 1.0


@pytest.mark.parametrize(
    ("became_wrong", "became_right", "is_clearly_worse"),
    [(0, 0, False), (4, 0, False), (5, 0, True), (0, 5, False), (12, 6, False), (40, 15, True), (15, 40, False)],
)
def test_the_same_validation_images_are_compared_one_by_one(
    became_wrong: int, became_right: int, is_clearly_worse: bool
) -> None:
    earlier = np.ones(1000, dtype=bool)
    new = earlier.copy()
    new[:became_wrong] = False
    earlier[200 : 200 + became_right] = False
    found = compare(Correctness.of(new, "a", 1000), Correctness.of(earlier, "a", 1000))
    assert (found.test, found.num_images) == (MCNEMAR, 1000)
    assert (found.became_wrong, found.became_right) == (became_wrong, became_right)
    assert found.p == mcnemar(became_wrong, became_right)
    assert found.is_clearly_worse is is_clearly_worse


def test_images_that_only_one_version_has_classified_do_not_count() -> None:
    found = compare(
        Correctness.of(np.arange(300) >= 100, "a", 500),
        Correctness.of(np.arange(200) >= 0, "a", 500),
    )
    assert (found.num_images, found.became_wrong, found.accuracy, found.earlier_accuracy) == (200, 100, 0.5, 1.0)


@pytest.mark.parametrize(
    ("new", "earlier", "is_clearly_worse"),
    [
        (correctness(500, 500), correctness(900, 100, "other images"), True),
        (correctness(900, 100), correctness(500, 500, "other images"), False),
        (correctness(880, 120), correctness(900, 100, "other images"), False),  # the intervals overlap
        (correctness(5, 5), correctness(900, 100, "other images"), True),
        (correctness(7, 3), correctness(900, 100, "other images"), False),  # ten images are few
        (correctness(500, 500), Correctness(num_right=900, num_images=1000), True),  # an older manifest
    ],
)
def test_other_validation_images_are_compared_by_intervals(
    new: Correctness, earlier: Correctness, is_clearly_worse: bool
) -> None:
    found = compare(new, earlier)
    assert (found.test, found.p, found.became_wrong) == (INTERVALS, None, None)
    assert found.is_clearly_worse is is_clearly_worse


@pytest.mark.parametrize("num_images", [1, 7, 8, 9, 5000])
def test_a_manifest_keeps_the_correctness_of_each_image(num_images: int, model: RepositoryModel) -> None:
    right = np.random.default_rng(0).random(num_images) < 0.5
    known = Correctness.of(right, "a", 6000)
    found = Correctness.from_manifest(json.loads(json.dumps(manifest_of(model, known))))
    assert found.right is not None
    np.testing.assert_array_equal(found.right, right)
    assert (found.sha256, found.num_right, found.num_images, found.num_validation) == (
        *("a", known.num_right, num_images),
        6000,
    )


def test_a_new_version_is_compared_with_the_newest(model: RepositoryModel) -> None:
    put_version(model, manifest_of(model, correctness(100, 0)))
    put_version(model, manifest_of(model, correctness(50, 50)))
    decision = decide(model, correctness(50, 50), None)
    assert (decision.compared_with, decision.objection) == (2, None)
    assert decision.line == (
        "50.00 % of 100 validation images right, version 2 of digits 50.00 %: not clearly worse (0 of 100 images "
        f"became wrong and 0 right: {MCNEMAR}, p = 1)"
    )


def test_after_a_roll_back_a_new_version_is_compared_with_the_one_that_serves(model: RepositoryModel) -> None:
    put_version(model, manifest_of(model, correctness(100, 0)))
    put_version(model, manifest_of(model, correctness(50, 50)))
    write_promotion(model.path, roll_back(None, 1, 2, [1, 2]))
    decision = decide(model, correctness(50, 50), None)
    assert (decision.compared_with, str(decision.objection)[:24]) == (1, "it is clearly worse: 50.")
    put_version(model, manifest_of(model, correctness(99, 1)))
    assert decide(model, correctness(99, 1), None).compared_with == 3


def test_a_version_of_convoy_0_1_is_compared_by_intervals(model: RepositoryModel) -> None:
    """Its manifest has numbers of images and errors, and no record of each image."""
    put_version(model, {"labels": model.labels, "metrics": {"num_val": 5000, "val_errors": 40}})
    assert decide(model, correctness(4950, 50), None).objection is None
    decision = decide(model, correctness(4500, 500), None)
    assert decision.objection == (
        "it is clearly worse: 90.00 % of 5,000 validation images right, version 1 of digits 99.20 % "
        "(Wilson intervals of 95 % on other images)"
    )


INCOMPARABLE: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "its manifest.json has no figures"),
    "no object": ([1], "its manifest.json has no figures"),
    "no metrics": ({"labels": list("0123456789")}, "its manifest.json has no figures"),
    "no images": (
        {"labels": list("0123456789"), "metrics": {"num_val": 0, "val_errors": 0}},
        "its manifest.json has no figures",
    ),
    "contradictory": (
        {
            "labels": list("0123456789"),
            "metrics": {"num_val": 100, "val_errors": 1},
            "validation": correctness(50, 50).to_json(),
        },
        "its manifest.json has no figures",
    ),
    "other classes": (
        {"labels": ["cat", "dog"], "metrics": {"num_val": 100, "val_errors": 1}},
        "its classes are others",
    ),
}


@pytest.mark.parametrize(("manifest", "reason"), INCOMPARABLE.values(), ids=list(INCOMPARABLE))
def test_a_version_without_figures_gives_a_warning_and_no_objection(
    manifest: object, reason: str, model: RepositoryModel
) -> None:
    put_version(model, manifest)
    decision = decide(model, correctness(50, 50), None)
    assert (decision.compared_with, decision.comparison, decision.objection) == (None, None, None)
    assert decision.line == (
        "warning: 50.00 % of 100 validation images right, but version 1 of digits cannot be compared: " + reason
    )


def test_a_version_of_other_software_gives_a_warning_and_no_objection(model: RepositoryModel) -> None:
    version = put_version(model, "{}", name="notes.txt")
    assert decide(model, correctness(5, 5), None).line.endswith(
        "cannot be compared: its manifest.json cannot be read (No such file or directory)"
    )
    (version / "model.onnx").unlink()
    assert decide(model, correctness(5, 5), None).line.endswith("cannot be compared: it has no model.onnx")


def test_a_single_predicted_class_is_an_objection_with_and_without_an_earlier_version(model: RepositoryModel) -> None:
    for _ in range(2):
        objection = decide(model, correctness(2, 4), "red").objection
        assert objection == (
            "it assigns every image to the class 'red', which gets 33.33 % of 6 validation images right: it has "
            "learned nothing"
        )
        put_version(model, manifest_of(model, correctness(2, 4)))


@pytest.mark.parametrize(
    ("predicted", "labels", "num_validation", "expected"),
    [
        ([1] * 30, [0, 1, 2] * 10, 30, 1),
        ([1] * 29 + [2], [0, 1, 2] * 10, 30, None),
        ([1] * 30, [1] * 30, 30, None),  # there is one class to predict
        ([1] * 6 + [0, 1] * 12, [0, 1] * 15, 6, None),  # six images are few: training images count, too
        ([1] * 30, [0, 1] * 15, 6, 1),
        ([1] * 25 + [0] * 5, [0, 1] * 15, 25, 1),  # and 25 are enough
        ([0, 0, 0], [0, 1, 1], 2, 0),  # there are no more
    ],
)
def test_a_constant_prediction_is_recognised(
    predicted: list[int], labels: list[int], num_validation: int, expected: int | None
) -> None:
    assert constant_class(np.array(predicted), np.array(labels), num_validation) == expected
