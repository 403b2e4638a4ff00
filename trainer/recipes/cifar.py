"""The recipes of the airbench family (Keller Jordan, arXiv 2404.00498) for CIFAR-10 and Fashion-MNIST."""

from dataclasses import replace

from trainer.recipes.augmentation import Augment
from trainer.recipes.hyperparameters import Schedule
from trainer.recipes.recipe import Recipe
from trainer.recipes.shared import TO_ZERO, airbench_groups

CIFAR10 = Recipe(
    name="cifar10",
    summary="airbench with Muon: 94 % on CIFAR-10, made for a GPU",
    dataset="cifar10",
    network="airbench",
    widths=(64, 256, 256),
    global_batch_size=2000,
    epochs=12,  # airbench: 8, with 50,000 training images; here 5,000 of them validate
    whitening_bias_until=3 / 8,  # as airbench: 3 of its 8 epochs
    param_groups=airbench_groups(filters=0.24, batch_size=2000),
    schedule=TO_ZERO,
    augment=Augment(flip="alternating", shift=2),
    label_smoothing=0.2,
    precision="bfloat16",
    test_time_views="mirrored-and-shifted",
)

CIFAR10_SMALL = Recipe(
    name="cifar10-small",
    summary="a smaller airbench: 90 % on CIFAR-10 on 2 CPU cores in under 5 minutes",
    dataset="cifar10",
    network="airbench",
    widths=(32, 64, 128),
    global_batch_size=500,
    epochs=8,
    param_groups=airbench_groups(filters=0.12, batch_size=500),
    schedule=TO_ZERO,
    augment=Augment(flip="alternating", shift=2),
    label_smoothing=0.2,
    precision="bfloat16",
    test_time_views="mirrored-and-shifted",
)

FASHION_MNIST = replace(
    CIFAR10_SMALL,
    name="fashion-mnist",
    summary="cifar10-small's net on Fashion-MNIST, for longer and with smaller shifts",
    dataset="fashion-mnist",
    epochs=16,
    augment=Augment(flip="alternating", shift=1, fill="zero"),
)

CIFAR10_FAST = replace(
    CIFAR10,
    name="cifar10-fast",
    summary="cifar10 with small images at first and fewer epochs: 94 % in 0.8 s of an H200 (--num-validation 0)",
    # 24, 28 and 32 pixels, brightness and contrast are hiverge's of 2025 (docs/performance.md).
    epochs=9,
    augment=Augment(flip="alternating", shift=2, brightness=0.14, contrast=0.13),
    resolutions=((0.3, 24), (0.65, 28)),
)
"""Put together from published recipes and our own measurements of their parts. Variants with 8 and 9 epochs were no
better on validation images (benchmarks/results/gpu-2026-11-27.md)."""

CIFAR10_96 = replace(
    CIFAR10,
    name="cifar10-96",
    summary="a wider and deeper airbench, for 96 % on CIFAR-10; made for a GPU, not yet trained on one",
    network="airbench-residual",
    widths=(128, 384, 512),
    global_batch_size=1000,
    epochs=40,
    param_groups=airbench_groups(filters=0.17, batch_size=1000),
    # airbench96 warms up over a tenth of the run, moves by 4 pixels and cuts out 12 x 12, an area of 0.14.
    schedule=Schedule(points=((0.0, 0.2), (0.1, 1.0), (1.0, 0.0))),
    augment=Augment(flip="alternating", shift=4, erase=1.0, erase_area=0.14),
)
"""airbench96's network, augmentation and length, with the optimizers of `cifar10`; to be tuned on a GPU."""
