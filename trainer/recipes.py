"""Recipes: everything that decides the computation of a run, as named, frozen values.

A run is a recipe, a data set, a seed and nothing else. The hyper-parameters were chosen on validation images only.
Knows nothing about models and hardware; imports no torch.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from trainer.errors import unknown_name

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
ParameterKind = Literal["stem", "filters", "matrices", "vectors"]
TestTimeViews = Literal["one", "shifted", "mirrored", "mirrored-and-shifted"]

_WITHOUT_MIRRORED: dict[TestTimeViews, TestTimeViews] = {"mirrored": "one", "mirrored-and-shifted": "shifted"}
_WITHOUT_SHIFTED: dict[TestTimeViews, TestTimeViews] = {"shifted": "one", "mirrored-and-shifted": "mirrored"}

PRETRAINED_PREFIX = "pretrained:"
"""Before a name of `PRETRAINED`: torchvision's network with its published weights."""
PRETRAINED = ("alexnet", "vgg16", "vgg19", "googlenet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""Networks that can be fine-tuned: page 37 of the lecture, without the BN variants, which torchvision lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """The optimizer settings of one group of parameters.

    `lr` is multiplied by the schedule's factor. `weight_decay` is decoupled and relative to `lr`: each step shrinks
    the weights by lr · weight_decay.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    muon: bool = False
    """The update is the nearest semi-orthogonal matrix, and the filter keeps the norm sqrt(filters)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate's factor over a run: linear between the given points.

    Args:
        points: (fraction of the run, factor) in rising order of fractions, from 0 to 1.
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0), (1.0, 1.0))

    def factor(self, step: int, num_steps: int) -> float:
        """Returns the factor at a step, counted from 0."""
        at = step / max(1, num_steps - 1)
        for (x0, y0), (x1, y1) in zip(self.points, self.points[1:], strict=False):
            if at <= x1:
                return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
        return self.points[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """The augmentation of training images. The default changes nothing."""

    flip: Literal["none", "alternating"] = "none"
    """`alternating`: mirrored at random in epoch 0, then every image in turn (airbench, arXiv 2404.00498)."""
    shift: int = 0
    """Largest translation in pixels, both ways."""
    fill: Literal["reflect", "zero"] = "reflect"
    """Content of the border that a shift uncovers."""
    rotate_degrees: float = 0.0
    """Largest rotation, both ways. Rotation, scaling and their translation fill with zero, bilinear."""
    scale: float = 0.0
    """Largest relative change of size, both ways and for each axis on its own."""

    @property
    def is_affine(self) -> bool:
        return self.rotate_degrees > 0 or self.scale > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The computation of a run, whatever hardware it runs on."""

    name: str
    summary: str
    """One line for `convoy recipes`. It is part of the fingerprint, so a new text changes the digests of new runs."""
    dataset: str
    network: str
    """A name that `trainer.models.build_network` knows."""
    widths: tuple[int, ...] = ()
    """Channels of the network's stages, for networks that have a choice."""
    global_batch_size: int
    """Images per step, over all ranks together."""
    epochs: int
    param_groups: dict[ParameterKind, ParamGroup]
    """The optimizer settings of the filters of the stem, the other filters, the matrices of fully connected layers, and
    the vectors (biases, norms)."""
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    label_smoothing: float = 0.0
    precision: Precision = "float32"
    """`bfloat16`: autocast, where the hardware computes it faster than float32."""
    test_time_views: TestTimeViews = "one"
    """Views of an image whose logits are averaged for a second figure; the headline is of one view."""
    num_validation: int = 5000
    """Training images set aside, stratified; at most a tenth of a smaller set."""
    file_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the user's files that decide the computation, by what they hold: `recipe`, `network`, `weights`. The
    trainer fills it in."""

    def with_augmentation(
        self,
        *,
        mirror: bool | None = None,
        shift: int | None = None,
        rotate_degrees: float | None = None,
        scale: float | None = None,
    ) -> "Recipe":
        """Returns the recipe with another augmentation, without the test-time views that it rules out.

        Args:
            mirror: mirrors images or does not; None keeps the recipe's, as for the others.
            shift: see `Augment`, as for the others.
        """
        old = self.augment
        augment = replace(
            old,
            flip=old.flip if mirror is None else "alternating" if mirror else "none",
            shift=old.shift if shift is None else shift,
            rotate_degrees=old.rotate_degrees if rotate_degrees is None else rotate_degrees,
            scale=old.scale if scale is None else scale,
        )
        views = self.test_time_views
        if mirror is False:
            views = _WITHOUT_MIRRORED.get(views, views)
        if shift == 0:
            views = _WITHOUT_SHIFTED.get(views, views)
        return replace(self, augment=augment, test_time_views=views)

    def with_global_batch_size(self, size: int) -> "Recipe":
        """Returns the recipe with another global batch, and with learning rates for it.

        The rates grow with the square root of the batch, which keeps the variance of a step's update (Krizhevsky,
        arXiv 1404.5997). Rates in proportion to the batch were tried: they are worse for small sets, and diverge.
        """
        factor = (size / self.global_batch_size) ** 0.5
        groups = {kind: replace(group, lr=group.lr * factor) for kind, group in self.param_groups.items()}
        return replace(self, global_batch_size=size, param_groups=groups)

    def as_computed_on(self, device: "torch.device") -> "Recipe":
        """Returns the recipe with the precision that it gets on this device, which decides the result."""
        from trainer.hardware import has_fast_bfloat16  # imports torch, which --help need not wait for

        return self if has_fast_bfloat16(device) else replace(self, precision="float32")


def _same(group: ParamGroup) -> dict[ParameterKind, ParamGroup]:
    return {"stem": group, "filters": group, "matrices": group, "vectors": group}


def _airbench_groups(*, filters: float, batch_size: int) -> dict[ParameterKind, ParamGroup]:
    """Muon for the filters, Nesterov SGD for the rest; airbench's rates are for the sum over a batch."""
    return {
        "filters": ParamGroup(lr=filters, momentum=0.6, muon=True),
        "matrices": ParamGroup(lr=0.67 * batch_size, momentum=0.85, weight_decay=2e-5),
        "vectors": ParamGroup(lr=0.053 * batch_size, momentum=0.85, weight_decay=2.5e-4),
        "stem": ParamGroup(lr=0.5, momentum=0.85, weight_decay=3.3e-3),
    }


