"""Backends are found by entry point, those of other packages too."""

import sys
from importlib.metadata import entry_points

import numpy as np
import pytest

from serving.backends import registry
from serving.errors import LoadError
from serving.models.config import read_config
from serving.models.loader import LoadSettings, load_version
from tests.serving.model_files import write_config, write_version
from tests.serving.models.one_row import infer

PACKAGE = '''
"""A backend with two methods."""
filename = "model.txt"

def load(file, spec, gpu, num_threads):
    return Scale(float(file.read_text()))

class Scale:
    def __init__(self, factor):
        self.factor = factor

    def run(self, inputs):
        return [inputs[0] * inputs[0].dtype.type(self.factor)]
'''
CONFIG = """
backend: "scale" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
"""
X = np.array([[1, 2, 3]], np.float32)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package of one module, with the metadata that a wheel leaves."""

    def install_it(name, source, entry):
        site = tmp_path / f"site-{name}"
        site.mkdir()
        (site / f"{name}.py").write_text(source)
        metadata = site / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[convoy.backends]\n{entry}\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)
        registry._others.cache_clear()

    yield install_it
    registry._others.cache_clear()


@pytest.fixture
def model(tmp_path):
    write_config(tmp_path / "m", CONFIG)
    write_version(tmp_path / "m", 1, b"2.5", filename="model.txt")
    return tmp_path / "m"


def load(folder, settings=LoadSettings(device="cpu", num_threads=1)):  # noqa: B008
    return load_version(folder, 1, read_config(folder), settings)


def test_a_backend_of_another_package_serves(model, install):
    install("scale_backend", PACKAGE, "scale = scale_backend")
    loaded = load(model)
    assert infer(loaded, X) == [[[2.5, 5, 7.5]]]
    assert (loaded.spec.backend, loaded.spec.platform, loaded.spec.filename) == ("scale", "", "model.txt")
    loaded.batcher.close()


def test_our_backends_are_entry_points_too():
    points = {point.name: point for point in entry_points(group=registry.GROUP)}
    assert {name: points[name].load() for name in ("onnx", "torchscript", "pt2", "python")} == {
        own.name: own for own in registry.OWN
    }


@pytest.mark.parametrize(
    ("source", "entry", "reason"),
    [
        (
            PACKAGE,
            "other = bad",
            "'scale' is not supported: this server has onnxruntime, pytorch, python, other$",
        ),
        ("1 / 0", "scale = bad", r"backend 'scale' \(bad\) cannot be imported: division by zero"),
        ("", "scale = bad", r"backend 'scale' \(bad\) must have a function load\(\) and a string filename"),
        (PACKAGE + "runs_code = True", "scale = bad", "model.txt runs code of its own: start the server with"),
        (PACKAGE.replace("model.txt", "no.txt"), "scale = bad", "there is no file 'no.txt' in version 1"),
    ],
)
def test_an_unusable_backend_is_refused_in_one_line(model, install, source, entry, reason):
    install("bad", source, entry)
    with pytest.raises(LoadError, match=reason):
        load(model)


def test_two_packages_with_a_backend_of_one_name_are_named(model, install):
    install("first", PACKAGE, "scale = first")
    install("second", PACKAGE, "scale = second")
    with pytest.raises(LoadError, match="in several packages: uninstall all but one of first, second"):
        load(model)
