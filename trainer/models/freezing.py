"""Freezing: the first part of a network keeps its weights, and its batch norms their statistics."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.errors import ConfigError, unknown_name


def freeze_until(network: nn.Module, until: str, *, name: str) -> list[nn.Module]:
    """Freezes all parameters before a module, in the order in which the network defines them.

    Args:
        until: the first module that is trained, such as `layer4` or `features.16`.
        name: the network's name, for messages.

    Returns:
        The batch norms before the module, which stay in evaluation mode.

    Raises:
        ConfigError: there is no such module, or nothing before it, or nothing to train is left.
    """
    modules = dict(network.named_modules())
    if until not in modules or not until:
        names = [known for known in modules if known and known.count(".") < 2]
        raise unknown_name(f"module of {name}", until, names)
    norms: list[nn.Module] = []
    is_anything_frozen = False
    for module_name, module in modules.items():
        if module_name == until:
            break
        norms += [module] if isinstance(module, _BatchNorm) else []
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
            is_anything_frozen = True
    if not is_anything_frozen:
        raise ConfigError(f"--freeze-until {until}: {name} has no weights before it")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"--freeze-until {until}: {name} has no weights left to train")
    return norms