_TO_ZERO = Schedule(points=((0.0, 1.0), (1.0, 0.0)))

_CIFAR10_SMALL = Recipe(
    name="cifar10-small",
    summary="a smaller airbench: 90 % on CIFAR-10 on 2 CPU cores in under 5 minutes",
    dataset="cifar10",
    network="airbench",
    widths=(32, 64, 128),
    global_batch_size=500,
    epochs=8,
    param_groups=_airbench_groups(filters=0.12, batch_size=500),
    schedule=_TO_ZERO,
    augment=Augment(flip="alternating", shift=2),
    label_smoothing=0.2,
    precision="bfloat16",
    test_time_views="mirrored-and-shifted",
)

_ALL = (
    Recipe(
        name="mnist",
        summary="the lecture's convnet and its plain SGD: 10 epochs, about 1 % test error",
        dataset="mnist",
        network="lecture",
        global_batch_size=100,
        epochs=10,
        param_groups=_same(ParamGroup(lr=0.1)),
        precision="bfloat16",
    ),
    Recipe(
        name="mnist-fast",
        summary="a smaller net, augmented digits and Muon: half the errors of mnist in a third of its time",
        dataset="mnist",
        network="compact",
        widths=(16, 32, 32, 64),
        global_batch_size=250,
        epochs=3,
        param_groups=_airbench_groups(filters=0.12, batch_size=250),
        schedule=_TO_ZERO,
        augment=Augment(shift=2, rotate_degrees=10, scale=0.1),
        label_smoothing=0.1,
        precision="bfloat16",
        test_time_views="shifted",
    ),
    Recipe(
        name="cifar10",
        summary="airbench with Muon: 94 % on CIFAR-10, made for a GPU",
        dataset="cifar10",
        network="airbench",
        widths=(64, 256, 256),
        global_batch_size=2000,
        epochs=12,  # airbench: 8, with 50,000 training images; here 5,000 of them validate
        param_groups=_airbench_groups(filters=0.24, batch_size=2000),
        schedule=_TO_ZERO,
        augment=Augment(flip="alternating", shift=2),
        label_smoothing=0.2,
        precision="bfloat16",
        test_time_views="mirrored-and-shifted",
    ),
    _CIFAR10_SMALL,
    replace(
        _CIFAR10_SMALL,
        name="fashion-mnist",
        summary="cifar10-small's net on Fashion-MNIST, for longer and with smaller shifts",
        dataset="fashion-mnist",
        epochs=16,
        augment=Augment(flip="alternating", shift=1, fill="zero"),
    ),
)

