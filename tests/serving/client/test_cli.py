"""The client's command line: output, errors and exit codes."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from serving.client import cli
from serving.client.cli import ClassifyConfig, ConnectConfig, StatusConfig, main
from tests.conftest import clean_environment
from tests.serving.fake_server import Failure, FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `black.png`, `deep/white.JPG` and a text file."""
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "black.png")
    Image.fromarray(np.full((28, 28), 255, np.uint8)).save(tmp_path / "deep" / "white.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def run(*arguments: object) -> int:
    """Runs the command line. Returns its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def classify(server: FakeServer, *arguments: object) -> int:
    return run("classify", *arguments, "--model", "digits", "--target", server.target)


def test_classes_are_printed_as_a_table(server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(server, files / "black.png", "--top-k", "2") == 0
    wide = len(f"{files}/black.png") + 2
    assert capsys.readouterr().out.splitlines() == [
        f"{'file':{wide}}label        probability",
        f"{files}/black.png  1            1.0000".replace("1            1.0", "light: very  0.0"),
        f"{files}/black.png  1            1.0000",
    ]


def test_odd_names_stay_on_their_lines(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "a\n\x1b\u200c\udcff.png"
    Image.new("L", (28, 28)).save(odd)
    assert classify(server, odd, "--top-k", "1") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"{tmp_path}/a\\n\\x1b\u200c\\udcff.png  light: very  0.0000"]
    assert run("classify", odd, "--model", "\udcff", "--target", server.target) == 2
    assert one_error(capsys).startswith(r"one of '\udcff'")


def test_json_has_one_line_per_image(server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(server, files, "--json", "--top-k", "1") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {
            "file": str(files / name),
            "predictions": [{"index": 0, "label": "light: very", "probability": probability}],
            "warning": None,
        }
        for name, probability in (("black.png", 0.0), ("deep/white.JPG", 1.0))
    ]


def test_a_bad_image_is_named_and_the_others_are_classified(
    server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "empty").mkdir()
    paths = [files / "none.png", files / "black.png", files / "notes.txt", files / "empty"]
    assert classify(server, *paths) == 1
    captured = capsys.readouterr()
    assert f"{files}/black.png" in captured.out
    errors = captured.err.splitlines()
    assert errors[0] == f"error: {files}/none.png: no such file"
    assert errors[1].startswith(f"error: {files}/notes.txt: cannot be read as an image: ")
    assert errors[2:] == [f"error: {files}/empty: no images in this folder"]


def test_more_files_than_one_batch_of_decoded_images(
    server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.config.max_batch_size = 100
    assert classify(server, *[files / "black.png"] * 600, "--json") == 0
    assert len(capsys.readouterr().out.splitlines()) == 600
    assert sum(infer.inputs[0].shape[0] for infer in server.infers) == 600


def test_what_has_been_classified_is_shown_when_the_server_fails(
    server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_BATCH_FILES", 1)
    server.failures = [None, None, Failure(grpc.StatusCode.INTERNAL, "the model broke")]  # configuration, one, two
    assert classify(server, files / "black.png", files / "deep/white.JPG", "--top-k", "1") == 3
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["file", f"{files}/black.png"]
    assert captured.err == "error: the model broke\n"


def test_a_name_that_no_file_can_have(server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify(server, "a" * 5000, files / "black.png", "--json") == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("aaa: cannot be read as an image: File name too long\n")
    assert len(captured.out.splitlines()) == 1


def test_an_inverted_image_is_warned_of(server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = np.full((28, 28), 250, np.uint8)
    scan[5:20, 12:15] = 10
    Image.fromarray(scan).save(files / "scan.png")
    assert classify(server, files / "scan.png") == 0
    assert capsys.readouterr().err == (
        f"warning: {files}/scan.png looks inverted: dark on a light ground, and MNIST and its like are light on dark; "
        "--invert inverts the image\n"
    )
    assert classify(server, files / "scan.png", "--invert", "--json") == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert json.loads(captured.out)["predictions"][0]["probability"] < 0.2, "the inverted image was sent"


def test_status_shows_the_server_and_its_models(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "--target", server.target) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"fake 9 at {server.target}: not ready",
        "model   version  state        reason",
        "digits  3        READY",
        "torn             UNAVAILABLE  half a file",
    ]


def test_the_token_is_read_from_a_file(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("sesame\n")
    assert run("status", "--target", server.target, "--token-file", tmp_path / "token") == 0
    assert server.metadata[0]["authorization"] == "Bearer sesame"
    capsys.readouterr()


def test_a_token_over_plain_text_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfsesame\r\n")
    remote, token = "serving.example.org", tmp_path / "token"
    ConnectConfig(target=remote, token_file=token, tls=True).client().close()
    ConnectConfig(target="127.0.0.1:1", token_file=token).client().close()
    ConnectConfig(target=remote).client().close()
    assert capsys.readouterr().err == ""
    ConnectConfig(target=remote, token_file=token).client().close()
    warning = f"warning: the token travels to {remote} in plain text; --tls encrypts it\n"
    assert capsys.readouterr().err == warning


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").strip()


@pytest.mark.parametrize("content", [None, "", "grün\n", "a b\n", "old name=a scopes=infer\nnew name=a scopes=infer\n"])
def test_an_invalid_token_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    if content is not None:
        (tmp_path / "token").write_text(content)
    assert run("status", "--token-file", tmp_path / "token") == 2
    assert str(tmp_path / "token") in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "0", "a.png"], "--top-k 0: must be at least 1"),
        (["--timeout-s", "0", "a.png"], "--timeout-s 0: must be positive"),
        ([], "no images given"),
    ],
)
def test_invalid_values_are_rejected(
    server: FakeServer, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert classify(server, *arguments) == 2
    assert one_error(capsys) == message


def test_an_unknown_model(server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.failures = [Failure(grpc.StatusCode.NOT_FOUND, "no model 'digits'")]
    assert classify(server, files) == 2
    assert one_error(capsys) == "no model 'digits'"


def test_a_failing_server(server: FakeServer, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.failures = [Failure(grpc.StatusCode.INTERNAL, "the model broke")]
    assert classify(server, files) == 3
    assert one_error(capsys) == "the model broke"


@pytest.mark.parametrize(
    ("arguments", "code", "output"),
    [
        ([], 2, "usage: python -m serving.client VERB"),
        (["--help"], 0, "classify"),
        (["sing"], 2, "error: no verb 'sing'"),
        (["classify", "--help"], 0, "Exit codes: 0 success"),
        (["classify", "a.png"], 2, "--model"),
        (["classify", "a.png", "--modle", "m"], 2, "--modle"),
    ],
)
def test_usage(arguments: list[str], code: int, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == code
    assert output in "".join(capsys.readouterr())


@pytest.mark.parametrize("config", [ClassifyConfig, StatusConfig])
def test_the_help_shows_each_option_with_one_default(config: type, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config.__name__.removesuffix("Config").lower(), "--help") == 0
    text = " ".join(re.sub("[╭─╮│╰╯]", " ", capsys.readouterr().out).split())
    num_options = len({*config.__slots__, *ConnectConfig.__slots__} - {"connect"})
    assert text.count("(default: ") + text.count("(required)") == num_options
    for wrong in ("None", "(default: )", "(default: '')"):
        assert wrong not in text


# ---- As a process ----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "serving.client"]


def test_an_unreachable_server_is_reported_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and it does not listen
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [*COMMAND, "status", "--target", target]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr == (
        f"error: no server responds at {target}: Connection refused; "
        "start it with convoy serve --model-repository models\n"
    )


def test_a_terminal_gets_a_table_with_borders(server: FakeServer, files: Path) -> None:
    controller, terminal = pty.openpty()
    environment = clean_environment() | {"TERM": "xterm", "COLUMNS": "200"}
    arguments = ["classify", "black.png", "--model", "digits", "--target", server.target]
    command = subprocess.Popen([*COMMAND, *arguments], stdout=terminal, cwd=files, env=environment)
    os.close(terminal)
    assert command.wait(60) == 0
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert "┏━" in shown
    assert shown.count("black.png") == 1, "the name of a file is shown once for all of its classes"
    assert "light: very" in shown


def test_ctrl_c_is_quiet(server: FakeServer, files: Path) -> None:
    server.delay_s = 60
    command = subprocess.Popen(
        [*COMMAND, "classify", str(files), "--model", "digits", "--target", server.target], stderr=subprocess.PIPE
    )
    while not server.infers:
        assert command.poll() is None
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    assert (command.returncode, errors) == (130, b"")


def test_a_closed_pipe_ends_the_command_quietly(server: FakeServer, files: Path) -> None:
    classifying = ["classify", str(files), "--model", "digits", "--target", server.target, "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    for arguments in (classifying, ["--help"], ["classify", "--help"]):
        ended = subprocess.run([*COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
        assert (ended.returncode, ended.stderr) == (141, b"")
    unknown_verb = subprocess.run([*COMMAND, "sing"], stdout=writing, stderr=writing, timeout=60, check=False)
    assert unknown_verb.returncode == 2, "an error that cannot be printed keeps its exit code"
    os.close(writing)
