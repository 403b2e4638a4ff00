"""The quality check: a version that is clearly worse than the one that serves is not published.

Each manifest records for every validation image whether the model classified it correctly. So two versions that were
validated on the same images are compared image by image, without running the earlier one (McNemar, Psychometrika 12,
1947). On other images, and with versions of Convoy 0.1, the intervals of the two accuracies are compared.
"""

import base64
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convoy.named_files import read_regular
from trainer.errors import ExportError
from trainer.evaluation.intervals import wilson_interval
from trainer.export.repository import MANIFEST, ONNX, RepositoryModel

ALPHA = 0.05
MCNEMAR = "McNemar's exact test on the same images, one-sided, alpha 0.05"
INTERVALS = "Wilson intervals of 95 % on other images"
MIN_IMAGES_OF_CONSTANT = 20
"""A network that predicts one class for so many images of several classes has learned nothing."""


class QualityError(ExportError):
    """The model is clearly worse than the version that serves, or always predicts the same class. Exit code 6."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Correctness:
    """The correctness of a version on the validation images, image by image.

    Args:
        num_right: images that it classifies correctly.
        num_images: images that it has classified.
        right: bool `[num_images]`, in the order of the images' digests; None for a manifest of version 0.1.
        sha256: of all validation images with their labels; None for a manifest of version 0.1.
        num_validation: all validation images; more than `num_images` if the time limit came first.
    """

    num_right: int
    num_images: int
    right: npt.NDArray[np.bool_] | None = None
    sha256: str | None = None
    num_validation: int | None = None

    @classmethod
    def of(cls, right: npt.NDArray[np.bool_], sha256: str, num_validation: int) -> "Correctness":
        return cls(
            num_right=int(right.sum()),
            num_images=len(right),
            right=right,
            sha256=sha256,
            num_validation=num_validation,
        )

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> "Correctness":
        """Returns what a manifest of any version of Convoy records.

        Raises:
            KeyError, TypeError, ValueError: it has no such figures.
        """
        num_images, num_errors = int(manifest["metrics"]["num_val"]), int(manifest["metrics"]["val_errors"])
        if not 0 <= num_errors <= num_images or num_images == 0:
            raise ValueError(f"{num_errors} errors of {num_images} images")
        correctness = cls(num_right=num_images - num_errors, num_images=num_images)
        if "validation" not in manifest:
            return correctness
        validation = manifest["validation"]
        packed = np.frombuffer(base64.b64decode(validation["right"], validate=True), dtype=np.uint8)
        right = np.unpackbits(packed)[:num_images].astype(bool)
        if len(right) != num_images or int(right.sum()) != correctness.num_right:
            raise ValueError("its figures contradict each other")
        return cls.of(right, str(validation["sha256"]), int(validation["num_images"]))

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest's section `validation`."""
        assert self.right is not None
        return {
            "sha256": self.sha256,
            "num_images": self.num_validation,
            "right": base64.b64encode(np.packbits(self.right).tobytes()).decode(),
        }

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.num_right, self.num_images)

    @property
    def metrics(self) -> dict[str, Any]:
        """The manifest's figures; without validation images there are none."""
        if not self.num_images:
            return {"val_accuracy": None, "val_errors": None, "num_val": 0, "val_interval": None}
        return {
            "val_accuracy": self.accuracy,
            "val_errors": self.num_images - self.num_right,
            "num_val": self.num_images,
            "val_interval": self.interval,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionComparison:
    """A new version compared with an earlier one.

    Args:
        test: `MCNEMAR` or `INTERVALS`.
        p: of McNemar's test.
        num_images: images that the test rests on.
        accuracy: of the new version on these images; `earlier_accuracy` of the earlier one, on its images.
        became_wrong: images that only the earlier version classifies correctly; `became_right`: only the new one.
    """

    test: str
    p: float | None = None
    num_images: int
    accuracy: float
    earlier_accuracy: float
    became_wrong: int | None = None
    became_right: int | None = None
    is_clearly_worse: bool

    def describe(self) -> str:
        if self.p is None:
            return self.test
        return (
            f"{self.became_wrong:,} of {self.num_images:,} images became wrong and {self.became_right:,} right: "
            f"{self.test}, p = {self.p:.2g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome of the quality check: an objection to a new version, or none, and the figures that it rests on.

    Args:
        serving: the number of the version that the new one would replace, None if there is none.
        compared_with: the same, but None if that version has no figures.
        objection: the reason not to publish the version; None if there is none.
        line: for the user, if there is no objection.
    """

    serving: int | None
    compared_with: int | None = None
    comparison: VersionComparison | None = None
    objection: str | None = None
    line: str

    def to_json(self, correctness: Correctness, *, promote: bool) -> dict[str, Any]:
        """Returns the manifest's section `quality`; `promoted` if only `--promote` lets the version out."""
        alone = {
            "num_images": correctness.num_images,
            "accuracy": correctness.accuracy if correctness.num_images else None,
        }
        return {
            "compared_with": self.compared_with,
            **(asdict(self.comparison) if self.comparison else alone),
            "objection": self.objection,
            "promoted": promote and self.objection is not None,
        }


class QualityCheck:
    """Compares a new version with the one that it would replace, and tells the user.

    The checks of an export take a while, in which other runs may publish: `section` compares again if they did.

    Args:
        constant: the only class that the new version predicts, None if it predicts several.
        promote: an objection is a warning.
        log: receives a line for each comparison.
    """

    def __init__(
        self,
        model: RepositoryModel,
        correctness: Correctness,
        constant: str | None,
        *,
        promote: bool,
        log: Callable[[str], None],
    ) -> None:
        self._model = model
        self.correctness = correctness
        self._constant = constant
        self._promote = promote
        self._log = log
        self._decision = self._decide()

    def section(self) -> dict[str, Any]:
        """Returns the manifest's section `quality`, of a comparison with the version that serves now.

        Raises:
            QualityError: the model must not be published, unless `--promote` says so.
        """
        if self._decision.serving != self._model.serving():
            self._decision = self._decide()
        return self._decision.to_json(self.correctness, promote=self._promote)

    def _decide(self) -> Decision:
        model, decision = self._model.name, decide(self._model, self.correctness, self._constant)
        if decision.objection is None:
            self._log(decision.line)
        elif self._promote:
            self._log(f"warning: --promote publishes {model}, although {decision.objection}")
        else:
            raise QualityError(f"{model} is not published: {decision.objection}; --promote publishes it all the same")
        return decision


def decide(model: RepositoryModel, correctness: Correctness, constant: str | None) -> Decision:
    """Compares a new version with the one that it would replace.

    Args:
        constant: the only class that the new version predicts, None if it predicts several.
    """
    if not correctness.num_images:
        return _decide_without_validation(model, constant)
    line = f"{100 * correctness.accuracy:.2f} % of {correctness.num_images:,} validation images right"
    objection = None
    if constant is not None:
        objection = f"it assigns every image to the class {constant!r}, which gets {line}: it has learned nothing"
    version = model.serving()
    if version is None:
        return Decision(serving=None, line=f"{line}; {model.name} has no earlier version", objection=objection)
    earlier = _correctness_of(model, version)
    if isinstance(earlier, str):
        line = f"warning: {line}, but version {version} of {model.name} cannot be compared: {earlier}"
        return Decision(serving=version, line=line, objection=objection)
    comparison = compare(correctness, earlier)
    of_earlier = f"version {version} of {model.name} {100 * comparison.earlier_accuracy:.2f} %"
    if comparison.is_clearly_worse and objection is None:
        objection = (
            f"it is clearly worse: {100 * comparison.accuracy:.2f} % of {comparison.num_images:,} validation images "
            f"right, {of_earlier} ({comparison.describe()})"
        )
    line = f"{line}, {of_earlier}: not clearly worse ({comparison.describe()})"
    return Decision(serving=version, compared_with=version, comparison=comparison, objection=objection, line=line)


def _decide_without_validation(model: RepositoryModel, constant: str | None) -> Decision:
    """Objects to a version that nothing can compare with the one that serves; a first version may be published.

    Args:
        constant: the only class that the new version predicts for training images, None if it predicts several.
    """
    version, line = model.serving(), "there are no validation images (num_validation 0)"
    objection = None
    if version is not None:
        objection = f"{line}, so that nothing tells if it is worse than version {version}"
    if constant is not None:
        objection = f"it assigns every training image to the class {constant!r}: it has learned nothing"
    return Decision(serving=version, line=f"{line}; {model.name} has no earlier version", objection=objection)


def _correctness_of(model: RepositoryModel, version: int) -> Correctness | str:
    """Returns what a version's manifest records, or the reason why the version cannot be compared."""
    folder = model.path / str(version)
    if not (folder / ONNX).is_file():
        return f"it has no {ONNX}"
    try:
        manifest = json.loads(read_regular(folder / MANIFEST))
        if tuple(manifest["labels"]) != model.labels:
            return "its classes are others"
        return Correctness.from_manifest(manifest)
    except OSError as error:
        return f"its {MANIFEST} cannot be read ({error.strerror or error})"
    except (KeyError, TypeError, ValueError):
        return f"its {MANIFEST} has no figures"


def compare(new: Correctness, earlier: Correctness) -> VersionComparison:
    """Compares two versions on the images that both have classified, if they were validated on the same ones."""
    if new.right is None or earlier.right is None or new.sha256 != earlier.sha256:
        return VersionComparison(
            test=INTERVALS,
            num_images=new.num_images,
            accuracy=new.accuracy,
            earlier_accuracy=earlier.accuracy,
            is_clearly_worse=new.interval[1] < earlier.interval[0],
        )
    num_images = min(new.num_images, earlier.num_images)
    ours, theirs = new.right[:num_images], earlier.right[:num_images]
    became_wrong, became_right = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    p = mcnemar(became_wrong, became_right)
    return VersionComparison(
        test=MCNEMAR,
        p=p,
        num_images=num_images,
        accuracy=float(ours.mean()),
        earlier_accuracy=float(theirs.mean()),
        became_wrong=became_wrong,
        became_right=became_right,
        is_clearly_worse=p < ALPHA,
    )


def mcnemar(became_wrong: int, became_right: int) -> float:
    """Returns the p of McNemar's exact test against the alternative that the new version is worse.

    It is the probability that a fair coin, tossed once for each image that only one of the two versions classifies
    correctly, falls against the new version at least as often. Two equal versions are refused once in twenty times or
    less; a two-sided test would halve that, and would need six validation images instead of five to refuse anything.
    """
    number = became_wrong + became_right
    outcomes = tail = math.comb(number, became_wrong)
    for k in range(became_wrong, number):
        outcomes = outcomes * (number - k) // (k + 1)
        tail += outcomes
    return tail / (1 << number)


def constant_class(predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], num_validation: int) -> int | None:
    """Returns the class that a model predicts for all images, or None if it predicts several or the images have one.

    Args:
        predicted: of the parity images, validation images first. Where these are few, training images count, too.
        labels: of the same images.
        num_validation: number of images for validation.
    """
    num_images = max(num_validation, MIN_IMAGES_OF_CONSTANT)
    predicted, labels = predicted[:num_images], labels[: min(num_images, len(predicted))]
    is_constant = len(np.unique(predicted)) == 1 and len(np.unique(labels)) > 1
    return int(predicted[0]) if is_constant else None
