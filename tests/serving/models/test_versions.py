"""The versions of one model are loaded and unloaded, one scan at a time."""

import errno
import os
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from convoy.promotion import pin, promote, write_promotion
from serving.errors import TransientLoadError
from serving.inference.batcher import BatcherClosed
from serving.models import closing as closing_module
from serving.models import slot as slot_module
from serving.models import versions as versions_module
from serving.models.loader import LoadSettings, load_version
from serving.models.versions import ModelVersions
from tests.serving.model_files import SCALE_CONFIG, classifier, scale, write_config, write_version
from tests.serving.models.one_row import OneRow

X = np.ones((1, 3), np.float32)


class RecordedVersions:
    """A model's versions, and the views published after every change."""

    def __init__(self, folder):
        self.folder = folder
        self.views = []
        self.versions = ModelVersions(folder, LoadSettings(device="cpu", num_threads=1), self._publish)

    def _publish(self):
        self.views.append((sorted(self.versions.ready()), [entry.state for entry in self.versions.entries()]))

    def start(self):
        return self.versions.update(stable=True)

    def scan(self):
        return self.versions.update(stable=False)

    @property
    def ready(self):
        return sorted(self.versions.ready())

    @property
    def entries(self):
        return [(entry.version, entry.state, entry.reason) for entry in self.versions.entries()]

    def factor(self, version):
        """Returns the factor that the served version multiplies by."""
        job = OneRow(X)
        self.versions.ready()[version].batcher.submit(job)
        assert job.answered.wait(60)
        return job.outputs[0][0][0]


@pytest.fixture
def model(tmp_path):
    """A model of `scale`, configured, without versions yet."""
    write_config(tmp_path / "m", SCALE_CONFIG)
    recorded = RecordedVersions(tmp_path / "m")
    yield recorded
    recorded.versions.unload("the test is over")


@pytest.fixture
def attempts(monkeypatch):
    """The versions that were loaded or failed to load, in order."""
    tried = []

    def load(folder, version, config, settings):
        tried.append(version)
        return load_version(folder, version, config, settings)

    monkeypatch.setattr(versions_module, "load_version", load)
    return tried


def test_before_the_first_scan_there_is_one_entry(tmp_path):
    assert RecordedVersions(tmp_path / "m").entries == [("", "UNAVAILABLE", "not loaded")]


def test_the_newest_version_is_served(model, attempts):
    for version in (2, 10, 9):
        write_version(model.folder, version, scale(version))
    assert model.start() == []
    assert (model.ready, attempts, model.factor(10)) == ([10], [10], 10)
    assert model.entries == [("10", "READY", "")]


def test_a_new_version_takes_over_without_a_gap(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    old = model.versions.ready()[1]
    model.views.clear()
    write_version(model.folder, 2, scale(2), manifest={})
    model.scan()
    assert (model.ready, model.factor(2)) == ([2], 2)
    assert all(ready for ready, _ in model.views), "a version was ready at all times"
    assert ([1, 2], ["READY", "READY"]) in model.views
    assert ([2], ["UNLOADING", "READY"]) in model.views
    with pytest.raises(BatcherClosed):
        old.batcher.submit(OneRow(X))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("latest { num_versions: 2 }", [2, 3]),
        ("all { }", [1, 2, 3]),
        ("specific { versions: [ 1, 3 ] }", [1, 3]),
    ],
)
def test_version_policies(model, policy, expected):
    write_config(model.folder, SCALE_CONFIG + f"version_policy {{ {policy} }}")
    for version in (1, 2, 3):
        write_version(model.folder, version, scale(version))
    assert model.start() == []
    assert model.ready == expected


def test_a_missing_specific_version_is_named(model):
    write_config(model.folder, SCALE_CONFIG + "version_policy { specific { versions: [ 1, 5 ] } }")
    write_version(model.folder, 1, scale(1))
    assert model.start() == ["version 5: the version policy lists it, but it has no folder"]
    assert (model.ready, model.entries[1][:2]) == ([1], ("5", "UNAVAILABLE"))


