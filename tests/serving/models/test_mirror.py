"""The copy of a remote repository: only what changed is fetched, versions appear whole, errors change nothing."""

import errno
import logging
import os
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from convoy.promotion import PROMOTION_FILE, promote, read_promotion, write_promotion
from serving.config import ServeConfig
from serving.errors import Internal, NotFound, StartupError, Unavailable
from serving.models import mirror as mirror_module
from serving.models import remote as remote_module
from serving.models.folder import RepositoryFolder
from serving.models.loader import LoadSettings
from serving.models.mirror import Mirror, open_location
from serving.models.remote import RemoteRepository, is_address
from serving.models.repository import IndexEntry, Repository
from serving.models_command import main
from serving.protocol.control import ControlService
from tests.serving.model_files import SCALE_CONFIG, scale, write_config, write_version
from tests.serving.models.fake_hub import REPOSITORY, TOKEN, fake_hub
from tests.serving.models.test_repository import ask, eventually


@pytest.fixture
def source(tmp_path):
    """A repository of one model with versions 1, 2 and 3, in a folder that is read as if it were remote."""
    write_config(tmp_path / "source/m", SCALE_CONFIG)
    for version in (1, 2, 3):
        write_version(tmp_path / "source/m", version, scale(version), manifest={})
    return tmp_path / "source"


class Recorded(RemoteRepository):
    """Records what is fetched, and fails if told to.

    Attributes:
        error: of listings.
        broken: folders whose files cannot be read.
        alter: changes a file's content on its way.
    """

    def __init__(self, address):
        super().__init__(address)
        self.fetched = []
        self.error = None
        self.broken = set()
        self.alter = None
        self._get_file = self._files.get_file
        self._files = SimpleNamespace(
            **{name: getattr(self._files, name) for name in ("find", "ls", "info", "pipe_file", "invalidate_cache")},
            get_file=self._get_altered,
        )

    def _get_altered(self, path, file):
        if self.alter is None:
            self._get_file(path, file)
        else:
            Path(file).write_bytes(self.alter(Path(path).read_bytes()))

    def list(self):
        if self.error is not None:
            raise self.error
        return super().list()

    def fetch(self, path, file, tag):
        self.fetched.append(path)
        if any(path.startswith(f"{folder}/") for folder in self.broken):
            raise OSError("access denied")
        super().fetch(path, file, tag)


@pytest.fixture
def remote(source):
    return Recorded(f"file://{source}")


@pytest.fixture
def mirror(remote, tmp_path):
    return Mirror(remote, tmp_path / "copy")


