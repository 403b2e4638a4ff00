"""The files that a run leaves: its folder, checkpoints, metrics and results. Start reading at `run_folder`."""
