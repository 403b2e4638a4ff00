"""`python -m trainer VERB …`: all of training but `torchrun trainer/main.py`."""

import sys
from collections.abc import Callable, Sequence

from convoy.processes import whole_command
from convoy.verbs import Verb, run_verb
from trainer.cli import COMMANDS

PROG = "python -m trainer"

SUMMARIES = {
    "train": "train a model, the same as trainer/main.py",
    "evaluate": "measure a finished run's accuracy on its validation or test images",
    "export": "publish a finished run's model in a model repository",
    "watch": "follow runs while they train, in the terminal or on a page",
    "compare": "show finished runs in one table, with all their seeds",
    "study": "repeat the lecture's experiments: regression, capacity, seeds, zoo and others",
    "recipes": "list what can be trained, or all fields of a recipe",
    "data": "list, fetch, verify and import data sets",
}


def _run(verb: str) -> Callable[[Sequence[str]], int | None]:
    return lambda arguments: COMMANDS[verb](arguments, f"{PROG} {verb}")


VERBS = {verb: Verb(summary, _run(verb)) for verb, summary in SUMMARIES.items()}

if __name__ == "__main__":
    with whole_command():
        sys.exit(run_verb(PROG, VERBS, sys.argv[1:]))
