"""The trials of a study, which its ranks share."""

from pathlib import Path

import pytest

from tests.trainer.loop.runs import ALONE
from trainer.errors import CheckpointError
from trainer.studies.trials import wait_for_trials


def test_a_trial_whose_result_was_removed_ends_the_study(tmp_path: Path) -> None:
    """The main rank waited for it for ever."""
    trials = [tmp_path / "seed-0", tmp_path / "seed-1"]
    with pytest.raises(CheckpointError, match="seed-1 has lost its result: give the same command again"):
        wait_for_trials(ALONE, trials, lambda trial: trial.name == "seed-0")
    wait_for_trials(ALONE, trials, lambda trial: True)
