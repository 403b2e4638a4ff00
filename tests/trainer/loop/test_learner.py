"""The learner that is built for a recipe."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.loop.runs import ALONE, SHORT, losses, make_run
from trainer.data import Dataset, ImageSet
from trainer.data.augment import draw_params
from trainer.data.order import dropout_seeds
from trainer.hardware import allow_tf32, tf32_settings
from trainer.loop.learner import initial_model
from trainer.loop.step import Batch
from trainer.models.airbench import AirbenchNet
from trainer.recipes import RECIPES, ParamGroup, Precision, Recipe
from trainer.records.checkpoint import weights_sha256


def test_pixels_are_normalised_inside_the_model(mini: Dataset, tmp_path: Path) -> None:
    model = make_run(SHORT, mini, tmp_path / "run").learner.model
    images = model.normalize(mini.train.images)
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-4)
    assert {"mean", "deviation"} <= set(model.state_dict())


def test_fine_tuning_normalises_as_the_published_weights_were_trained(
    mini: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet's values, whatever the images at hand look like; every other recipe takes those of its images."""
    monkeypatch.setattr("trainer.models.start.build_network", lambda *_, **__: torch.nn.Identity())
    colour = replace(mini, train=ImageSet(mini.train.images[:4].expand(-1, 3, -1, -1), mini.train.labels[:4]))
    of_files = ("finetune-network", "finetune-efficientnet-lite0")  # tests/trainer/models has tests of these
    for name, recipe in RECIPES.items():
        if name in of_files:
            continue
        model = initial_model(recipe, colour, torch.arange(4), seed=0)
        expected = torch.tensor(mini.mean).expand(3)
        if name.startswith("finetune-"):
            expected = 255 * torch.tensor([0.5] * 3 if name.endswith("googlenet") else [0.485, 0.456, 0.406])
        assert torch.allclose(model.mean.flatten(), expected), name


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_learner_computes_and_records_the_precision_of_its_recipe(
    precision: Precision, mini: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself allows TF32 for convolutions: `float32` would be TF32 on every GPU since Ampere."""
    allow_tf32(precision != "tf32")
    monkeypatch.setattr("trainer.hardware.has_tf32", lambda device: True)
    monkeypatch.setattr("trainer.hardware.has_fast_bfloat16", lambda device: True)
    learner = make_run(replace(SHORT, precision=precision), mini, tmp_path / "run").learner
    assert learner.precision == precision
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    with learner.train_step._autocast():
        assert torch.is_autocast_enabled("cpu") == (precision == "bfloat16")
    with torch.inference_mode():
        served = learner.model.eval()(mini.train.images[:10])
    assert torch.equal(learner.predict(mini.train.images[:10]), served)


def test_whitening_is_computed_in_float32(mini: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment, or an earlier run with `tf32`, would decide the initial weights on a GPU."""
    allow_tf32(True)
    settings: list[tuple[bool, bool]] = []
    monkeypatch.setattr(AirbenchNet, "init_whitening", lambda self, images: settings.append(tf32_settings()))
    initial_model(RECIPES["cifar10"], mini, torch.arange(4), seed=0)
    assert settings == [(False, False)]
    assert tf32_settings() == (True, True)


def test_the_seed_alone_decides_the_initial_weights(mini: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(11)
    first = weights_sha256(make_run(SHORT, mini, tmp_path / "a").learner.model)
    torch.manual_seed(12)
    before = torch.get_rng_state()
    assert weights_sha256(make_run(SHORT, mini, tmp_path / "b").learner.model) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_sha256(make_run(SHORT, mini, tmp_path / "c", seed=1).learner.model) != first


def test_each_kind_of_parameter_has_its_group(mini: Dataset, tmp_path: Path) -> None:
    frozen = ParamGroup(lr=0.0)
    for kind in ("filters", "matrices", "vectors"):
        groups = {
            **SHORT.param_groups,
            **dict.fromkeys(("stem", "filters", "matrices", "vectors"), frozen),
            kind: ParamGroup(lr=0.1),
        }
        run = make_run(replace(SHORT, param_groups=groups), mini, tmp_path / kind)
        before = {name: p.detach().clone() for name, p in run.learner.model.named_parameters()}
        model = run.learner.model
        model(mini.train.images[:100]).square().sum().backward()
        run.learner.optimizer.step(torch.tensor(1.0))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        ndim = {"filters": 4, "matrices": 2, "vectors": 1}[kind]
        assert changed == {name for name, p in model.named_parameters() if p.ndim == ndim}


def test_the_head_has_a_rate_of_its_own(mini: Dataset, tmp_path: Path) -> None:
    def changes(recipe: Recipe, folder: str) -> dict[str, torch.Tensor]:
        learner = make_run(recipe, mini, tmp_path / folder).learner
        before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
        learner.model(mini.train.images[:100]).square().sum().backward()
        learner.optimizer.step(torch.tensor(1.0))
        return {name: p.detach() - before[name] for name, p in learner.model.named_parameters()}

    usual, quick = changes(SHORT, "usual"), changes(replace(SHORT, head_lr=3.0), "quick")
    heads = {name for name in usual if not torch.equal(usual[name], quick[name])}
    assert {name.rpartition(".")[0] for name in heads} == {"network.fc2"}
    for name in heads:
        torch.testing.assert_close(quick[name], 3 * usual[name], rtol=1e-4, atol=1e-6)
    group = {**SHORT.param_groups, "head": ParamGroup(lr=0.0)}
    own = changes(replace(SHORT, param_groups=group), "own")
    assert {name for name in own if not own[name].any()} == heads


DROPOUT_NET = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, num_classes),
    )
