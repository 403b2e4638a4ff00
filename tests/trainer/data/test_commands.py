"""`python -m trainer data`: output and exit codes."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, clean_environment, wait_for
from tests.trainer.data.faulty_server import FaultyServer, stalled
from tests.trainer.data.folder.image_files import put_class
from tests.trainer.data.tiny_dataset import idx_files, make_content, make_dataset_info
from trainer.data import commands, datasets
from trainer.errors import ConfigError, DataError
from trainer.paths import default_data_dir

CONTENT = make_content()


@pytest.fixture(autouse=True)
def tiny_datasets(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One published data set, on a server, and one that comes with the package."""
    server.put_files(idx_files(CONTENT))
    sets = {"tiny": make_dataset_info(server.mirror()), "synthetic": datasets.SYNTHETIC}
    monkeypatch.setattr(datasets, "DATASETS", sets)
    monkeypatch.setattr(commands, "DATASETS", sets)


def run(*arguments: str | Path) -> int:
    return commands.run([str(argument) for argument in arguments])


def test_list_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--data-dir", tmp_path) == 0
    before = capsys.readouterr().out.splitlines()
    assert before[0].split() == ["name", "classes", "train", "test", "image", "size", "where"]
    assert before[1].split() == ["tiny", "2", "40", "20", "1x8x8", "0.0", "MB", "not", "fetched"]
    run("fetch", "tiny", "--data-dir", tmp_path)
    capsys.readouterr()
    run("list", "--data-dir", tmp_path)
    assert capsys.readouterr().out.splitlines()[1].endswith(str(tmp_path / "tiny" / "tiny.pt"))


def test_fetch_verify_damage_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fetch", "tiny", "synthetic", "--data-dir", tmp_path) == 0
    assert "tiny: ready" in capsys.readouterr().out
    assert run("verify", "--data-dir", tmp_path) == 0
    assert capsys.readouterr().out.count(": good, sha256 ") == 2
    path = tmp_path / "tiny" / "tiny.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert run("verify", "--data-dir", tmp_path) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: DAMAGED: ")
    assert lines[0].endswith("convoy data fetch tiny")
    assert lines[1].startswith("synthetic: good")
    assert run("fetch", "tiny", "--data-dir", tmp_path) == 0
    assert run("verify", "tiny", "--data-dir", tmp_path) == 0


def test_verify_of_missing_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "tiny", "--data-dir", tmp_path) == 3
    assert capsys.readouterr().out == "tiny: not fetched\n"
    assert run("verify", "--data-dir", tmp_path) == 3
    assert capsys.readouterr().out == f"{tmp_path}: no data set to verify\n"


def test_a_folder_is_fetched_listed_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label, name in enumerate("ab"):
        (tmp_path / "x" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("L", (9, 7), 5 * label + index).save(tmp_path / "x" / name / f"{index}.bmp")
    name = f"folder:{tmp_path / 'x'}"
    assert run("fetch", name, "--image-size", "6", "--data-dir", tmp_path) == 0
    run("list", "--data-dir", tmp_path)
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:5] == [name, "2", "8", "2", "1x6x6"]
    assert run("verify", name, "--data-dir", tmp_path) == 0
    path = next(tmp_path.glob("folders/*/*.pt"))
    path.write_bytes(b"")
    assert run("verify", "--data-dir", tmp_path) == 3
    run("list", "--data-dir", tmp_path)
    assert "(damaged)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has not been decoded yet"):
        run("verify", "folder:/other", "--data-dir", tmp_path)


def test_a_streamed_folder_is_listed_and_its_files_are_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_class(tmp_path / "x" / "a", 5)
    put_class(tmp_path / "x" / "b", 5)
    name = f"folder:{tmp_path / 'x'}"
    assert run("fetch", name, "--source", "streamed", "--data-dir", tmp_path) == 0
    run("list", "--data-dir", tmp_path)
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:2] + row[4:5] == [name, "2", "streamed"]
    assert int(row[2]) + int(row[3]) == 10
    assert [run("verify", *names, "--data-dir", tmp_path) for names in ([], [name])] == [0, 0]
    path = tmp_path / "x" / "b" / "002.png"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    assert run("verify", name, "--data-dir", tmp_path) == 3
    changed = f"{path} has other bytes than when it was indexed: restore it, or touch it to read it again"
    assert capsys.readouterr().out == f"{name}: DAMAGED: {changed}\n"
    next(tmp_path.glob("folders/*/*.index")).write_bytes(b"")
    assert run("verify", "--data-dir", tmp_path) == 3
    run("list", "--data-dir", tmp_path)
    assert "(damaged)" in capsys.readouterr().out


