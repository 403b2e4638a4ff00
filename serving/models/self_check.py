"""The check of an instance that serves: tells one that is broken from one that gets requests which nobody can compute.

It runs what the version has passed while it was loaded: the golden batch, or else the first sample of `model_warmup`,
or else one row of zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from serving.backends import Backend
from serving.models.golden import check_golden
from serving.models.samples import Sample
from serving.models.spec import ModelSpec
from serving.models.warmup import run_checked, zero_row
from serving.protocol.tensors import Array


def make_check(
    spec: ModelSpec, golden: Mapping[str, Array], samples: Sequence[Sample], tolerance: float
) -> Callable[[Backend], object] | None:
    """Returns a function that raises LoadError if an instance fails; None if nothing is known that the model computes.

    Args:
        golden: inputs and outputs that the model has passed; empty for none.
        tolerance: as of `check_golden`.
    """
    if golden:
        tensors = {tensor.name for tensor in (*spec.inputs, *spec.outputs)} & golden.keys()
        rows = slice(spec.max_batch_size or None)  # one batch: the check keeps no more
        kept = {name: golden[name][rows].copy() if spec.max_batch_size else golden[name] for name in tensors}
        return partial(check_golden, spec=spec, golden=kept, tolerance=tolerance)
    if samples:
        return partial(run_checked, spec=spec, inputs=samples[0].inputs, rows=samples[0].rows)
    zeros = zero_row(spec)
    return (
        None
        if zeros is None
        else partial(run_checked, spec=spec, inputs=zeros, rows=1 if spec.max_batch_size else None)
    )
