"""`pytest -m gpu` runs on a machine that has torch, pytest and little else."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import ROOT, clean_environment, pytest_ignore_collect
from tests.requirements_of import missing_packages

WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
NAMES = ("onnxruntime", "onnx", "grpc", "tritonclient", "starlette", "uvicorn", "pygrpc_native")


@pytest.mark.slow
def test_gpu_tests_are_collected_without_the_packages_of_the_server(tmp_path: Path) -> None:
    """The files that need them are named at the end, and all others are collected and skipped without a GPU.

    A file is recognised by the words `mark.gpu` in it.
    """
    command = [sys.executable, "-c", WITHOUT.format(names=NAMES), f"--data-dir={tmp_path}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out, without the packages onnx, onnxruntime: tests/serving/backends/test_onnx.py" in done.stdout
    assert "tests/serving/frontends" not in done.stdout
    assert "test_torch_instance.py" in done.stdout
    assert "test_branches.py" in done.stdout
    assert all(file.name in done.stdout for file in (ROOT / "tests").rglob("test_gpu_*.py"))
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped
    assert all("CUDA device" in line for line in skipped)


def test_a_folder_without_gpu_tests_is_left_out_before_its_conftest_is_imported(pytestconfig: pytest.Config) -> None:
    """Its packages may be there and not fit together: grpcio, and grpcio-reflection for a newer one."""
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr="gpu"), stash=pytest.Stash())
    assert pytest_ignore_collect(ROOT / "tests/serving/frontends", config)
    assert pytest_ignore_collect(ROOT / "tests/serving/backends/test_python.py", config)
    assert pytest_ignore_collect(ROOT / "tests/serving/backends", config) is None
    assert pytest_ignore_collect(ROOT / "tests/serving/frontends", pytestconfig) is None


def test_what_is_imported_when_a_file_is_loaded_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("import no_such_package.part\nimport json\ndef late():\n    import another_one\n")
    assert missing_packages(file) == ["no_such_package"]
    file = tmp_path / "test_other.py"
    file.write_text("from tests.requirements_of import missing_packages\nimport pytest\n")
    assert missing_packages(file) == []