"""


def test_a_users_network_with_dropout_and_a_frozen_part_is_trained_exactly(mini: Dataset, tmp_path: Path) -> None:
    """The process's random numbers change nothing, and frozen weights and statistics stay as they are."""
    (tmp_path / "own.py").write_text(DROPOUT_NET)
    recipe = replace(SHORT, network=f"{tmp_path / 'own.py'}:net", freeze_until="3", epochs=1)
    small = replace(mini, train=ImageSet(mini.train.images[:400], mini.train.labels[:400]))
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run = make_run(recipe, small, tmp_path / f"run{seed}")
        before = {name: tensor.clone() for name, tensor in run.learner.model.state_dict().items()}
        losses(run, 3)
        after = run.learner.model.state_dict()
        digests.append(weights_sha256(run.learner.model))
    assert digests[0] == digests[1]
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    frozen = {name for name in after if name.startswith(("network.0.", "network.1."))}
    assert unchanged == {"mean", "deviation"} | frozen


def test_the_recipes_test_time_views_are_a_second_figure(mini: Dataset, tmp_path: Path) -> None:
    recipe = replace(SHORT, test_time_views="mirrored")
    learner = make_run(recipe, mini, tmp_path / "run").learner
    pixels = mini.train.images[:10]
    with torch.no_grad():
        expected = (learner.model(pixels) + learner.model(pixels.flip(-1))) / 2
        one_view = learner.model(pixels)
    assert torch.allclose(learner.predict(pixels, learner.recipe.test_time_views), expected, atol=1e-6)
    assert torch.allclose(learner.predict(pixels), one_view, atol=1e-6)
    seen = learner.evaluate(mini.train, torch.arange(10), ALONE)
    assert torch.equal(seen.predicted, one_view.argmax(dim=1))
    assert seen.predicted_with_views is not None
    assert torch.equal(seen.predicted_with_views, expected.argmax(dim=1))
    learner = replace(learner, recipe=SHORT)
    assert learner.evaluate(mini.train, torch.arange(10), ALONE).predicted_with_views is None


# The families learn too slowly for a dozen steps, and some take minutes: tests/trainer/models has steps of each.
LIGHT = [recipe for recipe in RECIPES.values() if recipe.network in ("lecture", "compact", "airbench")]


@pytest.mark.parametrize("recipe", LIGHT, ids=lambda recipe: recipe.name)
def test_every_recipe_learns(recipe: Recipe, mini: Dataset, tmp_path: Path) -> None:
    """A few steps of each on one small batch of real digits lower its loss, however a CPU rounds bfloat16."""
    num_images = 40 if recipe.name.startswith("cifar10") else 100  # these take a second for a step of 100
    share_of_batch = num_images / recipe.global_batch_size  # the whole rate on so few images is chaos for some
    recipe = replace(recipe, dataset="mnist-mini", global_batch_size=num_images)
    run = make_run(recipe, mini, tmp_path / "run")
    augment_params, seeds = draw_params(recipe.augment, len(mini.train), 0, 0), dropout_seeds(len(mini.train), 0, 0)
    seen, indices = [], run.train_indices[:num_images]
    run.learner.model.train()
    for _ in range(12):
        batch = Batch(
            images=mini.train.images,
            indices=indices,
            labels=mini.train.labels[indices],
            augment_params=augment_params[indices],
            dropout_seeds=seeds[indices],
            sizes=(num_images,),
            num_images=num_images,
            lr_factor=torch.tensor(share_of_batch),
        )
        seen.append(run.learner.step(batch)[0].item())
    assert all(torch.isfinite(torch.tensor(seen)))
    assert min(seen) < 0.93 * seen[0]
