"""From options to a model that loads: every source of pairs, every way to start, every refusal."""

import csv
import dataclasses
import json
import math
import sys

import pytest
import torch
from PIL import Image

import clip
from clip.config import CLIPConfig
from clip.training import run
from clip.training.log import read_log
from clip.training.options import TrainingOptions
from clip.training.run import prepare, train
from clip.training.trainer import Trainer

SMALL = CLIPConfig(16, 64, (1, 1, 1, 1), 16, None, 77, 49408, 32, 1, 1)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(run.MODELS, "small", SMALL)


@pytest.fixture
def table(tmp_path):
    """40 pictures of four colours, in folders of classes and in a table."""
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption", "id"))
        for number in range(40):
            name = list(COLOURS)[number % 4]
            folder = tmp_path / "classes" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), COLOURS[name]).save(folder / f"{number}.png")
            writer.writerow((f"classes/{name}/{number}.png", f"a {name} wall", number))
    return tmp_path / "captions.csv"


def options(captions, out, **others):
    captions = tuple(map(str, captions)) if isinstance(captions, list) else (str(captions),)
    given = dict(model="small", batch_size=8, steps=3, warmup=1, evaluate_every=2, validation=0.25, out=str(out))
    return TrainingOptions(captions=captions, **given | others)


def rows(folder):
    return read_log(folder / "log.jsonl")


def test_a_table_gives_a_model_that_loads(table, tmp_path):
    out = tmp_path / "run"
    trained = train(options(table, out)).model
    model, preprocess = clip.load(out / "best.safetensors", device="cpu")
    assert preprocess.transforms[0].size == 64
    assert model.visual.conv1.weight.shape == trained.visual.conv1.weight.shape
    assert {"options.json", "log.jsonl", "last.pt", "best.safetensors", "curves.png"} == {p.name for p in out.iterdir()}
    found = [row for row in rows(out) if "validation_loss" in row]
    assert [row["step"] for row in found] == [2, 3]
    assert {"picture_to_text_R@1", "text_to_picture_R@10"} <= found[0].keys()


def test_a_folder_of_classes_is_learned_and_classified(table, tmp_path):
    out, classes = tmp_path / "run", tmp_path / "classes"
    train(options(classes, out, zero_shot=str(classes), templates=("a {} wall",), validation=0.0))
    assert 0 <= rows(out)[-1]["zero_shot_accuracy"] <= 1


def test_the_drawn_world_needs_no_files(tmp_path):
    train(options("drawn", tmp_path / "run", steps=2, twins=True))
    assert {"drawn_things", "drawn_places"} <= rows(tmp_path / "run")[-1].keys()


def test_sources_are_mixed_by_their_shares(table, tmp_path):
    mixed = prepare(options([table, "drawn"], tmp_path / "run", shares=(1, 3), batch_size=400)).batches
    sources = next(mixed.epoch(0)).sources
    assert sum(source.startswith("draw ") for source in sources) / 400 == pytest.approx(0.75, abs=0.08)


def test_pictures_kept_for_validation_are_not_learned_from(table, tmp_path):
    learner = prepare(options(table, tmp_path / "run"))
    learned = {source for epoch in range(5) for batch in learner.batches.epoch(epoch) for source in batch.sources}
    assert 22 <= len(learned) <= 36  # about three quarters of 40


def test_what_is_held_out_is_neither_learned_nor_looked_at(table, tmp_path):
    held = [str(number) for number in range(0, 40, 2)]
    (tmp_path / "held.txt").write_text("\n".join(held) + "\n")
    learner = prepare(options(table, tmp_path / "run", holdout=str(tmp_path / "held.txt"), validation=0.0))
    learned = {source for epoch in range(5) for batch in learner.batches.epoch(epoch) for source in batch.sources}
    assert {source.rpartition("/")[2] for source in learned} == {f"{number}.png" for number in range(1, 40, 2)}


def test_a_held_out_id_that_is_not_there_is_no_silent_leak(table, tmp_path):
    (tmp_path / "held.txt").write_text("3\nthe fifth\n")
    with pytest.raises(ValueError, match=r"held\.txt: 1 of 2 ids belong to no picture, such as 'the fifth'"):
        prepare(options(table, tmp_path / "run", holdout=str(tmp_path / "held.txt")))


def test_an_id_may_have_spaces(table, tmp_path):
    table.write_text(table.read_text().replace("wall,7\n", "wall,the seventh\n").replace("wall,9\n", "wall,7\n"))
    (tmp_path / "held.txt").write_text("the seventh\n\n")
    learner = prepare(options(table, tmp_path / "run", holdout=str(tmp_path / "held.txt"), validation=0.0))
    assert len(learner.batches.dataset) == 39


def test_everything_held_out_leaves_nothing_to_learn_from(table, tmp_path):
    (tmp_path / "held.txt").write_text("\n".join(map(str, range(40))))
    with pytest.raises(ValueError, match="nothing is left to learn from"):
        prepare(options(table, tmp_path / "run", holdout=str(tmp_path / "held.txt")))


