"""Which models take image files, and which versions are refused for how their images were prepared."""

import json
from pathlib import Path
from typing import Any

import pytest

from convoy.preprocessing import PREPROCESSING, Preprocessing
from serving.client.images import ImageInput
from serving.errors import LoadError
from serving.models.config import check_supported, read_config
from serving.models.images import ImageTensor, find_image_tensor
from serving.models.loader import LoadSettings, Model, load_version
from serving.models.manifest import read_manifest
from tests.serving.fake_repository import tensor
from tests.serving.image_models import write_colours
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version

OLD = {"resize": "shorter side, bilinear, antialiased", "crop": "center", "significant_bits": 12}


def load(folder: Path) -> Model:
    model = load_version(folder, 1, read_config(folder), LoadSettings(device="cpu", num_threads=1))
    model.batcher.close()
    return model


@pytest.mark.parametrize("section", [Preprocessing("pad", 12).to_json(), OLD], ids=["new", "0.1"])
def test_the_manifest_says_how_images_are_prepared_and_the_configuration_tells_clients(
    tmp_path: Path, section: Any
) -> None:
    model = load(write_colours(tmp_path, preprocessing=section))
    expected = Preprocessing.from_json(section)
    assert model.images == ImageTensor("images", (3, 4, 4), 8, expected)
    assert json.loads(model.spec.config.parameters[PREPROCESSING].string_value) == expected.to_json()
    seen = ImageInput.from_config(model.spec.config)
    assert (seen.preprocessing, seen.takes_files) == (expected, True)
    assert check_supported(model.spec.config) == [], "a client may send this configuration back"


def test_images_that_were_prepared_in_another_way_are_refused(tmp_path: Path) -> None:
    other = Preprocessing().to_json() | {"revision": 9, "sha256": "ab" * 32}
    with pytest.raises(LoadError, match=r"manifest\.json: the model's images were prepared .*revision 9.*; export"):
        load(write_colours(tmp_path, preprocessing=other))
    with pytest.raises(LoadError, match=r"manifest\.json cannot be read: "):
        load(write_colours(tmp_path, "wrong", preprocessing=["fit"]))


def test_without_a_section_a_model_takes_no_files(tmp_path: Path) -> None:
    write_config(tmp_path / "m", SCALE_CONFIG)
    folder = write_version(tmp_path / "m", 1, scale(3), manifest={})
    assert read_manifest(folder).preprocessing is None
    assert load(tmp_path / "m").images is None


def test_other_inputs_than_images_take_no_files(tmp_path: Path) -> None:
    spec = load(write_colours(tmp_path)).spec
    for inputs in (
        (tensor("a", "FP32", -1, 3, 4, 4),),
        (tensor("a", "UINT8", -1, 2, 4, 4),),
        (tensor("a", "UINT8", -1, 3, -1, 4),),
        (tensor("a", "UINT8", -1, 3, 4),),
        (tensor("a", "UINT8", -1, 3, 4, 4), tensor("b", "UINT8", -1, 3, 4, 4)),
    ):
        object.__setattr__(spec, "inputs", inputs)
        assert find_image_tensor(spec, Preprocessing()) is None
