"""Files of weights: every usual form of them is read, none runs code, and tensors find their places in a network."""

import math
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from trainer.errors import ConfigError, DataError
from trainer.models import build_network
from trainer.models.weights import Weights, load_weights, read_weights


def lenet(num_classes: int = 10) -> nn.Module:
    return build_network("lenet5", num_channels=1, image_size=28, num_classes=num_classes, widths=())


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


FORMS: dict[str, Any] = {
    "a state dict": lambda weights: weights,
    "nested": lambda weights: {"epoch": 3, "state_dict": weights, "optimizer": {"state": {}}},
    "with averaged weights": lambda weights: {"model": {"x": torch.zeros(1)}, "ema": weights},
    "with figures of an average": lambda weights: {"model": weights, "ema": {"decay": 0.99}, "state_dict_ema": {}},
    "of timm's script": lambda weights: {"state_dict": weights, "args": Namespace(lr=0.1), "epoch": 3},
    "of DataParallel": lambda weights: prefixed(weights, "module."),
    "of torch.compile and DataParallel": lambda weights: prefixed(weights, "module._orig_mod."),
    "of a run with an average": lambda weights: {
        "model": {"x": torch.zeros(1)},
        "average": {"weights": prefixed(weights, "network."), "num_steps": torch.zeros(1)},
    },
    "of a run that keeps its best epoch": lambda weights: {
        "model": {"x": torch.zeros(1)},
        "average": {"weights": {"x": torch.ones(1)}},
        "best": {"epoch": 2, "score": [3.0, 0.5], "weights": prefixed(weights, "network.")},
    },
    "of a run that watches its best epoch": lambda weights: {
        "model": prefixed(weights, "network."),
        "best": {"epoch": 2, "score": [3.0, 0.5], "weights": None},
    },
    "of a run of Convoy": lambda weights: {"model": {"mean": torch.ones(1), **prefixed(weights, "network.")}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_state_dict_is_understood(form: str, tmp_path: Path) -> None:
    theirs = lenet().state_dict()
    torch.save(FORMS[form](theirs), tmp_path / "weights.pth")
    network = lenet()
    loaded = load_weights(network, read_weights(tmp_path / "weights.pth"), file="weights.pth", num_classes=10)
    assert (loaded.num_loaded, loaded.by_order, loaded.new, loaded.missing) == (len(theirs), False, (), ())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())


def test_safetensors_is_read_at_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    theirs = dict(lenet().state_dict())
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    path.write_bytes(safetensors.torch.save(theirs))
    assert {name: tensor.tolist() for name, tensor in read_weights(path).items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }


def test_the_head_of_other_classes_stays_new() -> None:
    theirs, network = lenet(10).state_dict(), lenet(3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loaded = load_weights(network, theirs, file="ten.pth", num_classes=3)
    total = len(theirs)
    assert loaded.describe() == f"ten.pth: {total - 2} of {total} tensors loaded; new: fc3.weight, fc3.bias"
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("fc3.") else theirs[name])


def test_another_implementation_of_the_network_is_matched_by_order() -> None:
    theirs = {
        f"layer_{number}.{name.rpartition('.')[2]}": t for number, (name, t) in enumerate(lenet().named_parameters())
    }
    network = lenet(3)
    loaded = load_weights(network, theirs, file="other.pth", num_classes=3)
    assert loaded.by_order
    assert "matched by their order, as the file has other names" in loaded.describe()
    first = next(iter(network.parameters()))
    assert torch.equal(first, next(iter(theirs.values())))


def test_missing_and_unused_tensors_are_named_and_too_many_are_refused() -> None:
    theirs = dict(lenet().state_dict())
    names = list(theirs)
    del theirs[names[0]]
    theirs |= {f"extra.{number}": torch.zeros(1) for number in range(5)}
    text = load_weights(lenet(), theirs, file="some.pth", num_classes=10).describe()
    assert text.endswith(f"; not in the file: {names[0]}; not used: extra.0, extra.1, extra.2 and 2 more")
    few = {name: theirs[name] for name in names[1:4]}
    with pytest.raises(ConfigError, match=r"these weights are of another network: some\.pth: 3 of \d+ tensors loaded"):
        load_weights(lenet(), few, file="some.pth", num_classes=10)


def test_filters_of_another_shape_are_told_and_norms_that_fit_do_not_make_up_for_them() -> None:
    def network(kernel: int, *, last: int = 3) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, kernel), nn.BatchNorm2d(8), nn.Conv2d(8, 8, last), nn.BatchNorm2d(8), nn.Linear(8, 4)
        )

    text = load_weights(network(3), network(5).state_dict(), file="some.pth", num_classes=4).describe()
    assert text == "some.pth: 13 of 14 tensors loaded; of another shape or kind in the file: 0.weight"
    with pytest.raises(
        ConfigError, match=r"of another network: .* of another shape or kind in the file: 0\.weight, 2\.weight"
    ):
        load_weights(network(3), network(5, last=1).state_dict(), file="some.pth", num_classes=4)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to(torch.int8),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.to(torch.complex64),
    ],
)
def test_tensors_of_another_kind_do_not_fit(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    theirs = lenet().state_dict()
    first, *_, last = theirs
    changed = {name: change(tensor) if name in (first, last) else tensor for name, tensor in theirs.items()}
    loaded = load_weights(lenet(), changed, file="some.pth", num_classes=10)
    assert (loaded.reshaped, loaded.new, loaded.num_loaded) == ((first, last), (), len(theirs) - 2)


def test_weights_of_a_training_that_diverged_are_refused() -> None:
    theirs = lenet().state_dict()
    next(iter(theirs.values())).view(-1)[3] = math.inf
    with pytest.raises(DataError, match=r"bad\.pth holds values of conv1\.weight that are not finite"):
        load_weights(lenet(), theirs, file="bad.pth", num_classes=10)


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("code-was-run",)


def test_no_code_from_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.pth")
    with pytest.raises(DataError, match=r"harmful\.pth holds objects that only code from the file could make"):
        read_weights(Path("harmful.pth"))
    assert not Path("code-was-run").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\3\4 and nothing else"])
def test_other_files_are_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} does not hold weights: ") as error:
        read_weights(tmp_path / name)
    assert "\n" not in str(error.value)
    if name.endswith(".pth") and not content.startswith(b"PK"):
        assert str(error.value).endswith(": torch.save did not write it")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(DataError, match=r"does not hold weights: it has no state dict; its keys are epoch$"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_weights(tmp_path / "missing.pth")
