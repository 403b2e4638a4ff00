"""The training loop. Start reading at `fit`, the loop, and `step`, one training step.

`learner` builds model, optimizer and step for a recipe; `run` holds what the phases of a run share.
"""
