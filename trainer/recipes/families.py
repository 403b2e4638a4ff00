"""The recipes of the networks on page 37 of the lecture, for CIFAR-10 and for MNIST: `cifar10-NAME`, `mnist-NAME`."""

from dataclasses import replace

from trainer.recipes.augmentation import Augment
from trainer.recipes.recipe import Recipe
from trainer.recipes.shared import ONE_CYCLE, nesterov

FAMILIES = {
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
"""A description of each family, and its peak learning rate for batches of 128 images."""


def family(network: str) -> tuple[Recipe, Recipe]:
    """Returns a family's recipes for CIFAR-10 and for MNIST (digits must not be mirrored), with the usual values."""
    what, lr = FAMILIES[network]
    cifar10 = Recipe(
        name=f"cifar10-{network}",
        summary=f"{what}, for small images, on CIFAR-10",
        dataset="cifar10",
        network=network,
        global_batch_size=128,
        epochs=30,
        param_groups=nesterov(lr),
        schedule=ONE_CYCLE,
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
