"""The recipe: everything that decides the computation of a run, as one frozen value."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from trainer.errors import ConfigError
from trainer.recipes.augmentation import Augment, Square
from trainer.recipes.hyperparameters import BestBy, ClassWeights, ParameterKind, ParamGroup, Schedule, check_number

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "tf32", "bfloat16"]
TestTimeViews = Literal["one", "shifted", "mirrored", "mirrored-and-shifted"]

_WITHOUT_MIRRORED: dict[TestTimeViews, TestTimeViews] = {"mirrored": "one", "mirrored-and-shifted": "shifted"}
_WITHOUT_SHIFTED: dict[TestTimeViews, TestTimeViews] = {"shifted": "one", "mirrored-and-shifted": "mirrored"}


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
    """`bfloat16`: autocast, where the hardware computes it faster than float32. `tf32`: convolutions and products of
    matrices in TF32, on NVIDIA's GPUs since Ampere. `float32` elsewhere."""
    square: Square = "crop"
    """How the images of a folder become squares: by their centre alone (`crop`), or whole, on white (`pad`)."""
    test_time_views: TestTimeViews = "one"
    """Views of an image whose logits are averaged for a second figure; the headline is of one view."""
    num_validation: int = 5000
    """Training images set aside, stratified; at most a tenth of a smaller set. 0: none, all are trained on, once the
    hyper-parameters are fixed; nothing is chosen by validation then, and no validation accuracy is shown."""
    resolutions: tuple[tuple[float, int], ...] = ()
    """Smaller images at first: [fraction of the run until which larger ones are resized, pixels], such as [[0.3, 24],
    [0.6, 28]]; after the last fraction they have their own size. For networks that take several sizes."""
    whitening_bias_until: float = 1.0
    """Fraction of the run after which the bias of an airbench network's first layer, which whitens, stays as it is: no
    step after it computes a gradient of that layer. 1: it is trained to the end. Other networks have no such layer."""
    file_sha256: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the user's files that decide the computation, by what they hold: `recipe`, `network`, `weights`. The
    trainer fills it in."""

    def __post_init__(self) -> None:
        for name in ("clip_norm", "head_lr", "patience"):
            check_number(name, getattr(self, name), 0, math.inf)
        for name in ("ema_decay", "label_smoothing"):
            check_number(name, getattr(self, name), 0, 1, excludes_most=True)
        check_number("whitening_bias_until", self.whitening_bias_until, 0, 1)
        if self.balanced_sampling and self.class_weights != "none":
            raise ConfigError("balanced_sampling and class_weights both favour rare classes: choose one of them")
        if self.num_validation == 0 and (self.patience or self.keep_best):
            chosen = "patience ends the training" if self.patience else "keep_best chooses the epoch"
            raise ConfigError(f"{chosen} by validation images, and num_validation 0 sets none aside: drop one of them")
        fractions, sizes = [until for until, _ in self.resolutions], [size for _, size in self.resolutions]
        if [0, *fractions, 1] != sorted({0, *fractions, 1}) or any(size < 1 for size in sizes):
            raise ConfigError(
                f"resolutions {self.resolutions}: give (fraction of the run, pixels), fractions rising between 0 and 1"
            )

    @property
    def is_fine_tuning(self) -> bool:
        """Whether the training starts from weights that other images taught."""
        return self.name.startswith("finetune-") or self.weights is not None or "weights" in self.file_sha256

    def image_size(self, step: int, num_steps: int) -> int | None:
        """Returns the size in pixels to which images are resized at a step, counted from 0; None for their own."""
        return next((size for until, size in self.resolutions if step < round(until * num_steps)), None)

    def trains_whitening_bias(self, step: int, num_steps: int) -> bool:
        """Returns whether a step, counted from 0, updates the bias of the whitening layer."""
        return step < round(self.whitening_bias_until * num_steps)

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
        from trainer.hardware import has_fast_bfloat16, has_tf32  # imports torch, which --help need not wait for

        has_precision = {"bfloat16": has_fast_bfloat16, "tf32": has_tf32}.get(self.precision)
        return self if has_precision is None or has_precision(device) else replace(self, precision="float32")
