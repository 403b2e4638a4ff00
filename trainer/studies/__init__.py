"""The lecture's experiments, each a command: `python -m trainer study NAME`.

A study writes figures (PNG and SVG), tables (CSV and Markdown) and one self-contained page into a folder in `runs/`.
After an interruption, the same command with the same `--run-dir` continues it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.studies.capacity import CapacityConfig, study_capacity
from trainer.studies.chain_rule import ChainRuleConfig, study_chain_rule
from trainer.studies.flops import FlopsConfig, study_flops
from trainer.studies.frameworks import FrameworksConfig, study_frameworks
from trainer.studies.perceptron import PerceptronConfig, study_perceptron
from trainer.studies.regression import RegressionConfig, study_regression
from trainer.studies.seeds import SeedsConfig, study_seeds
from trainer.studies.sweep import SweepConfig, study_sweep
from trainer.studies.zoo import ZooConfig, study_zoo


@dataclass(frozen=True, slots=True)
class Study:
    """A study: its command line, the function that runs it, and one line for the help."""

    config: type[Any]
    run: Callable[[Any], None]
    summary: str


STUDIES = {
    "regression": Study(RegressionConfig, study_regression, "a line through generated data (page 7)"),
    "perceptron": Study(PerceptronConfig, study_perceptron, "a perceptron; T and C told apart (pages 9 to 12)"),
    "chain-rule": Study(ChainRuleConfig, study_chain_rule, "the chain rule on a graph of operators (page 17)"),
    "flops": Study(FlopsConfig, study_flops, "the price of a FLOP, here and in the lecture (pages 35 and 36)"),
    "frameworks": Study(FrameworksConfig, study_frameworks, "the lecture's calls and its net by four means (page 39)"),
    "capacity": Study(CapacityConfig, study_capacity, "under-fitting and over-fitting (pages 46 to 51)"),
    "seeds": Study(SeedsConfig, study_seeds, "one recipe from many seeds (page 53)"),
    "zoo": Study(ZooConfig, study_zoo, "accuracy, multiply-adds and time of the families (page 37)"),
    "sweep": Study(
        SweepConfig, study_sweep, "a grid or random search that uses validation images only (pages 54 to 57)"
    ),
}