_FAMILIES = {
    "lenet5": ("LeNet-5 of 1998", 0.05),
    "alexnet": ("AlexNet of 2012", 0.02),
    "bn-alexnet": ("AlexNet with batch norm", 0.1),
    "bn-nin": ("network in network with batch norm", 0.1),
    "vgg16": ("VGG-16 of 2014", 0.1),
    "vgg19": ("VGG-19 of 2014", 0.1),
    "googlenet": ("GoogLeNet of 2014", 0.1),
    "resnet18": ("ResNet-18 of 2015", 0.1),
    "resnet34": ("ResNet-34 of 2015", 0.1),
    "resnet50": ("ResNet-50 of 2015", 0.1),
    "resnet101": ("ResNet-101 of 2015", 0.1),
    "resnet152": ("ResNet-152 of 2015", 0.1),
}
"""The lecture's families: a description of each, and its peak learning rate for batches of 128 images."""

_ONE_CYCLE = Schedule(points=((0.0, 0.04), (0.3, 1.0), (1.0, 0.0)))


def _nesterov(lr: float) -> dict[ParameterKind, ParamGroup]:
    group = ParamGroup(lr=lr, momentum=0.9, weight_decay=5e-4)
    return {**_same(group), "vectors": replace(group, weight_decay=0.0)}


def _family(network: str) -> tuple[Recipe, Recipe]:
    """Returns a family's recipes for CIFAR-10 and for MNIST (digits must not be mirrored), with the usual values."""
    what, lr = _FAMILIES[network]
    cifar10 = Recipe(
        name=f"cifar10-{network}",
        summary=f"{what}, for small images, on CIFAR-10",
        dataset="cifar10",
        network=network,
        global_batch_size=128,
        epochs=30,
        param_groups=_nesterov(lr),
        schedule=_ONE_CYCLE,
        augment=Augment(flip="alternating", shift=4),
        precision="bfloat16",
    )
    mnist = replace(
        cifar10,
        name=f"mnist-{network}",
        summary=f"{what}, for small images, on MNIST",
        dataset="mnist",
        epochs=10,
        augment=Augment(shift=2, fill="zero"),
    )
    return cifar10, mnist


def _fine_tuning(network: str) -> Recipe:
    return Recipe(
        name=f"finetune-{network}",
        summary=f"torchvision's {network}, taught on ImageNet: for --dataset folder:PATH --image-size 224",
        dataset="cifar10",
        network=f"{PRETRAINED_PREFIX}{network}",
        global_batch_size=64,
        epochs=5,
        param_groups=_nesterov(0.005),
        schedule=_ONE_CYCLE,
        augment=Augment(flip="alternating", shift=8),
        precision="bfloat16",
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *_ALL,
        *(recipe for network in _FAMILIES for recipe in _family(network)),
        *(_fine_tuning(network) for network in PRETRAINED),
    )
}


def find_recipe(name: str) -> Recipe:
    """Returns the recipe of that name.

    Raises:
        ConfigError: there is none; the message offers the nearest names.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]
