"""The lecture's experiments, each a command: `python -m trainer study NAME`.

A study writes figures (PNG and SVG), tables (CSV and Markdown) and one self-contained page into a folder in `runs/`.
After an interruption, the same command with the same `--run-dir` continues it.
"""

import importlib
from collections.abc import Callable
from typing import Any

STUDIES = {
    "regression": "a line through generated data (page 7)",
    "perceptron": "a perceptron; T and C told apart (pages 9 to 12)",
    "chain-rule": "the chain rule on a graph of operators (page 17)",
    "flops": "the price of a FLOP, here and in the lecture (pages 35 and 36)",
    "frameworks": "the lecture's calls and its net by four means (page 39)",
    "capacity": "under-fitting and over-fitting (pages 46 to 51)",
    "seeds": "one recipe from many seeds (page 53)",
    "zoo": "accuracy, multiply-adds and time of the families (page 37)",
    "sweep": "a grid or random search that uses validation images only (pages 54 to 57)",
}
"""The studies, each with one line for the help."""


def load_study(name: str) -> tuple[type[Any], Callable[[Any], None]]:
    """Returns a study's command line and the function that runs it. Imports torch, which the list need not wait for.

    The study `chain-rule` is the function `study_chain_rule` of the module `chain_rule`; its `config` is the command
    line.
    """
    name = name.replace("-", "_")
    study = getattr(importlib.import_module(f"trainer.studies.{name}"), f"study_{name}")
    return study.__annotations__["config"], study
