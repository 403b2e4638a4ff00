"""torchrun's entry: `torchrun --nproc_per_node=4 trainer/main.py [--recipe mnist] …`; or `python trainer/main.py …`."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    # Python puts this file's folder first; the packages are beside it, not in it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from convoy.processes import whole_command

    with whole_command():
        from trainer.cli import train_command

        train_command(sys.argv[1:])
