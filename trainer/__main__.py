"""`python -m trainer VERB …`: everything but a run under torchrun, which is `trainer/main.py`."""

import sys
from collections.abc import Callable, Sequence

from convoy.processes import exit_on_broken_pipe
from trainer.cli import (
    compare_command,
    data_command,
    evaluate_command,
    export_command,
    recipes_command,
    study_command,
    train_command,
)

VERBS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "train": ("one training run; the same as trainer/main.py", train_command),
    "evaluate": ("the accuracy of a finished run, on its validation or its test images", evaluate_command),
    "export": ("a finished run's model for servers: checked, and published in a model repository", export_command),
    "compare": ("finished runs in one table, with all their seeds", compare_command),
    "study": ("the lecture's experiments: regression, capacity, seeds, zoo, sweep", study_command),
    "recipes": ("what can be trained", recipes_command),
    "data": ("list, fetch, verify and import data sets", data_command),
}


def main(arguments: Sequence[str]) -> None:
    """Hand the rest of the command line to the verb."""
    usage = "usage: python -m trainer VERB [OPTIONS]\n\n" + "\n".join(
        f"  {verb:10s} {what}" for verb, (what, _) in VERBS.items()
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + "\n\npython -m trainer VERB --help tells its options")
        sys.exit(0 if arguments else 2)
    if arguments[0] not in VERBS:
        print(f"error: no verb {arguments[0]!r}\n{usage}", file=sys.stderr)
        sys.exit(2)
    VERBS[arguments[0]][1](arguments[1:])


if __name__ == "__main__":
    with exit_on_broken_pipe():
        main(sys.argv[1:])