@pytest.mark.parametrize("opener", ["open_decoded", "open_index"])
def test_a_file_that_another_process_removes_is_left_out(
    opener: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder that has changed, the process that reads it again removes the files of before."""
    put_images(tmp_path / "x")
    name = f"folder:{tmp_path / 'x'}"
    open_file = getattr(commands, opener)

    def open_removed(path: Path, **options: Any) -> Any:
        path.unlink(missing_ok=True)
        return open_file(path, **options)

    monkeypatch.setattr(commands, opener, open_removed)
    for command in (["list"], ["verify"], ["verify", name]):
        for source in ("resident", "streamed"):
            run("fetch", name, "--source", source, "--image-size", "4", "--data-dir", tmp_path)
        capsys.readouterr()
        assert run(*command, "--data-dir", tmp_path) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(name)]
        assert len(lines) == 1
        assert ("streamed" if command == ["list"] else "indexed") in lines[0] or opener == "open_index"


def put_images(folder: Path) -> None:
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (9, 7), index).save(folder / name / f"{index}.png")


def test_a_folder_is_verified_in_all_sizes_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_images(tmp_path / "x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for size in ("4", "5", "6"):
        run("fetch", "folder:../x/", "--image-size", size, "--data-dir", tmp_path)
    middle = next(tmp_path.glob("folders/*/5-*.pt"))
    payload = torch.load(middle)
    payload["train_images"][0] += 1
    for damage in (lambda: torch.save(payload, middle), lambda: middle.write_bytes(b"")):
        damage()
        for names in (["folder:../x/"], [f"folder:{tmp_path / 'x'}"], ["folder:../elsewhere/../x"], []):
            capsys.readouterr()
            assert run("verify", *names, "--data-dir", tmp_path) == 3
            good, damaged, also_good = capsys.readouterr().out.splitlines()
            assert f"DAMAGED: {middle} is damaged" in damaged
            assert good.startswith(f"folder:{tmp_path / 'x'}: good, sha256 ")
            assert also_good.startswith(f"folder:{tmp_path / 'x'}: good, sha256 ")


def test_a_terminal_shows_full_names_and_paths(tmp_path: Path) -> None:
    names = ["photos [old]", "x[/b]", "a-rather-long-name" * 4]
    for name in names:
        put_images(tmp_path / name)
        run("fetch", f"folder:{tmp_path / name}", "--image-size", "4", "--data-dir", tmp_path / "data")
    reading, terminal = os.openpty()
    command = [sys.executable, "-m", "trainer", "data", "list", "--data-dir", str(tmp_path / "data")]
    environment = clean_environment() | {"COLUMNS": "90", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=terminal, stderr=subprocess.PIPE, check=False)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = b""
    with suppress(OSError):  # end of output
        while True:
            shown += os.read(reading, 1 << 16)
    os.close(reading)
    cells = [line.split("│") for line in shown.decode().splitlines() if line.startswith("│")]
    folded = ["".join(cell[column].strip(" ") for cell in cells) for column in (1, -2)]
    for name in names:
        assert f"folder:{tmp_path / name}".replace(" ", "") in folded[0].replace(" ", "")
    for path in tmp_path.glob("data/folders/*/*.pt"):
        assert str(path).replace(" ", "") in folded[1].replace(" ", "")


def test_import(tmp_path: Path, server: FaultyServer, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name, data in idx_files(CONTENT).items():
        (given / name).write_bytes(data)
    archive = tmp_path / "given.tgz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(given)
    for source, place in ((given, tmp_path / "one"), (archive, tmp_path / "two")):
        assert run("import", "tiny", source, "--data-dir", place) == 0
        assert f"taken from {source}, verified" in capsys.readouterr().out
        assert run("verify", "tiny", "--data-dir", place) == 0
    assert not server.requests


def test_import_of_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of the files is there"):
        run("import", "tiny", tmp_path / "empty", "--data-dir", tmp_path / "data")
    with pytest.raises(ConfigError, match="does not exist"):
        run("import", "tiny", tmp_path / "missing", "--data-dir", tmp_path)
    with pytest.raises(ConfigError, match="comes with the package"):
        run("import", "synthetic", tmp_path, "--data-dir", tmp_path)
    with pytest.raises(ConfigError, match="folder:/images needs no import"):
        run("import", "folder:/images", tmp_path, "--data-dir", tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tiny.lock"]


def test_a_typo_costs_no_download(tmp_path: Path, server: FaultyServer) -> None:
    with pytest.raises(ConfigError, match="did you mean tiny"):
        run("fetch", "tiny", "tinny", "--data-dir", tmp_path)
    with pytest.raises(ConfigError, match="name the data sets to fetch"):
        run("fetch", "--data-dir", tmp_path)
    with pytest.raises(ConfigError, match="--image-size is for folders"):
        run("fetch", "tiny", "--image-size", "32", "--data-dir", tmp_path)
    with pytest.raises(ConfigError, match="missing does not exist"):
        run("fetch", "tiny", f"folder:{tmp_path / 'missing'}", "--data-dir", tmp_path)
    (tmp_path / "one" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="one class only"):
        run("fetch", "tiny", f"folder:{tmp_path / 'one'}", "--data-dir", tmp_path)
    assert not server.requests


def test_the_help_explains_folders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("list", "--help")
    assert "PATH/train/<class>" in capsys.readouterr().out


def test_a_terminal_shows_tables_and_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    run("fetch", "tiny", "--data-dir", tmp_path)
    assert "tiny: ready" in capsys.readouterr().out
    run("list", "--data-dir", tmp_path)
    assert "synthetic" in capsys.readouterr().out


FETCH_TINY = """
import sys
from tests.trainer.data.tiny_dataset import GZ_NAMES, make_dataset_info
from trainer.cli import data_command
from trainer.data import commands, datasets
from trainer.data.published.sources import Mirror

commands.DATASETS = datasets.DATASETS = {"tiny": make_dataset_info(Mirror(sys.argv[1], GZ_NAMES))}
data_command(["fetch", "tiny", "--data-dir", sys.argv[2]], prog="convoy data")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_fetch_prints_a_line_and_leaves_nothing(
    number: signal.Signals, code: int, tmp_path: Path, server: FaultyServer
) -> None:
    for name, data in idx_files(CONTENT).items():
        server.routes[f"/{name}.gz"] = stalled(data, len(data) // 2, server.released, threading.Event())
    command = [sys.executable, "-c", FETCH_TINY, server.url, str(tmp_path)]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for("a download", lambda: bool(server.requests), lambda: process.poll() is not None)
        wait_for("an unfinished folder", lambda: bool(list((tmp_path / "tiny").glob(".tmp-*"))))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, f"{number.name}: stopped\n".encode())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.lock"]


def test_without_a_home_directory_help_works_and_the_default_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user id without an entry
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run("list", "--help")
    assert ended.value.code == 0
    for arguments in (["list"], ["fetch", "synthetic"], ["verify"], ["import", "tiny", "."]):
        with pytest.raises(ConfigError, match="this user has no home directory: give --data-dir"):
            run(*arguments)
    assert run("list", "--data-dir", tmp_path / "data") == 0
    with pytest.raises(ConfigError, match="no home directory: give --data-dir"):
        datasets.load_dataset("synthetic", default_data_dir(), log=print)
    assert list(tmp_path.iterdir()) == [], "no folder named ~"


def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    images, data = tmp_path / os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"d\xe4ta")
    for name in (b"t\xe9a", b"dog"):
        put_class(images / os.fsdecode(name), 5)
    with redirect_stdout(io.StringIO()) as output:
        for arguments in (["fetch", f"folder:{images}"], ["list"], ["verify"], ["verify", f"folder:{images}"]):
            assert run(*arguments, "--data-dir", data) == 0
    printed = output.getvalue()
    assert printed.count(f"folder:{images}: good, sha256 ") == 2
    assert "amaged" not in printed
