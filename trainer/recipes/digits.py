"""The recipes for MNIST: the lecture's own, and a faster and more accurate one."""

from trainer.recipes.augmentation import Augment
from trainer.recipes.hyperparameters import ParamGroup
from trainer.recipes.recipe import Recipe
from trainer.recipes.shared import TO_ZERO, airbench_groups, same

MNIST = Recipe(
    name="mnist",
    summary="the lecture's convnet and its plain SGD: 10 epochs, about 1 % test error",
    dataset="mnist",
    network="lecture",
    global_batch_size=100,
    epochs=10,
    param_groups=same(ParamGroup(lr=0.1)),
    precision="bfloat16",
)

MNIST_FAST = Recipe(
    name="mnist-fast",
    summary="a smaller net, augmented digits and Muon: half the errors of mnist in a third of its time",
    dataset="mnist",
    network="compact",
    widths=(16, 32, 32, 64),
    global_batch_size=250,
    epochs=3,
    param_groups=airbench_groups(filters=0.12, batch_size=250),
    schedule=TO_ZERO,
    augment=Augment(shift=2, rotate_degrees=10, scale=0.1),
    label_smoothing=0.1,
    precision="bfloat16",
    test_time_views="shifted",
)
