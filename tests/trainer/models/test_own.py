"""The user's own networks: called with what they ask for, tried before the training, and known by their source."""

import copy
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.layers import dropout_layers
from trainer.models.start import StartingNetwork, starting_network
from trainer.network_files import find_network, keep_network, with_files, without_paths
from trainer.recipes import RECIPES, Recipe
from trainer.user_code import imported_beside

HEADER = "import torch\nfrom torch import nn\n"
LINEAR = """
class MyNet(nn.Module):
    def __init__(self, num_classes, num_channels, image_size, width=8):
        super().__init__()
        self.arguments = num_classes, num_channels, image_size, width
        self.features = nn.Sequential(nn.Conv2d(num_channels, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        features = self.features(images).flatten(1)
        return self.head(features)
"""
FIXED = """
def my_net():
    return nn.Sequential(
        nn.Conv2d({channels}, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.Linear(16, 1000)
    )
"""


def recipe_of(folder: Path, source: str, name: str = "MyNet") -> Recipe:
    (folder / "my_net.py").write_text(HEADER + textwrap.dedent(source))
    return replace(RECIPES["any-network"], network=f"{folder / 'my_net.py'}:{name}")


def start(recipe: Recipe, *, num_channels: int = 3, lines: list[str] | None = None) -> StartingNetwork:
    log = [] if lines is None else lines
    return starting_network(recipe, num_channels=num_channels, image_size=16, num_classes=5, log=log.append)


def test_a_class_gets_the_arguments_of_its_signature(tmp_path: Path) -> None:
    network = start(recipe_of(tmp_path, LINEAR), num_channels=1).network
    assert network.arguments == (5, 1, 16, 8)
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(("channels", "num_channels"), [(3, 3), (1, 1), (3, 1)])
def test_a_network_for_other_classes_gets_a_new_head_and_grey_images_become_colour_where_it_takes_colour(
    channels: int, num_channels: int, tmp_path: Path
) -> None:
    lines: list[str] = []
    recipe = recipe_of(tmp_path, FIXED.format(channels=channels), "my_net")
    found = start(recipe, num_channels=num_channels, lines=lines)
    assert found.num_channels == channels
    assert found.network(torch.zeros(2, channels, 16, 16)).shape == (2, 5)
    assert lines[0] == f"{recipe.network}: the last layer (4) is new, for 5 classes"
    assert len(lines) == 1 + (channels > num_channels)
    assert channels == num_channels or lines[1].endswith("takes colours: their channel is repeated")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("class MyNet(nn.Module:\n    pass", r"my_net\.py, line 3: SyntaxError: "),
        (
            "import missing_module",
            r"my_net\.py, line 3, in <module>: ModuleNotFoundError: No module named 'missing",
        ),
        (
            "def MyNet(depth): pass",
            r"my_net\.py:MyNet needs the argument 'depth', and Convoy knows num_classes",
        ),
        ("def MyNet(): return 7", r"my_net\.py:MyNet returns int: it must be a torch.nn.Module"),
        ("MyNet = 7", r"my_net\.py:MyNet is of type int: it must be a class or a function"),
        ("def MyNet(): raise ValueError('no')", r"my_net\.py, line 3, in MyNet: ValueError: no"),
        (
            LINEAR.replace("self.head(features)", "self.head(features).detach()"),
            r"my_net\.py:MyNet cannot be trained: ",
        ),
        ("MyNet = nn.Identity", r"my_net\.py:MyNet returns 3 x 3 x 16 x 16 for 3 images: a network returns 5 logits"),
        (
            LINEAR.replace("width, num_classes", "7, num_classes"),
            r"my_net\.py, line 13, in forward: RuntimeError: ",
        ),
        (
            LINEAR.replace("self.head(features)", "(self.head(features), 0) if self.training else self.head(features)"),
            r"in training, .*my_net\.py:MyNet returns tuple for 3 images",
        ),
        (
            LINEAR.replace("self.head(features)", "self.head(features)[:1].expand(3, -1)"),
            r"my_net\.py:MyNet returns 3 x 5 for 1 image: a network returns 5 logits",
        ),
        (
            LINEAR.replace("self.head(features)", "self.head(features) * 1j"),
            r"my_net\.py:MyNet returns 1 x 5 of torch\.complex64 for 1 image",
        ),
        (
            LINEAR.replace("nn.Linear(width, num_classes)", "nn.Linear(width, num_classes).double()"),
            r"my_net\.py:MyNet: head\.weight is of torch\.float64: make it float32",
        ),
        (
            "def MyNet():\n    return torch.jit.trace(nn.Flatten(), torch.ones(1, 2))",
            r"my_net\.py:MyNet returns TopLevelTracedModule: it must be a torch\.nn\.Module, and not scripted",
        ),
        ("def MyNet2(): pass", r"no object 'MyNet': did you mean MyNet2\?"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")  # a FutureWarning, or with torch 2.11 a DeprecationWarning
def test_mistakes_name_the_users_file_and_line(source: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        start(recipe_of(tmp_path, source))
    assert "trainer/" not in str(error.value)
    assert len(str(error.value).splitlines()) <= 4


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_that_hooks_compute_can_be_trained(tmp_path: Path) -> None:
    source = LINEAR.replace("nn.Linear(width, num_classes)", "nn.utils.weight_norm(nn.Linear(width, num_classes))")
    copy.deepcopy(start(recipe_of(tmp_path, source)).network)


def test_dropout_becomes_reproducible_and_other_random_numbers_are_told(tmp_path: Path) -> None:
    lines: list[str] = []
    dropouts = LINEAR.replace("nn.ReLU()", "nn.Dropout2d(0.2), nn.ReLU()").replace(
        "self.head = ", "self.dropout = nn.Dropout(0.5)\n        self.head = "
    )
    twice = dropouts.replace("self.head(features)", "self.head(self.dropout(self.dropout(features)))")
    network = start(recipe_of(tmp_path, twice), lines=lines).network
    assert [(each.rate, each.layer, each.dims) for each in dropout_layers(network)] == [(0.2, 0, 2), (0.5, 1, None)]
    assert lines == []
    own = LINEAR.replace("self.head(features)", "self.head(nn.functional.dropout(features, training=self.training))")
    start(recipe_of(tmp_path, own), lines=lines)
    assert "draws random numbers of its own" in lines[0]


def test_the_digest_covers_what_the_file_imports_beside_it_and_a_run_keeps_a_copy(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    (source / "parts").mkdir(parents=True)
    (source / "parts" / "__init__.py").write_text("from .layers import WIDTH\n")
    (source / "parts" / "layers.py").write_text("WIDTH = 8\n")
    (source / "unrelated.py").write_text("")
    recipe = recipe_of(source, "def MyNet():\n    from parts import WIDTH\n    return nn.Linear(WIDTH, 5)")
    recipe = with_files(recipe)
    assert [path.name for path in imported_beside(source / "my_net.py")] == ["__init__.py", "layers.py"]
    keep_network(recipe, run)
    recorded = without_paths(recipe)
    assert recorded.network == "my_net.py:MyNet"
    assert find_network(recorded, run).network == f"{run / 'network' / 'my_net.py'}:MyNet"
    (source / "parts" / "layers.py").write_text("WIDTH = 9\n")
    assert with_files(recipe).file_sha256["network"] != recipe.file_sha256["network"]
    (run / "network" / "parts" / "layers.py").write_text("WIDTH = 9\n")
    with pytest.raises(ConfigError, match="is not the network that was trained: restore the files of this run"):
        find_network(recorded, run)
