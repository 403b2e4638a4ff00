"""Tests that ONNX Runtime is told to send no usage data, before anything can import it."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

VARIABLE = "ORT_DISABLE_TELEMETRY"


@pytest.mark.parametrize("package", ["serving", "trainer"])
@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")], ids=["by default", "as the user says"])
def test_onnx_runtime_sends_nothing(package: str, given: str | None, kept: str) -> None:
    others = {name: value for name, value in os.environ.items() if name != VARIABLE}
    code = f"import {package}, os, sys; print(os.environ['{VARIABLE}'], 'onnxruntime' in sys.modules)"
    environment = others if given is None else {**others, VARIABLE: given}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().split() == [kept, "False"]
