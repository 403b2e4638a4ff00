"""The recipes of the airbench family (Keller Jordan, arXiv 2404.00498) for CIFAR-10 and Fashion-MNIST."""

from dataclasses import replace

from trainer.augmentation import Augment
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
