"""Sources are tried in turn, each failure is one line, and many processes make one download."""

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.trainer.data.faulty_server import FaultyServer, begin, slow, stalled, whole
from tests.trainer.data.tiny_dataset import GZ_NAMES, NAMES, QUICK, idx_files, make_content, make_dataset_info
from trainer.data.content import DatasetContent
from trainer.data.datasets import open_or_fetch
from trainer.data.published.fetch import fetch_dataset, import_dataset
from trainer.data.published.info import DatasetInfo
from trainer.data.published.sources import Mirror
from trainer.errors import DataError

CONTENT = make_content()
FILES = idx_files(CONTENT)
NOWHERE = Mirror("http://no-such-host.invalid/", GZ_NAMES)


def get(info: DatasetInfo, data_dir: Path, logged: list[str]) -> DatasetContent:
    (data_dir / info.name).mkdir(parents=True, exist_ok=True)
    return fetch_dataset(info, data_dir, log=logged.append, limits=QUICK)


def same(found: DatasetContent) -> bool:
    return torch.equal(found.train.images, CONTENT.train.images) and torch.equal(found.test.labels, CONTENT.test.labels)


@pytest.mark.parametrize(("place", "gzipped"), [("tiny", False), ("tiny", True), ("Tiny/raw", True)])
def test_files_placed_by_hand_are_used_first(
    server: FaultyServer, tmp_path: Path, logged: list[str], place: str, gzipped: bool
) -> None:
    (tmp_path / place).mkdir(parents=True)
    for name, data in FILES.items():
        (tmp_path / place / (f"{name}.gz" if gzipped else name)).write_bytes(gzip.compress(data) if gzipped else data)
    assert same(get(make_dataset_info(server.mirror()), tmp_path, logged))
    assert not server.requests
    assert len(logged) == 1
    assert "taken from data folder" in logged[0]


def test_each_failed_source_is_one_line(server: FaultyServer, tmp_path: Path, logged: list[str]) -> None:
    server.put_files(FILES)
    assert same(get(make_dataset_info(NOWHERE, server.mirror()), tmp_path, logged))
    assert [line.partition(" in ")[0] for line in logged] == [
        "tiny: data folder: none of the files is there; trying no-such-host.invalid",
        f"tiny: no-such-host.invalid: its name cannot be resolved; trying {server.mirror().label}",
        f"tiny: taken from {server.mirror().label}",
    ]
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == []


def test_a_source_with_other_files_is_left(server: FaultyServer, tmp_path: Path, logged: list[str]) -> None:
    server.put_files(FILES)
    with FaultyServer().running() as liar:
        liar.put_files(idx_files(make_content(seed=1)))
        assert same(get(make_dataset_info(liar.mirror(), server.mirror()), tmp_path, logged))
    assert "has the wrong digest" in logged[1]


@pytest.mark.parametrize("fault", ["short", "page", "stall", "gone"])
def test_a_source_with_a_fault_is_left(server: FaultyServer, tmp_path: Path, logged: list[str], fault: str) -> None:
    server.put_files(FILES)
    with FaultyServer().running() as faulty:
        faulty.put_files(FILES)
        data = gzip.compress(FILES[NAMES[2]])
        faults = {
            "short": whole(data[:-10]),
            "page": lambda handler: begin(handler, 0, Content_Type="text/html"),
            "stall": stalled(data, 10, faulty.released, threading.Event()),
        }
        if fault == "gone":
            del faulty.routes[f"/{GZ_NAMES[2]}"]
        else:
            faulty.routes[f"/{GZ_NAMES[2]}"] = faults[fault]
        assert same(get(make_dataset_info(faulty.mirror(), server.mirror()), tmp_path, logged))
    assert len(logged) == 3


