"""A model in Python runs its own code, if the operator allows it, and leaves its folder as it is."""

import sys

import numpy as np
import pytest

from serving.errors import LoadError
from serving.models.config import read_config
from serving.models.loader import LoadSettings, load_version
from tests.serving.model_files import write_config, write_version
from tests.serving.models.one_row import infer

CONFIG = """
backend: "python" max_batch_size: 4 parameters { key: "factor" value { string_value: "5" } }
input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
"""
MODEL = """
from . import helper

def load(model):
    global factor
    assert (model.name, model.version, model.gpu, model.num_threads) == ("m", "1", None, 1)
    factor = float(model.parameters["factor"]) * float((model.folder / "weights.txt").read_text())

def run(batch):
    return {"y": helper.scale(batch["x"], factor), "more": None}
"""
HELPER = """
def scale(x, factor):
    return (x * factor).astype("float32")
"""
X = np.array([[1, 2, 3]], np.float32)
ALLOWED = LoadSettings(device="cpu", num_threads=1, allow_model_code=True)


@pytest.fixture
def version(tmp_path):
    """A version with a model in Python, a module and a file beside it."""
    write_config(tmp_path / "m", CONFIG)
    folder = write_version(tmp_path / "m", 1, MODEL.encode(), filename="model.py")
    (folder / "helper.py").write_text(HELPER)
    (folder / "weights.txt").write_text("2")
    return folder


@pytest.fixture
def load():
    """Loads a version, and closes it at the end of the test."""
    models = []

    def load_it(version, settings=ALLOWED):
        models.append(load_version(version.parent, int(version.name), read_config(version.parent), settings))
        return models[-1]

    yield load_it
    for model in models:
        model.batcher.close()


def test_a_model_answers_with_its_parameters_and_the_files_beside_it(version, load):
    before, modules = sorted(version.iterdir()), set(sys.modules)
    model = load(version)
    assert infer(model, X) == [[[10, 20, 30]]]
    assert (model.spec.backend, model.spec.filename) == ("python", "model.py")
    model.batcher.close()
    assert sorted(version.iterdir()) == before, "no compiled files"
    assert not {name for name in set(sys.modules) - modules if name.startswith("convoy_model")}


def test_instances_share_no_globals_and_new_source_is_read(version, load):
    write_config(version.parent, CONFIG + "instance_group { count: 2 kind: KIND_CPU }")
    model = load(version)
    one, other = (instance.opened._run.__globals__ for instance in model.batcher._backends)
    assert one is not other
    (version / "helper.py").write_text(HELPER.replace("* factor", "+ factor"))
    assert infer(load(version), X) == [[[11, 12, 13]]]
    assert infer(model, X) == [[[10, 20, 30]]], "the loaded version keeps its code"


def test_code_runs_only_if_the_operator_allows_it(version, load):
    (version / "model.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(LoadError, match=r"^model\.py runs code of its own: start the server with --allow-model-code "):
        load(version, LoadSettings(device="cpu", num_threads=1))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", r"model\.py has no function run\(batch\)"),
        ("1 +", r"model\.py cannot be loaded: SyntaxError: invalid syntax"),
        (
            "import no_such_library",
            r"model\.py cannot be loaded: ModuleNotFoundError: No module named",
        ),
        ("raise SystemExit(3)", r"model\.py cannot be loaded: SystemExit: 3"),
        ("def load(model): {}['weights']\ndef run(batch): pass", r"model\.py cannot be loaded: KeyError: 'weights'"),
        ("def run(batch): return [batch['x']]", r"run\(\) of model\.py must return arrays by name, and returned list"),
        ("def run(batch): return {'z': batch['x']}", r"run\(\) of model\.py returned \['z'\], but not 'y'"),
        ("def run(batch): return {'y': batch['x'][:1]}", r"'y' is float32 of shape \[1, 3\]"),
        ("def run(batch): return {'y': batch['x'].tolist()}", r"'y' is float64"),
    ],
)
def test_a_faulty_model_is_rejected_in_one_line(version, load, source, reason):
    (version / "model.py").write_text(source)
    with pytest.raises(LoadError, match=reason) as raised:
        load(version)
    assert "\n" not in str(raised.value)
