"""What the client hands back."""

from dataclasses import dataclass
from typing import Self

from serving.protocol.tensors import Array


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Args:
        version: the model version; where a large input was sent in parts, that of the first.
        id: the request's.
        outputs: by name.
    """

    model: str
    version: str
    id: str
    outputs: dict[str, Array]

    def __getitem__(self, output: str) -> Array:
        return self.outputs[output]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A class and how probable the model finds it. `label` is the index where the model has no labels."""

    index: int
    label: str
    probability: float

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """The protocol's `value:index:label`, or `value:index` where the model has no labels."""
        value, index, *label = text.decode(errors="replace").split(":", 2)
        return cls(int(index), label[0] if label else index, float(value))


@dataclass(frozen=True, slots=True)
class Classification:
    """An image's most probable classes, the best first.

    Args:
        name: the file, or "image N".
        warning: what may be wrong with the image; None if nothing was noticed.
    """

    name: str
    predictions: tuple[Prediction, ...]
    warning: str | None


@dataclass(frozen=True, slots=True)
class ModelState:
    """A line of the repository's index; `reason` says why a model is not READY."""

    name: str
    version: str
    state: str
    reason: str
