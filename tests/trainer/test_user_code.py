"""Objects from the user's files, and recipes among them: digests, and errors that name file and line."""

import hashlib
from pathlib import Path

import pytest

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.recipes import RECIPES
from trainer.recipes.files import load_recipe
from trainer.user_code import load_object, user_errors

RECIPE = """
from dataclasses import replace
from trainer.recipes import RECIPES

recipe = replace(RECIPES["mnist"], name="mine", epochs=2, widths=[3, 4])
def make():
    return recipe
def fails():
    return replace(recipe, epoch=3)
three = 3
unnamed = replace(recipe, name="my recipe")
wrong = replace(recipe, dataset=7)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_recipe.py"
    path.write_text(RECIPE)
    return path


def test_an_object_comes_with_the_digest_of_its_file(file: Path) -> None:
    found, sha256 = load_object(f"{file}:recipe.name")
    assert (found, sha256) == ("mine", hashlib.sha256(RECIPE.encode()).hexdigest())
    assert load_object(f"{file}:make")[0] is load_object(f"{file}:make")[0]  # the file is run once
    file.write_text(RECIPE.replace("mine", "other"))
    assert load_object(f"{file}:recipe.name")[0] == "other"


@pytest.mark.parametrize(
    ("source", "reference", "message"),
    [
        ("class MyNet: ...", "{}:MyNetz", "{}: no object 'MyNetz': did you mean MyNet?"),
        ("def f(:\n  pass", "{}:f", "{}, line 1: SyntaxError: invalid syntax"),
        ("\nimport nothing_here", "{}:f", "{}, line 2, in <module>: ModuleNotFoundError: No module named"),
        (
            "def g():\n  1 / 0\ng()",
            "{}:f",
            "{}, line 2, in g: ZeroDivisionError: division by zero\n  1 / 0\ncalled from",
        ),
        ("raise SystemExit(3)", "{}:f", "{}, line 1, in <module>: SystemExit: 3"),
        ("", "{}", "{}: name a file and an object of it, such as {}:NAME"),
    ],
)
def test_errors_name_file_and_line(source: str, reference: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_object(reference.format(path))
    assert str(caught.value).startswith(message.format(path, path))
    assert len(str(caught.value).splitlines()) <= 4


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/nothing\.py: No such file"):
        load_object(f"{tmp_path}/nothing.py:f")


def test_errors_of_a_call_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def f():\n  raise ValueError('two\\nlines')")
    found, _ = load_object(f"{path}:f")
    with pytest.raises(ConfigError, match=r"own\.py, line 2, in f: ValueError: two lines"), user_errors(f"{path}:f"):
        found()


@pytest.mark.parametrize("name", ["recipe", "make"])
def test_a_recipe_of_the_user_is_a_recipe(name: str, file: Path) -> None:
    """A list becomes the tuple that the field declares; the file belongs to the run's identity."""
    recipe = TrainConfig(recipe=f"{file}:{name}", set=("augment.shift=1",)).resolve()
    assert (recipe.name, recipe.epochs, recipe.widths, recipe.augment.shift) == ("mine", 2, (3, 4), 1)
    assert recipe.file_sha256 == {"recipe": hashlib.sha256(RECIPE.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", r"my_recipe\.py:three is of type int: it must be a Recipe"),
        ("fails", r"my_recipe\.py, line 9, in fails: TypeError: .*unexpected keyword argument 'epoch'"),
        ("unnamed", r"the recipe's name 'my recipe' must consist of letters"),
        ("wrong", r"my_recipe\.py:wrong: dataset = 7: must be a text"),
    ],
)
def test_a_faulty_recipe_of_the_user_is_told(name: str, message: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(f"{file}:{name}")


def test_a_recipe_in_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[recipe]\nname = 'mine'\n")
    with pytest.raises(ConfigError, match=r"own\.toml, \[recipe\]: summary is missing: must be a text"):
        load_recipe(str(path))
    path.write_text("recipe = 'mnist'\n")
    with pytest.raises(ConfigError, match=r"own\.toml has no table \[recipe\]"):
        load_recipe(str(path))
    assert load_recipe("mnist") == RECIPES["mnist"]