def visible(folder):
    """The files of a copy, without hidden ones."""
    return sorted(
        str(path.relative_to(folder))
        for path in Path(folder).rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def change_in_place(file):
    time.sleep(0.01)  # file systems tell times by ticks
    file.write_bytes(b"!" * file.stat().st_size)


def rot(file):
    """Damages a file as a disk does: its size and times stay."""
    status = file.stat()
    file.write_bytes(b"!" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_the_policy_could_serve_is_fetched_once(source, remote, mirror):
    mirror.sync()
    expected = ["m/2/manifest.json", "m/2/model.onnx", "m/3/manifest.json", "m/3/model.onnx", "m/config.pbtxt"]
    assert (visible(mirror.folder), sorted(remote.fetched)) == (expected, expected)
    remote.fetched.clear()
    mirror.sync()
    Mirror(remote, mirror.folder).sync()
    assert remote.fetched == [], "also after a restart"
    mirror.sync("m", 1)
    assert sorted(remote.fetched) == ["m/1/manifest.json", "m/1/model.onnx"]


def test_only_changed_files_are_fetched(source, remote, mirror):
    (source / "m/3/data.bin").write_bytes(b"same")
    write_version(source / "m", 4, scale(4), manifest={})
    mirror.sync()
    remote.fetched.clear()
    (source / "m/3/data.bin").write_bytes(b"other")
    mirror.sync()
    assert remote.fetched == ["m/3/data.bin"]
    assert (mirror.folder / "m/3/data.bin").read_bytes() == b"other"
    assert (mirror.folder / "m/3/model.onnx").read_bytes() == scale(3)


def test_a_version_appears_only_when_its_digests_are_right(source, remote, mirror, caplog):
    mirror.sync()
    folder = write_version(source / "m", 4, scale(4), manifest={})
    (folder / "model.onnx").write_bytes(scale(4)[:-1])  # an upload in progress
    for _ in range(3):
        mirror.sync()
    assert not (mirror.folder / "m/4").exists()
    assert caplog.text.count(f"m version 4 is not fetched from file://{source}: model.onnx is damaged") == 1
    assert remote.fetched.count("m/4/model.onnx") == 1, "the same files are not fetched again"
    (folder / "model.onnx").write_bytes(scale(4))
    mirror.sync()
    assert (mirror.folder / "m/4/model.onnx").read_bytes() == scale(4)
    assert not [path for path in (mirror.folder / "m").iterdir() if path.name.startswith(".")]


def test_a_version_without_a_manifest_is_fetched_when_two_listings_are_equal(source, mirror):
    mirror.sync()
    write_version(source / "m", 4, scale(4))
    mirror.sync()
    assert not (mirror.folder / "m/4").exists()
    mirror.sync()
    assert (mirror.folder / "m/4/model.onnx").exists()


def test_what_is_gone_is_removed_but_an_empty_address_is_an_error(source, remote, mirror):
    write_config(source / "n", SCALE_CONFIG)
    mirror.sync()
    shutil.rmtree(source / "n")
    shutil.rmtree(source / "m/3")
    mirror.sync()
    assert {path.split("/")[1] for path in visible(mirror.folder)} == {"1", "2", "config.pbtxt"}
    before = visible(mirror.folder)
    shutil.rmtree(source / "m")
    with pytest.raises(OSError, match="holds no models any more"):
        mirror.sync()
    assert visible(mirror.folder) == before


def test_a_copy_follows_whatever_a_killed_process_left_in_it(source, remote, mirror):
    mirror.sync()
    mirror.write_promotion(mirror.folder / "m", promote(None, 2, 3, [1, 2, 3]))
    (source / "m" / PROMOTION_FILE).unlink()  # before it was listed
    shutil.copytree(source / "m/1", mirror.folder / "m/4")  # fetched, but not yet in the index; gone since
    shutil.copytree(source / "m/1", mirror.folder / "m/.fetching-0")
    (mirror.folder / "m/.config.pbtxt.0").touch()
    mirror.sync()
    assert sorted(path.name for path in (mirror.folder / "m").iterdir()) == ["2", "3", "config.pbtxt"]


def test_a_fetch_that_fails_leaves_what_there_was(source, remote, mirror, caplog, monkeypatch):
    mirror.sync()
    before = visible(mirror.folder)
    write_version(source / "m", 4, scale(4), manifest={})

    def fail(path, file, tag):
        file.write_bytes(b"half")
        raise OSError("connection reset")

    monkeypatch.setattr(remote, "fetch", fail)
    mirror.sync()
    mirror.sync()
    assert visible(mirror.folder) == before
    assert caplog.text.count("m version 4 is not fetched from") == 1
    monkeypatch.undo()
    mirror.sync()
    assert (mirror.folder / "m/4/model.onnx").exists()


def test_files_that_arrive_damaged_are_fetched_again_after_a_pause(source, remote, mirror, monkeypatch):
    mirror.sync()
    write_version(source / "m", 4, scale(4), manifest={})
    remote.alter = lambda content: bytes([content[0] ^ 1]) + content[1:]
    mirror.sync()
    remote.alter = None
    rot(mirror.folder / "m/3/model.onnx")  # and not fetched again for 3.json
    (source / "m/3/3.json").touch()
    mirror.sync()
    assert not (mirror.folder / "m/4").exists()
    later = time.monotonic() + 61
    monkeypatch.setattr(mirror_module.time, "monotonic", lambda: later)
    mirror.sync()
    assert [(mirror.folder / f"m/{version}/model.onnx").read_bytes() for version in (3, 4)] == [scale(3), scale(4)]
    assert mirror.missing() == {}


def test_files_that_arrive_in_part_replace_nothing(source, remote, mirror):
    mirror.sync()
    write_config(source / "m", SCALE_CONFIG + "# changed")
    (source / "m/warmup").mkdir()
    (source / "m/warmup/x").write_bytes(b"data")
    write_version(source / "m", 3, scale(33))
    before = [(mirror.folder / file).read_bytes() for file in visible(mirror.folder)]
    remote.alter = lambda content: content[:3] if content == b"data" else content
    mirror.sync()
    assert [(mirror.folder / file).read_bytes() for file in visible(mirror.folder)] == before
    reason = "only the first 3 bytes of m/warmup/x arrived"
    assert mirror.missing() == {"m": {0: f"its configuration is not fetched from {remote.address}: {reason}"}}
    remote.alter = None
    mirror.sync()
    mirror.sync()
    assert (mirror.folder / "m/config.pbtxt").read_text() == SCALE_CONFIG + "# changed"
    assert (mirror.folder / "m/3/model.onnx").read_bytes() == scale(33)


@pytest.mark.parametrize("file", ["m/3/model.onnx", "m/config.pbtxt"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), change_in_place])
def test_what_is_lost_in_the_copy_is_fetched_again(remote, mirror, file, damage):
    mirror.sync()
    content = (mirror.folder / file).read_bytes()
    damage(mirror.folder / file)
    remote.fetched.clear()
    mirror.sync()
    assert (remote.fetched, (mirror.folder / file).read_bytes()) == ([file], content)


def test_a_version_without_a_manifest_that_changes_while_it_is_fetched_waits(source, remote, mirror):
    mirror.sync()
    write_version(source / "m", 4, scale(4))
    (source / "m/4/weights").write_bytes(b"4")
    mirror.sync()

    def change(content):
        (source / "m/4/model.onnx").write_bytes(scale(5))
        (source / "m/4/weights").write_bytes(b"5.")
        return content

    remote.alter = change
    mirror.sync()
    remote.alter = None
    assert not (mirror.folder / "m/4").exists()
    assert "its files changed while they were fetched" in mirror.missing()["m"][4]
    mirror.sync()
    assert not (mirror.folder / "m/4").exists(), "these files have been listed once"
    mirror.sync()
    assert [(mirror.folder / "m/4" / file).read_bytes() for file in ("model.onnx", "weights")] == [scale(5), b"5."]


def test_a_new_server_takes_no_version_that_is_being_uploaded(source, remote, mirror, monkeypatch):
    mirror.sync()
    write_version(source / "m", 4, scale(4))
    pauses = []

    def upload(pause_s):
        pauses.append(pause_s)
        (source / "m/4/weights").write_bytes(b"4")

    monkeypatch.setattr(mirror_module.time, "sleep", upload)
    Mirror(remote, mirror.folder).sync()
    assert not (mirror.folder / "m/4").exists()
    assert 1 < pauses[0] <= 2


def test_versions_that_are_no_longer_needed_are_removed_after_a_day(source, remote, mirror):
    def age(*versions):
        for version in versions:
            os.utime(mirror.folder / f"m/{version}", (time.time() - 90_000,) * 2)

    def versions_of(mirror):
        return sorted(int(path.name) for path in mirror.folder.glob("m/[0-9]"))

    mirror.sync("m", 1)
    age(1, 2, 3)
    Mirror(remote, mirror.folder).sync()
    assert versions_of(mirror) == [1, 2, 3], "a new server does not know yet which versions load"
    mirror.sync(known=lambda name: (1, ()))
    assert versions_of(mirror) == [1, 2, 3], "1 serves"
    write_config(source / "m", "a mistake")
    age(1, 2, 3)
    mirror.sync("m", 3)
    assert versions_of(mirror) == [1, 2, 3], "the policy is unknown"
    write_config(source / "m", SCALE_CONFIG)
    mirror.sync()
    assert versions_of(mirror) == [2, 3]
    remote.fetched.clear()
    mirror.sync("m", 1)
    assert "m/1/model.onnx" in remote.fetched


def test_a_version_that_is_gone_stays_until_the_one_in_its_place_is_known(source, remote, mirror):
    mirror.sync()
    shutil.rmtree(source / "m/3")
    shutil.rmtree(source / "m/1")
    write_version(source / "m", 4, scale(4))
    mirror.sync()
    assert sorted(path.name for path in mirror.folder.glob("m/[0-9]")) == ["2", "3"]
    remote.broken.add("m/4")
    mirror.sync()
    assert sorted(path.name for path in mirror.folder.glob("m/[0-9]")) == ["2", "3"]
    remote.broken.clear()
    mirror.sync()
    assert sorted(path.name for path in mirror.folder.glob("m/[0-9]")) == ["2", "4"]


def test_a_folder_that_cannot_be_listed_is_not_gone(source, remote, mirror, monkeypatch):
    mirror.sync()
    before, listed = visible(mirror.folder), remote._files.ls

    def fail(path, **options):
        if path.endswith("m/3"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listed(path, **options)

    monkeypatch.setattr(remote._files, "ls", fail)
    with pytest.raises(OSError, match="Permission denied"):
        mirror.sync()
    assert visible(mirror.folder) == before


def test_the_reason_says_whether_the_address_or_the_copy_is_at_fault(source, remote, mirror):
    mirror.sync()
    write_version(source / "m", 4, scale(4), manifest={})

    def fill(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    remote.alter = fill
    mirror.sync()
    reason = f"the copy {mirror.folder} cannot be written: No space left on device"
    assert mirror.missing() == {"m": {4: f"version 4 is not fetched from {remote.address}: {reason}"}}
    (mirror.folder / ".lock").unlink()
    (mirror.folder / ".lock").mkdir()
    folder = RepositoryFolder(mirror.folder, lambda: None, mirror)
    assert folder.fetch() == f"the copy {mirror.folder} cannot be written: Is a directory"
    remote.error = OSError("no route to host")
    assert folder.fetch() == "the remote repository cannot be read: no route to host"


def test_a_choice_that_the_copy_cannot_take_is_not_made(source, mirror, monkeypatch):
    mirror.sync()

    def fail(folder, promotion):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mirror_module, "write_locally", fail)
    with pytest.raises(OSError, match="No space left on device"):
        mirror.write_promotion(mirror.folder / "m", promote(None, 2, 3, [1, 2, 3]))
    assert not (source / "m" / PROMOTION_FILE).exists()


def test_an_index_is_written_when_it_changes(source, mirror):
    mirror.sync()
    before = (mirror.folder / ".fetched.json").stat().st_ino
    mirror.sync()
    assert (mirror.folder / ".fetched.json").stat().st_ino == before


def test_files_of_a_web_server(source, tmp_path):
    """Its listings tell nothing of a file: each is asked for."""
    handler = partial(QuietHandler, directory=str(source.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            mirror = Mirror(RemoteRepository(f"http://127.0.0.1:{server.server_port}/source"), tmp_path / "copy")
            mirror.sync()
            assert visible(mirror.folder)[-1] == "m/config.pbtxt"
            write_config(source / "m", SCALE_CONFIG + "# changed")
            mirror.sync()
            assert (mirror.folder / "m/config.pbtxt").read_text() == SCALE_CONFIG + "# changed"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_names_that_lead_elsewhere_are_left_out(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in (
        "m/1/model.onnx",
        "m/config.pbtxt",
        "m/1/.hidden",
        "../m/1/x",
        "m/../../x",
        "lost+found/1/x",
        ".m/1/x",
    ):
        memory.store[f"/bucket/{path}"] = memory.open("/scratch", "wb")
        memory.store[f"/bucket/{path}"].close()
    (model,) = RemoteRepository("memory://bucket").list().items()
    assert (model[0], list(model[1].own), list(model[1].versions[1])) == ("m", ["config.pbtxt"], ["model.onnx"])


def test_the_data_of_the_warm_up_are_fetched_and_removed_with_the_address(source, remote, mirror):
    (source / "m/warmup").mkdir()
    (source / "m/warmup/x").write_bytes(b"1")
    mirror.sync()
    assert "m/warmup/x" in visible(mirror.folder)
    (source / "m/warmup/x").write_bytes(b"22")
    mirror.sync()
    assert (mirror.folder / "m/warmup/x").read_bytes() == b"22"
    (source / "m/warmup/x").unlink()
    mirror.sync()
    assert "m/warmup/x" not in visible(mirror.folder)
    assert "m/3/model.onnx" in visible(mirror.folder)


def test_two_processes_share_a_copy(source, remote, tmp_path):
    mirrors = [Mirror(remote, tmp_path / "copy") for _ in range(4)]
    threads = [threading.Thread(target=each.sync) for each in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(remote.fetched) == len(set(remote.fetched)), "each file was fetched once"


def test_what_another_process_has_fetched_is_not_missing(source, remote, mirror):
    remote.broken.add("m/3")
    mirror.sync()
    assert list(mirror.missing()["m"]) == [3]
    Mirror(RemoteRepository(remote.address), mirror.folder).sync()
    mirror.sync()
    assert mirror.missing() == {}


def test_addresses_are_told_from_folders(tmp_path):
    assert all(map(is_address, ("s3://b/models", "hf://user/name", "memory://x")))
    assert not any(map(is_address, ("models", "/models", Path("/s3:/x"), "C:\\models")))
    assert open_location(tmp_path, None) == (tmp_path, None)
    one, other = (open_location(f"memory://bucket/{name}", tmp_path)[0] for name in ("a", "b"))
    assert one != other
    assert one.parent == tmp_path
    with pytest.raises(StartupError, match="nosuch://x cannot be opened: Protocol not known: nosuch"):
        open_location("nosuch://x", tmp_path)


# ---- Served ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_repository(tmp_path):
    opened = []

    def open_it(mirror, mode="poll"):
        settings = LoadSettings(device="cpu", num_threads=1)
        repository = Repository(mirror.folder, settings, mode=mode, poll_interval_s=0.02, mirror=mirror)
        opened.append(repository)
        repository.check()
        repository.start()
        return repository

    yield open_it
    for repository in opened:
        repository.close()


def test_new_versions_are_served_and_errors_keep_what_serves(source, remote, mirror, open_repository, caplog):
    caplog.set_level(logging.INFO)
    repository = open_repository(mirror)
    assert ask(repository, "m") == 3
    write_version(source / "m", 4, scale(4), manifest={})
    eventually(lambda: ask(repository, "m") == 4)
    remote.error = OSError("no route to host")
    eventually(lambda: "cannot be read: no route to host" in repository.index(False)[-1].reason)
    assert ask(repository, "m") == 4
    assert "the models that serve keep serving" in caplog.text
    other = open_repository(Mirror(remote, mirror.folder))
    assert ask(other, "m") == 4, "a server that starts meanwhile serves from the copy"
    with pytest.raises(Unavailable, match="cannot be read: no route to host"):
        repository.promotions.promote("m", 3)
    remote.error = None
    eventually(lambda: not repository.index(False)[-1].reason)


def test_a_server_cannot_start_without_address_and_copy(remote, mirror, open_repository):
    remote.error = OSError("no route to host")
    with pytest.raises(StartupError, match="the remote repository cannot be read: no route to host"):
        open_repository(mirror)


def test_an_older_version_takes_the_place_of_one_that_cannot_be_fetched(source, remote, mirror, open_repository):
    remote.broken.add("m/3")
    repository = open_repository(mirror)
    assert (ask(repository, "m"), repository.is_ready()) == (2, True)
    reason = f"version 3 is not fetched from {remote.address}: access denied"
    entries = [(entry.version, entry.state, entry.reason) for entry in repository.index(False)]
    assert entries[-2:] == [("2", "READY", ""), ("3", "UNAVAILABLE", reason)]
    with pytest.raises(Unavailable, match=reason):
        repository.promotions.promote("m", 3)
    remote.broken.clear()
    eventually(lambda: ask(repository, "m") == 3)
    assert not [entry for entry in repository.index(False) if "fetched" in entry.reason]


def test_readiness_requires_a_model_that_cannot_be_fetched(source, remote, mirror, open_repository):
    shutil.copytree(source / "m", source / "n")
    remote.broken.add("n")
    repository = open_repository(mirror)
    reason = f"its configuration is not fetched from {remote.address}: access denied"
    assert (ask(repository, "m"), repository.is_ready()) == (3, False)
    assert repository.index(False)[-1] == IndexEntry("n", "", "UNAVAILABLE", reason)
    with pytest.raises(NotFound, match=f"model 'n' has no available versions: {reason}"):
        repository.get("n")
    remote.broken.clear()
    eventually(repository.is_ready)
    assert ask(repository, "n") == 3


def test_a_server_of_which_nothing_can_be_fetched_does_not_start(remote, mirror, open_repository):
    remote.broken.add("m")
    with pytest.raises(StartupError, match=r"model 'm': its configuration is not fetched from .*: access denied"):
        open_repository(mirror)


def test_an_address_that_does_not_answer(source, remote, mirror, open_repository, monkeypatch):
    mirror.sync()
    answer, calls, find = threading.Event(), [], remote._walk

    def hang(folder):
        calls.append(folder)
        answer.wait(60)
        return find(folder)

    monkeypatch.setattr(remote, "_walk", hang)
    monkeypatch.setattr(remote_module, "PATIENCE_S", 0.05)
    repository = open_repository(mirror)
    write_version(source / "m", 4, scale(4), manifest={})
    assert (ask(repository, "m"), repository.is_ready()) == (3, True), "served from the copy"
    eventually(lambda: repository.index(False)[-1].reason == "the remote repository cannot be read: it does not answer")
    assert len(calls) == 1, "no other one is asked for meanwhile"
    answer.set()
    eventually(lambda: ask(repository, "m") == 4)


def test_a_call_that_never_ends_is_given_up(source, remote, mirror, monkeypatch):
    """A server may send a byte now and then for days."""
    end, find = threading.Event(), remote._walk
    monkeypatch.setattr(remote, "_walk", lambda folder: end.wait(60) and ())
    monkeypatch.setattr(remote_module, "PATIENCE_S", 0.05)
    with pytest.raises(OSError, match="does not answer"):
        mirror.sync()
    monkeypatch.setattr(remote, "_walk", find)
    monkeypatch.setattr(remote_module, "PATIENCE_S", 60)
    with pytest.raises(OSError, match="does not answer"):
        mirror.sync()
    later = time.monotonic() + 601
    monkeypatch.setattr(remote_module.time, "monotonic", lambda: later)
    mirror.sync()
    end.set()
    assert "m/3/model.onnx" in visible(mirror.folder)


def test_a_version_that_rots_in_the_copy_is_fetched_again(mirror, open_repository, caplog):
    mirror.sync()
    rot(mirror.folder / "m/3/model.onnx")
    repository = open_repository(mirror)
    eventually(lambda: ask(repository, "m") == 3)
    assert "m version 3 in the copy is fetched again: model.onnx is damaged" in caplog.text


def test_a_choice_is_written_to_the_address(source, mirror, open_repository, tmp_path):
    repository = open_repository(mirror)
    repository.promotions.promote("m", 1)
    assert ask(repository, "m") == 1, "a version that was not in the copy"
    assert read_promotion(source / "m").version == 1
    write_promotion(source / "m", promote(read_promotion(source / "m"), 2, 1, [1, 2, 3]))
    eventually(lambda: ask(repository, "m") == 2)
    repository.promotions.roll_back("m")
    assert (ask(repository, "m"), read_promotion(source / "m").version) == (1, 1)


def test_a_listing_from_before_a_choice_does_not_undo_it(remote, mirror, monkeypatch):
    mirror.sync()
    before = remote.list()

    def list_while_another_chooses():
        monkeypatch.undo()
        mirror.write_promotion(mirror.folder / "m", promote(None, 2, 3, [1, 2, 3]))
        return before

    monkeypatch.setattr(remote, "list", list_while_another_chooses)
    mirror.sync()
    assert read_promotion(mirror.folder / "m").version == 2


def test_a_roll_back_from_the_best_of_damaged_versions(source, mirror, open_repository, tmp_path, capsys):
    for version in (4, 5):
        (write_version(source / "m", version, scale(version), manifest={}) / "model.onnx").write_bytes(b"damaged")
    repository = open_repository(mirror)
    assert ask(repository, "m") == 3
    assert {path.split("/")[1] for path in visible(mirror.folder)} == {"2", "3", "config.pbtxt"}
    with pytest.raises(Unavailable, match=r"^version 5 is not fetched from file://.*: model\.onnx is damaged"):
        repository.promotions.promote("m", 5)
    repository.promotions.roll_back("m")
    assert ask(repository, "m") == 2
    (source / "m" / PROMOTION_FILE).unlink()
    main_of_copy = ("--model-repository", f"file://{source}", "--model-cache", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as exited:
        main(("rollback", "m", *main_of_copy))
    assert (exited.value.code, read_promotion(source / "m").version) == (0, 2)
    assert "m serves version 2; rolled back from version 3 to version 2" in capsys.readouterr().out


def test_a_roll_back_from_the_best_of_versions_that_do_not_load(source, mirror, open_repository):
    write_version(source / "m", 4, b"no model", manifest={})
    repository = open_repository(mirror)
    assert ask(repository, "m") == 3
    assert {path.split("/")[1] for path in visible(mirror.folder)} == {"3", "4", "config.pbtxt"}
    eventually(lambda: ControlService(repository).models("m").models[0].before == 2)  # fetched once 3 serves
    write_version(source / "m", 2, b"no model", manifest={})
    repository.promotions.roll_back("m")
    assert ask(repository, "m") == 1, "2 does not load either"


@pytest.mark.parametrize("mode", ["none", "poll", "explicit"])
def test_a_new_server_serves_the_newest_version_that_loads(source, mirror, open_repository, mode):
    """A copy has two of them at first, and knows only by loading that they are no models."""
    for version in (4, 5, 6):
        write_version(source / "m", version, b"no model", manifest={})
    write_promotion(source / "m", promote(None, 3, 2, [1, 2, 3]))
    repository = open_repository(mirror, mode)
    if mode == "explicit":
        with pytest.raises(Internal, match="version 6: ONNX Runtime cannot load"):
            repository.load("m")
    assert ask(repository, "m") == 3
    write_version(source / "m", 3, scale(33), manifest={})
    if mode == "poll":
        eventually(lambda: ask(repository, "m") == 33)


def test_in_explicit_mode_a_load_fetches(source, remote, mirror, open_repository, caplog):
    repository = open_repository(mirror, "explicit")
    write_version(source / "m", 4, scale(4), manifest={})
    repository.load("m")
    assert ask(repository, "m") == 4
    remote.error = OSError("no route to host")
    repository.load("m")
    assert "the remote repository cannot be read: no route to host; the models that serve keep" in caplog.text


def test_an_address_on_the_command_line(source, tmp_path, capsys):
    where = ("--model-repository", f"file://{source}", "--model-cache", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as exited:
        main(("pin", "m", "1", *where))
    assert (exited.value.code, read_promotion(source / "m").pinned) == (0, True)
    shown = capsys.readouterr().out
    assert "m serves version 1; version 1 is pinned" in shown
    assert "\n1        -\n" in shown  # no server has told its state
    config = ServeConfig(model_repository=where[1], model_cache=tmp_path / "cache", device="cpu", num_threads=1)
    repository = Repository.from_config(config)
    try:
        repository.check()
        repository.start()
        assert ask(repository, "m") == 1
    finally:
        repository.close()
    with pytest.raises(SystemExit) as exited:
        main(("list", "--model-repository", f"file://{tmp_path}/nowhere", "--model-cache", str(tmp_path / "other")))
    assert exited.value.code in (0, 3)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_a_private_repository_of_a_hub(source, tmp_path, monkeypatch, open_repository, caplog):
    models = tmp_path / "hub" / "models"
    models.parent.mkdir()
    source.rename(models)
    with fake_hub(models.parent) as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url})
        monkeypatch.setenv("HF_TOKEN", "wrong")
        remote = RemoteRepository(f"hf://{REPOSITORY}/models")
        with pytest.raises(OSError, match="repository not found"):
            remote.list()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        repository = open_repository(Mirror(remote, tmp_path / "copy"), "explicit")
        repository.load("m")
        assert ask(repository, "m") == 3
        write_version(models / "m", 4, scale(4), manifest={})
        repository.load("m")
        assert ask(repository, "m") == 4
        repository.promotions.pin("m", 2)
        assert ask(repository, "m") == 2
        assert read_promotion(models / "m").pinned
        with pytest.raises(OSError, match=r"^Repository id must be 'namespace/name', got 'user'"):
            RemoteRepository("hf://user").list()
    repository.load("m")
    assert f"{remote.address}: the remote repository cannot be read: ConnectError: " in caplog.text
    assert ask(repository, "m") == 2


# ---- S3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.minutes
@pytest.mark.filterwarnings("default")
def test_a_bucket_of_a_local_s3_server(source, tmp_path, monkeypatch, open_repository):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b"), ("AWS_REGION", "us-east-1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("bucket")
        bucket.put(f"{source}/", "bucket/models/", recursive=True)
        remote = Recorded("s3://bucket/models")
        mirror = Mirror(remote, tmp_path / "copy")
        repository = open_repository(mirror)
        assert ask(repository, "m") == 3
        remote.fetched.clear()
        folder = write_version(source / "m", 4, scale(4), manifest={})
        bucket.put_file(str(folder / "manifest.json"), "bucket/models/m/4/manifest.json")
        eventually(lambda: "m/4/manifest.json" in remote.fetched)
        assert ask(repository, "m") == 3, "the upload is not complete"
        bucket.put_file(str(folder / "model.onnx"), "bucket/models/m/4/model.onnx")
        eventually(lambda: ask(repository, "m") == 4)
        repository.promotions.pin("m", 2)
        assert b'"pinned": true' in bucket.cat_file(f"bucket/models/m/{PROMOTION_FILE}")
        assert ask(repository, "m") == 2
        server.stop()
        eventually(lambda: "the remote repository cannot be read" in repository.index(False)[0].reason)
        assert ask(repository, "m") == 2
    finally:
        server.stop()