def test_a_version_that_fails_never_replaces_a_good_one(model, attempts):
    write_version(model.folder, 1, scale(1))
    model.start()
    write_version(model.folder, 2, b"no model", manifest={})
    model.scan()
    assert (model.ready, model.factor(1)) == ([1], 1)
    version, state, reason = model.entries[1]
    assert (version, state) == ("2", "UNAVAILABLE")
    assert reason.startswith("ONNX Runtime cannot load model.onnx: ")
    model.scan()
    assert attempts == [1, 2], "the same files are not loaded twice"
    write_version(model.folder, 2, scale(2), manifest={})
    model.scan()
    assert model.ready == [1], "after a failure, the files may still be being written"
    model.scan()
    assert (model.ready, model.factor(2)) == ([2], 2)


def test_the_newest_good_version_is_served_after_a_restart_too(model):
    write_version(model.folder, 1, scale(1))
    write_version(model.folder, 2, b"no model")
    (failure,) = model.start()
    assert failure.startswith("version 2: ONNX Runtime cannot load")
    assert (model.ready, model.factor(1)) == ([1], 1)


def test_a_version_that_fails_the_golden_check_never_replaces_a_good_one(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    write_version(model.folder, 2, scale(2), golden={"x": X, "y": 5 * X}, manifest={})
    model.scan()
    assert model.ready == [1]
    assert "the model fails the golden check: 'y' differs by 3" in model.entries[1][2]


def test_a_version_without_manifest_is_loaded_when_two_scans_find_the_same_files(model, attempts):
    write_version(model.folder, 1, scale(1))
    model.start()
    folder = write_version(model.folder, 2, scale(2)[:50])
    model.scan()
    assert model.entries[1] == ("2", "UNAVAILABLE", "its files are still being written")
    (folder / "model.onnx").write_bytes(scale(2))
    model.scan()
    assert (model.ready, attempts) == ([1], [1])
    model.scan()
    assert (model.ready, attempts) == ([2], [1, 2])


def test_a_half_copied_version_with_manifest_is_loaded_when_it_is_complete(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    folder = write_version(model.folder, 2, scale(2), manifest={})
    (folder / "model.onnx").write_bytes(scale(2)[:50])
    model.scan()
    assert model.ready == [1]
    assert "model.onnx is damaged" in model.entries[1][2]
    (folder / "model.onnx").write_bytes(scale(2))
    model.scan()
    model.scan()
    assert (model.ready, model.factor(2)) == ([2], 2)


def test_files_changed_in_place_are_loaded_when_they_are_complete(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    old = model.versions.ready()[1]
    (model.folder / "1/model.onnx").write_bytes(scale(4)[:60])
    model.scan()
    model.scan()
    assert model.versions.ready()[1] is old
    ((version, state, reason),) = model.entries
    assert (version, state) == ("1", "READY")
    assert "ONNX Runtime cannot load" in reason
    (model.folder / "1/model.onnx").write_bytes(scale(4))
    model.views.clear()
    model.scan()
    model.scan()
    assert (model.entries, model.factor(1)) == ([("1", "READY", "")], 4)
    assert all(ready == [1] for ready, _ in model.views)


def test_files_that_change_during_loading_are_rejected(model, monkeypatch):
    def load_and_touch(folder, version, config, settings):
        loaded = load_version(folder, version, config, settings)
        (folder / str(version) / "late.txt").touch()
        return loaded

    monkeypatch.setattr(versions_module, "load_version", load_and_touch)
    write_version(model.folder, 1, scale(1))
    assert model.start() == ["version 1: its files changed while it was being loaded"]
    assert model.ready == []


def test_a_removed_version_is_unloaded_after_the_second_scan(model):
    for version in (1, 2):
        write_version(model.folder, version, scale(version))
    model.start()
    shutil.rmtree(model.folder / "2")
    model.scan()
    assert model.ready == [2], "a folder exchanged by hand is missing for a moment"
    model.scan()
    assert (model.ready, model.factor(1)) == ([1], 1)
    assert model.entries == [("1", "READY", "")]


def test_a_removed_version_that_is_pinned_serves_on(model):
    for version in (1, 2):
        write_version(model.folder, version, scale(version))
    write_promotion(model.folder, pin(None, 2, None, [1, 2]))
    model.start()
    shutil.rmtree(model.folder / "2")
    for _ in range(3):
        model.scan()
    assert model.entries == [("2", "READY", "version 2 is pinned, but it has no folder")]


@pytest.mark.parametrize("chosen", ["policy", "promotion"])
def test_a_removed_version_is_unloaded_although_it_is_chosen(model, chosen):
    for version in (1, 2):
        write_version(model.folder, version, scale(version))
    if chosen == "policy":
        write_config(model.folder, SCALE_CONFIG + "version_policy { specific { versions: [ 1, 2 ] } }")
    else:
        write_promotion(model.folder, promote(None, 2, None, [1, 2]))
    model.start()
    shutil.rmtree(model.folder / "2")
    model.scan()
    assert 2 in model.ready
    model.scan()
    assert (model.ready, model.entries[1]) == ([1], ("2", "UNAVAILABLE", "its folder is gone"))
    model.scan()
    why = "the version policy lists it" if chosen == "policy" else "version 2 is promoted"
    assert model.entries[1] == ("2", "UNAVAILABLE", f"{why}, but it has no folder")


def test_a_folder_missing_in_one_scan_is_not_unloaded(model, attempts):
    folder = write_version(model.folder, 1, scale(1))
    model.start()
    for _ in range(3):
        folder.rename(model.folder / "away")
        model.scan()
        (model.folder / "away").rename(folder)
        model.scan()
    assert (model.ready, attempts) == ([1], [1])


def test_a_removed_model_has_no_ready_version(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    shutil.rmtree(model.folder)
    model.scan()
    model.scan()
    assert model.ready == []
    assert model.entries == [("", "UNAVAILABLE", "its folder is gone")]


def test_a_changed_configuration_reloads_the_model(model, attempts):
    write_version(model.folder, 1, scale(1))
    model.start()
    write_config(model.folder, SCALE_CONFIG.replace("max_batch_size: 4", "max_batch_size: 2"))
    model.scan()
    model.scan()
    assert model.versions.ready()[1].spec.max_batch_size == 2
    assert attempts == [1, 1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_batch_size: many", "m/config.pbtxt:1:17 : "),
        (SCALE_CONFIG + "sequence_batching { }", "'sequence_batching' in the configuration is not supported"),
        (SCALE_CONFIG.replace('"x"', '"z"'), "the configuration has input 'z', but the model has 'x'"),
    ],
)
def test_an_invalid_configuration_keeps_the_serving_version(model, text, reason):
    write_version(model.folder, 1, scale(1))
    model.start()
    write_config(model.folder, text)
    model.scan()
    model.scan()
    ((_, state, found),) = model.entries
    assert (model.ready, state) == ([1], "READY")
    assert found.startswith(reason)
    write_config(model.folder, SCALE_CONFIG)
    model.scan()
    model.scan()
    assert model.entries == [("1", "READY", "")]


def test_an_invalid_configuration_is_shown_in_the_index(model):
    write_config(model.folder, 'name: "other"')
    assert model.start() == ["the configuration's name is 'other', but the model's folder is 'm'"]
    assert model.entries == [("", "UNAVAILABLE", "the configuration's name is 'other', but the model's folder is 'm'")]
    write_version(model.folder, 1, scale(1))
    write_version(model.folder, 2, scale(2))
    model.start()
    assert [entry[:2] for entry in model.entries if "name is 'other'" in entry[2]] == [("2", "UNAVAILABLE")]


def test_a_field_without_effect_is_warned_of_once(model, caplog):
    write_config(model.folder, SCALE_CONFIG + "optimization { cuda { graphs: true } }")
    write_version(model.folder, 1, scale(1))
    model.start()
    model.scan()
    assert caplog.text.count("'optimization' has no effect") == 1


def test_a_client_s_configuration_holds_until_the_next_update(model):
    write_version(model.folder, 1, scale(1))
    override = '{"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}], "max_batch_size": 7}'
    assert model.versions.update(stable=True, override=override) == []
    assert model.versions.ready()[1].spec.max_batch_size == 7
    model.start()
    assert model.versions.ready()[1].spec.max_batch_size == 4


def test_any_exception_of_a_backend_becomes_the_reason(model, monkeypatch):
    def explode(folder, version, config, settings):
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(versions_module, "load_version", explode)
    write_version(model.folder, 1, classifier())
    assert model.start() == ["version 1: MemoryError: no room"]


def test_retry_failed_loads_the_same_files_again(model, attempts):
    write_version(model.folder, 1, b"no model")
    model.start()
    model.start()
    assert attempts == [1]
    model.versions.retry_failed()
    model.start()
    assert attempts == [1, 1]


def test_the_index_shows_loading(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    assert model.views[0] == ([], ["LOADING"])
    assert model.views[-1] == ([1], ["READY"])


# ---- what cannot be read is not taken for absent ---------------------------------------------------------------------


def test_an_unreadable_model_keeps_serving(model, broken, caplog):
    write_version(model.folder, 1, scale(1))
    model.start()
    broken[model.folder] = errno.ESTALE
    for _ in range(4):
        assert model.scan() == ["its folder cannot be read: Stale file handle"]
    assert (model.ready, model.factor(1)) == ([1], 1)
    assert model.entries == [("1", "READY", "its folder cannot be read: Stale file handle")]
    assert caplog.text.count("m: its folder cannot be read: Stale file handle; still serving version 1") == 1
    broken.clear()
    with caplog.at_level("INFO"):
        assert model.scan() == []
    assert model.entries == [("1", "READY", "")]
    assert "its folder can be read again" in caplog.text


def test_an_unreadable_version_keeps_serving_and_others_change(model, broken, caplog):
    write_config(model.folder, SCALE_CONFIG + "version_policy { all { } }")
    for version in (1, 2):
        write_version(model.folder, version, scale(version))
    model.start()
    broken[model.folder / "2"] = errno.EACCES
    write_version(model.folder, 3, scale(3), manifest={})
    for _ in range(3):
        model.scan()
    assert model.ready == [1, 2, 3]
    assert model.entries[1] == ("2", "READY", "its folder cannot be read: Permission denied")
    assert caplog.text.count("version 2: its folder cannot be read: Permission denied") == 1


def test_an_unreadable_new_version_leaves_the_old_one_and_is_loaded_later(model, broken):
    for version in (1, 2):
        write_version(model.folder, version, scale(version))
    broken[model.folder / "2"] = errno.EIO
    assert model.start() == ["version 2: its folder cannot be read: Input/output error"]
    assert (model.ready, model.entries[1][1]) == ([1], "UNAVAILABLE")
    broken.clear()
    model.scan()
    model.scan()
    assert model.ready == [2]


@pytest.mark.parametrize("what", ["config.pbtxt", "1/model.onnx"])
def test_an_unreadable_file_keeps_the_model(model, broken, what):
    write_version(model.folder, 1, scale(1))
    model.start()
    broken[model.folder / what] = errno.EIO
    if what == "config.pbtxt":  # a directory entry answers `stat` itself
        assert model.scan() == ["m/config.pbtxt cannot be read: Input/output error"]
    for _ in range(3):
        model.scan()
    assert (model.ready, model.factor(1)) == ([1], 1)


def test_a_dangling_link_keeps_the_model_and_its_configuration(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    os.symlink("user@host.4711:1", model.folder / "1/.#manifest.json")
    os.symlink("nowhere", model.folder / "1/notes.txt")
    for _ in range(4):
        assert model.scan() == []
    assert (model.ready, model.factor(1)) == ([1], 1)
    (model.folder / "config.pbtxt").unlink()
    os.symlink("nowhere", model.folder / "config.pbtxt")
    for _ in range(4):
        assert model.scan() == ["m/config.pbtxt cannot be read: a link to nothing"]
    assert model.versions.ready()[1].spec.max_batch_size == 4


@pytest.mark.parametrize("what", ["model.onnx", "manifest.json", "golden.npz"])
def test_a_link_to_nothing_in_place_of_a_file_is_named(model, what):
    write_version(model.folder, 1, scale(1))
    model.start()
    (model.folder / "1" / what).unlink(missing_ok=True)
    os.symlink("nowhere", model.folder / "1" / what)
    for _ in range(3):
        model.scan()
    ((_, state, reason),) = model.entries
    assert (model.ready, state) == ([1], "READY")
    assert what in reason
    assert "a link to nothing" in reason


def test_an_unmounted_file_system_is_not_empty(model, monkeypatch):
    folder = write_version(model.folder, 1, scale(1))
    model.start()
    folder.rename(model.folder.parent / "away")
    real = versions_module.scan_model
    monkeypatch.setattr(versions_module, "scan_model", lambda path: replace(real(path), device=-1))
    for _ in range(3):
        assert model.scan() == ["its folder cannot be read: its file system is not mounted"]
    assert model.ready == [1]


def test_loading_a_model_whose_folder_is_gone_keeps_what_serves(model):
    write_version(model.folder, 1, scale(1))
    model.start()
    model.folder.rename(model.folder.parent / "away")
    assert model.start() == ["its folder is gone"]
    assert model.ready == [1]


def test_the_log_gives_the_true_reason_of_an_unload(model, caplog):
    for version in (1, 2):
        write_version(model.folder, version, scale(version))
    model.start()
    with caplog.at_level("INFO"):
        shutil.rmtree(model.folder / "2")
        model.scan()
        model.scan()
        write_version(model.folder, 3, scale(3), manifest={})
        model.scan()
    assert "m version 2 unloaded: its folder is gone" in caplog.text
    assert "m version 1 unloaded: the version policy selects other versions" in caplog.text


# ---- failures that may pass are tried again --------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: `clock.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(slot_module.time, "monotonic", lambda: clock.now)
    return clock


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), OSError("the disk is gone"), TransientLoadError("CUDA out of memory")]
)
def test_a_failure_that_may_pass_is_tried_again_with_growing_pauses(tmp_path, monkeypatch, clock, error):
    write_config(tmp_path / "m", SCALE_CONFIG)
    write_version(tmp_path / "m", 1, scale(1))
    attempts = []

    def fail(*arguments):
        attempts.append(clock.now)
        raise error

    monkeypatch.setattr(versions_module, "load_version", fail)
    versions = ModelVersions(tmp_path / "m", LoadSettings(device="cpu", num_threads=1), lambda: None, retry_s=2.0)
    versions.update(stable=True)
    assert versions.entries()[0].reason.endswith("; retry in 2 s")
    for _ in range(1000):
        clock.now += 1
        versions.update(stable=False)
    pauses = np.diff(attempts).tolist()
    assert pauses[:8] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert set(pauses[8:]) == {300}
    monkeypatch.setattr(versions_module, "load_version", load_version)
    clock.now += 300
    assert versions.update(stable=False) == []
    assert [(entry.state, entry.reason) for entry in versions.entries()] == [("READY", "")]
    versions.unload("the test is over")


def test_a_failure_that_cannot_pass_is_not_tried_again(tmp_path, monkeypatch, clock):
    write_config(tmp_path / "m", SCALE_CONFIG.replace('"x"', '"z"'))
    write_version(tmp_path / "m", 1, scale(1))
    versions = ModelVersions(tmp_path / "m", LoadSettings(device="cpu", num_threads=1), lambda: None, retry_s=2.0)
    versions.update(stable=True)
    monkeypatch.setattr(versions_module, "load_version", None)
    clock.now += 10_000
    (failure,) = versions.update(stable=False)
    assert failure == "version 1: the configuration has input 'z', but the model has 'x'"


# ---- closing ---------------------------------------------------------------------------------------------------------


def test_a_version_that_hangs_while_it_closes_is_left_behind(model, monkeypatch, caplog):
    monkeypatch.setattr(closing_module, "_CLOSE_PATIENCE_S", 0.1)
    write_version(model.folder, 1, scale(1))
    model.start()
    released = threading.Event()
    close = model.versions.ready()[1].batcher.close
    monkeypatch.setattr(model.versions.ready()[1].batcher, "close", lambda: (released.wait(60), close()))
    write_version(model.folder, 2, scale(2), manifest={})
    model.scan()
    assert (model.ready, model.factor(2)) == ([2], 2)
    assert "m version 1 has not finished its requests after 0.1 s: left behind" in caplog.text
    released.set()