def test_a_slow_source_is_tried_again_when_no_other_has_the_files(
    server: FaultyServer, tmp_path: Path, logged: list[str]
) -> None:
    content = make_content(side=28, num_train=40)
    server.put_files(idx_files(content))
    data = gzip.compress(idx_files(content)[NAMES[0]])
    server.routes[f"/{GZ_NAMES[0]}"] = slow(data, len(data) // 50, server.released)
    get(make_dataset_info(server.mirror(), NOWHERE, content=content), tmp_path, logged)
    assert "too slow" in logged[1]
    assert logged[1].endswith("; trying no-such-host.invalid")
    assert logged[2].endswith(f"; trying {server.mirror().label}")
    assert len(logged) == 4


def test_when_all_fail_every_source_is_named(server: FaultyServer, tmp_path: Path, logged: list[str]) -> None:
    info = make_dataset_info(NOWHERE, server.mirror())
    with pytest.raises(DataError) as caught:
        get(info, tmp_path, logged)
    message = str(caught.value)
    assert "no-such-host.invalid: its name cannot be resolved" in message
    assert "answered 404" in message
    assert "`convoy data import tiny PATH`" in message
    assert "\n" not in message


def test_import_reads_the_right_files_and_leaves_them_unchanged(tmp_path: Path) -> None:
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    root = tmp_path / "torchvision"
    for folder, files in (("Other/raw", idx_files(make_content(seed=1))), ("Tiny/raw", FILES)):
        (root / folder).mkdir(parents=True)
        for name, data in files.items():
            (root / folder / name).write_bytes(data)
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    assert same(import_dataset(make_dataset_info(), root, tmp_path / "data"))
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before
    with pytest.raises(DataError, match=r"tiny cannot be taken from .*: none of the files is there"):
        import_dataset(make_dataset_info(), tmp_path / "data", tmp_path / "data")


LOAD = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.trainer.data.tiny_dataset import GZ_NAMES, make_dataset_info
from trainer.data.datasets import open_or_fetch
from trainer.data.published.sources import Mirror

info = make_dataset_info(Mirror(sys.argv[3], GZ_NAMES))
children = []
for _ in range(int(sys.argv[4])):
    child = os.fork()
    if child == 0:
        decoded = open_or_fetch(info, Path(sys.argv[2]), log=lambda line: print(line, flush=True))
        os._exit(0 if decoded.sha256 == info.sha256 else 1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def load_command(server: FaultyServer, data_dir: Path, num_processes: int) -> list[str]:
    return [sys.executable, "-c", LOAD, str(ROOT), str(data_dir), server.url, str(num_processes)]


def test_sixteen_processes_make_one_download(server: FaultyServer, tmp_path: Path) -> None:
    server.put_files(FILES)
    output = subprocess.run(load_command(server, tmp_path, 16), check=True, capture_output=True, text=True).stdout
    assert server.requests == {f"/{name}": 1 for name in GZ_NAMES}
    assert output.count("taken from") == 1
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["tiny.pt"]


def test_a_killed_download_leaves_only_temporary_files(server: FaultyServer, tmp_path: Path, logged: list[str]) -> None:
    server.put_files(FILES)
    good = server.routes[f"/{GZ_NAMES[2]}"]
    reached = threading.Event()
    server.routes[f"/{GZ_NAMES[2]}"] = stalled(gzip.compress(FILES[NAMES[2]]), 10, server.released, reached)
    process = subprocess.Popen(load_command(server, tmp_path, 1), start_new_session=True, stdout=subprocess.DEVNULL)
    assert reached.wait(30)
    while not list(tmp_path.glob("tiny/.tmp-*/arrived/*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = [path.name for path in (tmp_path / "tiny").iterdir()]
    assert all(name.startswith(".tmp-") for name in left)
    assert left
    server.routes[f"/{GZ_NAMES[2]}"] = good
    info = make_dataset_info(server.mirror())
    assert open_or_fetch(info, tmp_path, log=logged.append).sha256 == info.sha256
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["tiny.pt"]
