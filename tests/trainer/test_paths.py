"""Paths that names and the environment stand for."""

from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.paths import check_model_name, default_data_dir, default_model_name, expand_home, full_name, image_folder


def test_the_default_folder_follows_the_desktop_convention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "convoy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so not valid")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".cache" / "convoy"


def test_without_a_home_directory_only_the_use_of_the_default_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user id without an entry
    assert default_data_dir() == Path("~/.cache/convoy")
    assert expand_home(tmp_path) == tmp_path
    with pytest.raises(ConfigError, match="this user has no home directory: give --data-dir"):
        expand_home(default_data_dir())
    assert image_folder("folder:~/pets") == Path.cwd() / "~/pets"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home(Path("~/data")) == tmp_path / "data"


def test_a_folder_has_a_path_and_other_names_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert image_folder("mnist") is None
    assert image_folder("folder:pets/") == tmp_path / "pets"
    assert full_name("folder:./pets") == f"folder:{tmp_path}/pets"
    assert full_name("mnist") == "mnist"
    with pytest.raises(ConfigError, match="folder: needs a path"):
        image_folder("folder:")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-photos", "my-photos"),
        ("My Photos (2026)", "My-Photos-2026"),
        ("Fotos für Oma", "Fotos-fur-Oma"),
        (".hidden", "hidden"),
        ("v1.2_b", "v1.2_b"),
        ("写真", "cifar10-small"),
    ],
)
def test_a_model_has_the_name_of_its_folder_of_images(folder: str, name: str) -> None:
    """As far as it is valid: models are folders, and parts of addresses."""
    assert default_model_name(f"folder:/data/{folder}", "cifar10-small") == name
    check_model_name(name)
    assert default_model_name("mnist", "mnist-fast") == "mnist-fast"


@pytest.mark.parametrize("name", ["", "a b", "-a", "../a", "a/b", "ä"])
def test_other_names_of_models_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a model name consists of letters, digits"):
        check_model_name(name)
