"""Errors are one line, whatever is in the names of files."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "command",
    [
        ("serving", "--model-repository", "no\nsuch"),
        ("convoy", "models", "list", "--model-repository", "no\nsuch"),
    ],
)
def test_an_error_about_a_name_with_a_line_break_is_one_line(command, tmp_path):
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert "no\N{REPLACEMENT CHARACTER}such" in line
