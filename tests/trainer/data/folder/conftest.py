"""Fixtures: a folder of images, and a function that loads one."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.data.folder.image_files import Load, put_class
from trainer.data import Dataset, load_dataset
from trainer.data.folder.options import FolderOptions


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of ten images, without a test folder."""
    put_class(tmp_path / "images" / "cat", 10, 50)
    put_class(tmp_path / "images" / "dog", 10, 200)
    return tmp_path / "images"


@pytest.fixture
def load(tmp_path: Path, logged: list[str]) -> Load:
    def load_folder(path: Path, image_size: int | None = None, **options: Any) -> Dataset:
        opened = FolderOptions(image_size=image_size, **options)
        return load_dataset(f"folder:{path}", tmp_path / "data", opened, log=logged.append)

    return load_folder
