"""Linear probes on features made by hand, whose best classifier is known."""

import sys

import pytest
import torch
from conftest import TINY, filled
from PIL import Image
from sklearn.linear_model import LogisticRegression

import clip
from clip.preprocess import Preprocess
from clip.tasks import linear_probe
from clip.tasks.encode import gather
from clip.tasks.linear_probe import fit_linear_probe, probe_features, split

STRENGTHS = [10 ** (place / 8) for place in range(-48, 49)]  # the paper's 96 steps


def blobs(classes, each, spread, seed, width=5):
    """Points around the corners of a simplex, as many for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    return torch.eye(classes, width)[labels] + spread * torch.randn(len(labels), width, generator=generator), labels


def accuracy(probe, features, labels):
    return (probe(features).argmax(dim=1) == labels).double().mean().item()


@pytest.mark.parametrize("classes", [2, 3])
def test_what_can_be_separated_by_lines_is_separated(classes):
    train, validation, test = (blobs(classes, 12, 0.05, seed) for seed in (0, 1, 2))
    probe = fit_linear_probe(*train, *validation)
    assert probe.weight.shape == (classes, 5)
    assert accuracy(probe, *test) == 1


def test_features_that_say_nothing_teach_nothing():
    train, validation, test = (blobs(2, 200, 100.0, seed) for seed in (0, 1, 2))
    assert accuracy(fit_linear_probe(*train, *validation), *test) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_is_scikit_learns_with_the_best_strength_fitted_to_all(classes):
    train, validation, test = (blobs(classes, 20, 0.7, seed) for seed in (3, 4, 5))
    probe = fit_linear_probe(*train, *validation)

    by_hand = {}
    for strength in probe.validation_accuracy:
        regression = LogisticRegression(C=1 / strength, max_iter=1000)
        regression.fit(train[0].numpy(), train[1].numpy())
        by_hand[strength] = regression.score(validation[0].numpy(), validation[1].numpy())
    assert probe.validation_accuracy == pytest.approx(by_hand)
    assert by_hand[probe.strength] == max(by_hand.values())

    everything = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    regression = LogisticRegression(C=1 / probe.strength, max_iter=1000).fit(*(part.numpy() for part in everything))
    expected = torch.from_numpy(regression.predict_proba(test[0].numpy())).float()
    torch.testing.assert_close(probe(test[0]).softmax(dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("best", [-48, -17, 0, 5, 48])
def test_the_search_finds_a_single_peak_wherever_it_is_within_fifteen_fits(best):
    tried = linear_probe._search(lambda place: -abs(place - best))
    assert max(tried, key=tried.get) == best
    assert len(tried) <= 15


def test_only_steps_of_the_papers_grid_are_tried_first_every_second_decade():
    order = []
    linear_probe._search(lambda place: order.append(linear_probe._strength(place)) or 0.0)
    assert order[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert all(min(abs(strength / known - 1) for known in STRENGTHS) < 1e-9 for strength in order)


def test_of_equals_the_strongest_regularisation_wins():
    assert linear_probe._peak({-16: 0.9, 0: 0.9, 16: 0.8}) == 0


def test_a_split_keeps_back_a_fifth_of_each_class_and_every_picture_is_on_one_side():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 1 + [3] * 20)
    rest, kept = split(labels)
    assert torch.equal(torch.cat([rest, kept]).sort().values, torch.arange(36))
    assert labels[kept].bincount(minlength=4).tolist() == [2, 1, 0, 4]  # the only picture of a class is learned from


def test_a_split_follows_from_its_seed_alone():
    labels = torch.arange(3).repeat(50)
    before = torch.get_rng_state()
    same, again, other = (split(labels, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_split_with_nothing_to_keep_back_is_refused():
    with pytest.raises(ValueError, match="enough pictures to keep 20% back"):
        split(torch.arange(5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 0, 0], "at least two classes"),
        ([0, 0, 2, 2], "each with pictures to learn from"),
        ([0, 0, 1, 1], "validation"),  # which has a class 2
    ],
)
def test_classes_that_cannot_be_learned_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(torch.rand(4, 3), torch.tensor(labels), torch.rand(3, 3), torch.arange(3))


def test_features_that_are_no_numbers_are_refused():
    features = torch.rand(4, 3)
    features[2, 1] = torch.nan
    with pytest.raises(ValueError, match="no finite numbers"):
        fit_linear_probe(features, torch.tensor([0, 1, 0, 1]), torch.rand(2, 3), torch.arange(2))


def test_without_scikit_learn_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"clip-from-scratch\[evaluate\]"):
        fit_linear_probe(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]), torch.rand(2, 3), torch.arange(2))


# Features


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
    return [Image.fromarray(each) for each in pixels]


def test_features_of_a_vit_are_those_before_the_projection(pictures):
    model, preprocess = filled(TINY["vit"]), Preprocess(TINY["vit"]["image_resolution"])
    features = gather(probe_features(model, preprocess, pictures, batch_size=2)).values
    images = torch.stack([preprocess(picture) for picture in pictures])
    with torch.no_grad():
        projected = model.encode_image(images)
        model.visual.proj = None
        expected = model.visual(images)
    assert features.shape == (3, TINY["vit"]["vision_width"])
    torch.testing.assert_close(features, expected)
    assert projected.shape[1] != features.shape[1]


def test_features_of_a_resnet_are_those_of_its_attention_pool(pictures):
    model, preprocess = filled(TINY["rn"]), Preprocess(TINY["rn"]["image_resolution"])
    features = gather(probe_features(model, preprocess, pictures)).values
    with torch.no_grad():
        expected = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("name", ["OptimizedCLIP", "TextTower"])
def test_a_model_without_features_before_the_projection_is_refused(pictures, name):
    model, preprocess = filled(TINY["vit"]), Preprocess(TINY["vit"]["image_resolution"])
    model = clip.optimize(model) if name == "OptimizedCLIP" else clip.load("tiny", "cpu", tower="text")[0]
    with pytest.raises(ValueError, match=f"needs the plain model and its image tower, got {name}"):
        gather(probe_features(model, preprocess, pictures))


def test_the_model_is_left_as_it_was(pictures):
    model, preprocess = filled(TINY["vit"]), Preprocess(TINY["vit"]["image_resolution"])
    before = {name: parameter for name, parameter in model.named_parameters()}
    gather(probe_features(model, preprocess, pictures))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_a_picture_that_cannot_be_read_costs_its_own_row(pictures):
    model, preprocess = filled(TINY["vit"]), Preprocess(TINY["vit"]["image_resolution"])
    rows = gather(probe_features(model, preprocess, [pictures[0], "nowhere.png", pictures[1]], batch_size=1))
    assert rows.indices == [0, 2]
    assert list(rows.errors) == [1]
