"""Settings of optimizers and schedules that several recipes share."""

from dataclasses import replace

from trainer.recipes.hyperparameters import ParameterKind, ParamGroup, Schedule

TO_ZERO = Schedule(points=((0.0, 1.0), (1.0, 0.0)))
"""Linear, from the first step to the last one."""
ONE_CYCLE = Schedule(points=((0.0, 0.04), (0.3, 1.0), (1.0, 0.0)))
"""A linear warm-up over three tenths of the run, then a linear descent."""


def same(group: ParamGroup) -> dict[ParameterKind, ParamGroup]:
    """Returns one setting for all groups of parameters."""
    return {"stem": group, "filters": group, "matrices": group, "vectors": group}


def airbench_groups(*, filters: float, batch_size: int) -> dict[ParameterKind, ParamGroup]:
    """Returns Muon for the filters and Nesterov SGD for the rest; airbench's rates are for the sum over a batch."""
    return {
        "filters": ParamGroup(lr=filters, momentum=0.6, optimizer="muon"),
        "matrices": ParamGroup(lr=0.67 * batch_size, momentum=0.85, weight_decay=2e-5),
        "vectors": ParamGroup(lr=0.053 * batch_size, momentum=0.85, weight_decay=2.5e-4),
        "stem": ParamGroup(lr=0.5, momentum=0.85, weight_decay=3.3e-3),
    }


def nesterov(lr: float) -> dict[ParameterKind, ParamGroup]:
    """Returns Nesterov SGD, without weight decay for biases and norms."""
    group = ParamGroup(lr=lr, momentum=0.9, weight_decay=5e-4)
    return {**same(group), "vectors": replace(group, weight_decay=0.0)}


def adamw(lr: float) -> dict[ParameterKind, ParamGroup]:
    """Returns AdamW, without weight decay for biases and norms."""
    group = ParamGroup(lr=lr, weight_decay=0.05, optimizer="adamw")
    return {**same(group), "vectors": replace(group, weight_decay=0.0)}
