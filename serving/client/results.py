"""The values that the client returns."""

from dataclasses import dataclass
from typing import Self

from serving.protocol.tensors import Array


@dataclass(frozen=True, slots=True)
class InferResult:
    """The outputs of a model.

    Args:
        version: the model version that computed them; for an input sent in parts, the version of the first part.
        id: the request's ID.
        outputs: arrays by output name.
    """

    model: str
    version: str
    id: str
    outputs: dict[str, Array]

    def __getitem__(self, output: str) -> Array:
        return self.outputs[output]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A class and its probability. For a model without labels, `label` is the index."""

    index: int
    label: str
    probability: float

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Parses the protocol's `value:index:label`, or `value:index` of a model without labels."""
        value, index, *label = text.decode(errors="replace").split(":", 2)
        return cls(int(index), label[0] if label else index, float(value))


@dataclass(frozen=True, slots=True)
class Classification:
    """The most probable classes of an image.

    Args:
        name: path of the file, or "image N".
        predictions: most probable first.
        warning: what may be wrong with the image, or None.
    """

    name: str
    predictions: tuple[Prediction, ...]
    warning: str | None


@dataclass(frozen=True, slots=True)
class ModelState:
    """One entry of the repository index. `reason` says why the version is not READY."""

    name: str
    version: str
    state: str
    reason: str
