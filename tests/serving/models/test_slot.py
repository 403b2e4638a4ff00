"""When a version that is broken is loaded again."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from serving.errors import LoadError
from serving.models import slot
from serving.models.slot import Fingerprint, Slot

FILES = Fingerprint(None, (), ())


@dataclass
class FakeBatcher:
    num_broken: int = 1
    is_healthy: bool = False


@dataclass
class FakeModel:
    batcher: FakeBatcher = field(default_factory=FakeBatcher)


def model(**options: Any) -> Any:
    return cast(Any, FakeModel(FakeBatcher(**options)))


def test_pauses_grow_while_it_breaks_again_and_begin_anew_after_a_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    version = Slot("READY", model=model(), attempted=FILES)
    pauses = []
    for _ in range(4):
        version.plan_reload_if_broken(2)
        pauses.append(version.pause_s)
        version.begin(FILES)
        version.succeed(model())
    monkeypatch.setattr(slot, "_CALM_S", 0.0)
    version.plan_reload_if_broken(2)
    assert [*pauses, version.pause_s] == [2, 4, 8, 16, 2]


def test_also_while_it_does_not_load() -> None:
    version = Slot("READY", model=model(), attempted=FILES, loaded=FILES)
    version.plan_reload_if_broken(2)
    version.begin(FILES)
    version.fail(LoadError("no device"), 2)
    assert version.retry_at is None
    version.plan_reload_if_broken(2)
    assert (version.pause_s, version.reason) == (4, "no device")
    assert version.model is not None
    version.model = model(num_broken=0, is_healthy=True)
    version.plan_reload_if_broken(2)
    assert (version.retry_at, version.reason) == (None, "")


def test_not_one_that_hangs_or_serves() -> None:
    for options in ({"num_broken": 0}, {"num_broken": 1, "is_healthy": True}):
        version = Slot("READY", model=model(**options), attempted=FILES)
        version.plan_reload_if_broken(2)
        assert version.retry_at is None


def test_new_files_that_do_not_load_are_tried_again_after_it_has_recovered() -> None:
    version = Slot("READY", model=model(), attempted=FILES)
    version.plan_reload_if_broken(2)
    version.begin(Fingerprint("{}", (), ()))
    version.fail(slot.TransientLoadError("no memory"), 2)
    version.plan_reload_if_broken(2)
    version.model = model(num_broken=0, is_healthy=True)
    version.plan_reload_if_broken(2)
    assert (version.retry_at is None, version.reason) == (False, "no memory")


def test_why_new_files_do_not_load_is_still_told_after_it_has_recovered() -> None:
    version = Slot()
    version.begin(FILES)
    version.succeed(model(num_broken=0, is_healthy=True))
    version.begin(Fingerprint("{}", (), ()))
    version.fail(LoadError("damaged"), 2)
    serving, version.model = version.model, model()
    version.plan_reload_if_broken(2)
    assert version.retry_at is not None
    version.model = serving
    version.plan_reload_if_broken(2)
    assert (version.retry_at, version.reason) == (None, "damaged")