def test_the_caller_s_random_state_is_left_alone(table, tmp_path):
    before = torch.manual_seed(123).get_state()  # not the state that a run's own seed leads to
    train(options(table, tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), before)


def test_events_are_written_where_they_are_asked_for(table, tmp_path):
    train(options(table, tmp_path / "with", tensorboard=True))
    train(options(table, tmp_path / "without"))
    assert len(list((tmp_path / "with").glob("events.*"))) == 1
    assert not list((tmp_path / "without").glob("events.*"))


def test_without_matplotlib_a_run_ends_with_a_word_about_it_and_its_weights(table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"needs matplotlib: pip install"):
        train(options(table, tmp_path / "run"))
    assert (tmp_path / "run" / "best.safetensors").exists()
    assert not (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_norm": -1.0}, "max_norm must not be negative"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"text_lr": 0.0}, "text_lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"validation": 1.0}, "from 0 to below 1"),
        ({"loss": "hinge"}, "loss must be one of clip"),
        ({"freeze": ("text",), "thaw": 0}, "thaw must be positive"),
        ({"shares": (1, 2)}, "2 shares for 1 sources"),
        ({"epochs": 1.0}, "give one of them"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        options("drawn", tmp_path, **change)


def test_options_that_are_none_are_refused_by_their_file(tmp_path):
    (tmp_path / "options.json").write_text('{"captions": ["drawn"], "learning_rate": 1}')
    with pytest.raises(ValueError, match=r"options\.json: these are no options of a training run .*learning_rate"):
        TrainingOptions.read(tmp_path)


def test_a_stopped_run_goes_on_and_is_not_written_over(table, tmp_path, monkeypatch):
    whole, stopped = options(table, tmp_path / "whole", steps=6), options(table, tmp_path / "stopped", steps=6)
    stopped = dataclasses.replace(stopped, save_every=3)
    train(whole)
    update = Trainer.update

    def until_the_fifth(self, batch):
        if self.step == 4:
            raise MemoryError
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", until_the_fifth)
        with pytest.raises(MemoryError):
            train(stopped)
    with pytest.raises(ValueError, match="already holds a run; resume it"):
        train(stopped)
    train(stopped, resume=True)
    for name in ("loss", "validation_loss"):
        curves = [
            [(row["step"], row[name]) for row in rows(tmp_path / each) if name in row] for each in ("whole", "stopped")
        ]
        assert curves[0] == curves[1]
        assert curves[0][-1][0] == 6


def test_it_starts_from_a_checkpoint(table, tmp_path):
    train(options(table, tmp_path / "first"))
    first, _ = clip.load(tmp_path / "first" / "best.safetensors", device="cpu")
    second = prepare(options(table, tmp_path / "second", init=str(tmp_path / "first" / "best.safetensors")))
    for a, b in zip(first.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sizes_can_be_written_in_a_file(table, tmp_path):
    sizes = dataclasses.asdict(SMALL) | {"embed_dim": 24}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    model = prepare(options(table, tmp_path / "run", model=str(tmp_path / "sizes.json"))).model
    assert model.text_projection.shape == (32, 24)


def test_the_same_seed_gives_the_same_curve(table, tmp_path):
    curves = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(options(table, tmp_path / name, seed=seed, augment="artwork"))
        curves.append([row["loss"] for row in rows(tmp_path / name) if "loss" in row])
    assert curves[0] == curves[1] != curves[2]


def test_the_caller_s_weights_are_those_of_the_best_evaluation(table, tmp_path):
    train(options(table, tmp_path / "run", steps=4, evaluate_every=1))
    found = {row["step"]: row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row}
    assert all(map(math.isfinite, found.values()))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["training"]["best"] == min(found.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "ViT-Z"}, "model must be one of RN50, .*, or a .json file"),
        ({"model": "nowhere.json"}, "nowhere.json: expected a JSON object"),
        ({"init": "nowhere.pt"}, "nowhere.pt not found"),
        ({"validation": 0.99}, "fewer than one batch|nothing is left"),
        ({"batch_size": 64}, "fewer than one batch of 64"),
        ({"validation": 0.02, "seed": 1}, r"keeps only \d pictures?, too few to judge by"),
        ({"init": "openai"}, "openai released RN50"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(table, tmp_path, change, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(options(table, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_the_curves_of_a_run_that_stopped_are_drawn_too(table, tmp_path, monkeypatch):
    update = run.Trainer.update

    def stop_at_the_third(self, batch):
        if self.step == 2:
            raise MemoryError
        return update(self, batch)

    monkeypatch.setattr(run.Trainer, "update", stop_at_the_third)
    with pytest.raises(MemoryError):
        train(options(table, tmp_path / "run"))
    assert (tmp_path / "run" / "curves.png").exists()


def test_a_warm_up_longer_than_half_the_run_is_mentioned(table, tmp_path, caplog):
    prepare(options(table, tmp_path / "run", warmup=200))
    assert "the warm-up of 200 steps takes most of this run of 3" in caplog.text
