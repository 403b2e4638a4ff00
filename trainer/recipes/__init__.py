"""Recipes: everything that decides the computation of a run, as named, frozen values.

A run is a recipe, a data set, a seed and nothing else. The hyper-parameters were chosen on validation images only.
`recipe` says what a recipe is, with `augmentation` and `hyperparameters`. `digits`, `cifar`, `families` (LeNet to
ResNet) and `own_images` hold Convoy's recipes; `fields` sets values by their names, and `files` finds recipes of the
user's own. `folder_choice` and `advice` fit a recipe to a data set. Knows nothing about models and hardware; imports no
torch.
"""

from trainer.errors import unknown_name
from trainer.recipes.augmentation import Augment
from trainer.recipes.cifar import CIFAR10, CIFAR10_96, CIFAR10_FAST, CIFAR10_SMALL, FASHION_MNIST
from trainer.recipes.digits import MNIST, MNIST_FAST
from trainer.recipes.families import FAMILIES, family
from trainer.recipes.hyperparameters import ParameterKind, ParamGroup, Schedule
from trainer.recipes.own_images import ANY_NETWORK, PHOTOS, PRETRAINED, PRETRAINED_PREFIX, WITH_FILE, fine_tuning
from trainer.recipes.recipe import Precision, Recipe, TestTimeViews

__all__ = [
    "PRETRAINED",
    "PRETRAINED_PREFIX",
    "RECIPES",
    "Augment",
    "ParamGroup",
    "ParameterKind",
    "Precision",
    "Recipe",
    "Schedule",
    "TestTimeViews",
    "find_recipe",
]

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        MNIST,
        MNIST_FAST,
        CIFAR10,
        CIFAR10_FAST,
        CIFAR10_96,
        CIFAR10_SMALL,
        FASHION_MNIST,
        *(recipe for network in FAMILIES for recipe in family(network)),
        *(fine_tuning(network) for network in PRETRAINED),
        ANY_NETWORK,
        PHOTOS,
        *WITH_FILE,
    )
}
"""All recipes by their names."""


def find_recipe(name: str) -> Recipe:
    """Returns the recipe of that name.

    Raises:
        ConfigError: there is none; the message offers the nearest names.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES, listed_by="`convoy recipes`")
    return RECIPES[name]
