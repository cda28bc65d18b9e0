"""Which weights move how: decay on matrices alone, settings of each family, the schedule, frozen towers."""

import itertools
import math

import pytest
import torch
from conftest import TINY

from clip.model import CLIP
from clip.training.optimizer import adamw, freeze, tower_of, training_mode, warmup_cosine


@pytest.fixture(params=["vit", "rn"])
def model(request):
    return CLIP(**TINY[request.param])


def group_of(optimizer, parameter):
    (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
    return group


def test_gains_biases_and_the_temperature_do_not_decay_and_all_else_does(model):
    optimizer = adamw(model, 1e-3, 0.2)
    for name, parameter in model.named_parameters():
        vector = name.endswith(("bias", "logit_scale", "class_embedding")) or ".ln_" in name or ".bn" in name
        vector |= name.endswith(("ln_final.weight", "downsample.1.weight"))
        assert group_of(optimizer, parameter)["weight_decay"] == (0 if vector else 0.2), name


def test_every_parameter_is_in_one_group(model):
    optimizer = adamw(model, 1e-3, 0.2)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))


def test_settings_of_adam_are_those_of_table_18():
    vit, rn = (adamw(CLIP(**TINY[kind]), 1e-3, 0.2).defaults for kind in ("vit", "rn"))
    assert (vit["betas"], vit["eps"]) == ((0.9, 0.98), 1e-6)
    assert (rn["betas"], rn["eps"]) == ((0.9, 0.999), 1e-8)


def test_each_tower_has_its_learning_rate(model):
    optimizer = adamw(model, 1e-3, 0.2, image_lr=1e-4, text_lr=0.0)
    assert group_of(optimizer, model.visual.conv1.weight)["top_lr"] == 1e-4
    assert group_of(optimizer, model.token_embedding.weight)["top_lr"] == 0.0
    assert group_of(optimizer, model.logit_scale)["top_lr"] == 1e-3


def test_one_step_is_adam_s_formula_worked_by_hand():
    model = CLIP(**TINY["vit"])
    optimizer = adamw(model, 0.01, 0.2)
    weight = model.text_projection
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    # m̂ = 3, v̂ = 9: the first step is lr · 3 / (3 + ε), after a decay by lr · 0.2
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.2) - 0.01 * 3 / (3 + 1e-6))


def test_the_schedule_rises_peaks_and_ends_at_nothing():
    shares = [warmup_cosine(step, 10, 110) for step in range(111)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1
    assert shares[60] == pytest.approx(0.5)
    assert shares[110] == 0
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))


def test_an_unknown_length_stays_at_the_top():
    assert warmup_cosine(10**6, 10, math.inf) == 1


def test_without_warm_up_the_first_step_is_the_highest():
    assert warmup_cosine(0, 0, 5) == 1


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_does_not_move(model, tower):
    freeze(model, [tower])
    optimizer = adamw(model, 0.1, 0.2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (tower_of(name) == tower), name


def test_a_frozen_resnet_keeps_its_statistics():
    model = CLIP(**TINY["rn"])
    freeze(model, ["image"])
    training_mode(model)
    model.encode_image(torch.randn(2, 3, 64, 64))
    assert model.visual.bn1.num_batches_tracked == 0
    assert model.transformer.training


def test_freezing_everything_or_what_does_not_exist_is_refused(model):
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, ["image", "text"])
    with pytest.raises(ValueError, match=r"image, text; got tail"):
        freeze(model, ["tail"])
