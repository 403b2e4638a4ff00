"""A faulty command line is one line and exit code 2, whichever command it is of."""

import os
import re

import pytest

from convoy import cli


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("train --epoch 3", "unrecognized options: --epoch, 3: did you mean --epochs?"),
        ("evaluate", "missing RUN: see convoy evaluate --help"),
        (f"evaluate a runs/{'b' * 200}", f"unrecognized options: runs/{'b' * 200}: see convoy evaluate --help"),
        ("jobs show seven", "JOB: expected a whole number, got 'seven': see convoy jobs show --help"),
        ("train --epochs x", "--epochs: expected a whole number, got 'x': see convoy train --help"),
        ("train --epochs", "--epochs needs a value: see convoy train --help"),
        (
            "serve --model-repository m --allow-model",
            "unrecognized options: --allow-model: did you mean --allow-model-code",
        ),
        ("jobs list --tok x", "unrecognized options: --tok, x: did you mean --token-file?"),
        ("models list --timeout-s x", "--timeout-s: expected a number, got 'x': see convoy models list --help"),
        (
            "serve --model-repository m --port 1",
            "unrecognized options: --port, 1: did you mean --grpc-port or --http-port",
        ),
        (
            "classify --modl m a.png",
            "missing --model NAME, and unrecognized --modl m a.png: see convoy classify --help",
        ),
        (
            "train --seed -1" + 20 * "0",
            "--seed -1" + 20 * "0" + ": must be a number of 64 bits, at most 9223372036854775",
        ),
        (f"study capacity --widths 8 1{20 * '0'}", f"--widths 1{20 * '0'}: must be a number of 64 bits"),
        (f"jobs show 1{20 * '0'}", f"job 1{20 * '0'}: must be a number of 64 bits"),
        ("models pin", "missing NAME and VERSION: see convoy models pin --help"),
    ],
)
def test_a_faulty_command_line_is_one_line(command: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run(command.split())
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"error: {line}")


@pytest.mark.parametrize("columns", ["1", "5", "20"])
def test_help_ends_in_the_narrowest_terminal(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit, match="0"):
        cli.run(["compare", "--help"])
    shown = capsys.readouterr().out
    assert "usage: convoy compare" in shown
    assert re.search(r"^.{40}$", shown, re.MULTILINE)
    assert os.environ["COLUMNS"] == columns
