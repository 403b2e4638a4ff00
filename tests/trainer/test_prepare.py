"""What is settled before a run begins."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.loop.runs import ALONE
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.files import write_json
from trainer.prepare import prepare, source_of
from trainer.recipes import RECIPES
from trainer.records.fingerprint import Fingerprint


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_run_is_continued_with_the_source_that_it_began_with(tmp_path: Path, is_streamed: bool) -> None:
    """Otherwise a machine with more memory could not continue it: the source is a part of the data set's identity."""
    config = TrainConfig(run_dir=tmp_path / "run")
    assert source_of(config, ALONE) == "auto"
    fingerprint = Fingerprint.of(
        RECIPES["mnist"], seed=0, image_size=None, dataset_sha256="d", virtual_shards=None, is_streamed=is_streamed
    )
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", {"fingerprint": fingerprint.values})
    assert source_of(config, ALONE) == ("streamed" if is_streamed else "resident")
    assert source_of(replace(config, source="resident"), ALONE) == "resident"
    assert source_of(replace(config, run_dir=None), ALONE) == "auto"


@pytest.mark.parametrize("config", [TrainConfig(precision="tf32"), TrainConfig(set=("precision=tf32",))])
def test_tf32_is_refused_where_there_is_none(config: TrainConfig) -> None:
    """Silently computed in float32, a run would neither be what its user asked for nor as fast."""
    with pytest.raises(
        ConfigError, match=r"^precision tf32: the CPU of rank 0 has no TF32, .*: use --precision float32$"
    ):
        prepare(config, ALONE, print)


def test_a_volume_that_ignores_fsgroup_is_an_error_of_its_own_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, on which a Job gives up; writing would fail with 4, which it retries."""
    monkeypatch.setattr("os.access", lambda path, mode: False)  # not by chmod: root may write to every folder
    monkeypatch.setattr("os.geteuid", lambda: 10001)
    with pytest.raises(ConfigError, match=rf"^--run-dir .*/runs/mnist: {tmp_path} is not writable for uid 10001: "):
        prepare(TrainConfig(run_dir=tmp_path / "runs/mnist"), ALONE, print)
