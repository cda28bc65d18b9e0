"""`clip evaluate` on drawn pictures, which the embedded model knows."""

import csv
import json
import random
import shutil
import sys

import pytest
import torch
from conftest import TINY, filled
from PIL import Image, ImageChops

import clip
from clip.app import evaluate
from clip.app.cli import main
from clip.app.confusion import commonest_confusions, draw_confusion
from clip.app.evaluate import TEMPLATES
from clip.app.published import datasets, published
from clip.checkpoints.released import MODELS, sha256_of
from clip.preprocess import Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather
from clip.tasks.metrics import mean_reciprocal_rank_at_k, recall_at_k
from clip.training.data import read_captions
from clip.training.drawn import Scene, Thing, draw_scene, write_folder

COLOURS = ("red", "yellow", "green", "blue", "black")


def draw(kind, colour, seed, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scene(Scene((Thing(kind, colour),)), random.Random(f"{kind} {colour} {seed}"), 64).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of classes: fish by their colour, and three kinds of thing of all these colours."""
    folder = tmp_path_factory.mktemp("evaluate")
    for colour in COLOURS:
        for seed in range(3):
            draw("fish", colour, seed, folder / "fish" / f"{colour}_fish" / f"{seed}.png")
        for kind in ("house", "key", "star"):
            draw(kind, colour, 1, folder / "train" / kind / f"{colour}.png")
            draw(kind, colour, 2, folder / "validation" / kind / f"{colour}.png")
            draw(kind, colour, 3, folder / "test" / kind / f"{colour}.png")
    write_folder(folder / "captioned", 20, seed=3)
    return folder


def run(capsys, *arguments, model="tiny"):
    """Exit code, what was printed, and what was complained of."""
    code = main(["evaluate", *map(str, arguments), "--model", model, "--device", "cpu"])
    return code, *capsys.readouterr()


# Zero-shot


def test_the_colour_of_a_fish_is_recognised_without_any_training(data, capsys):
    code, out, _ = run(capsys, "zero-shot", data / "fish", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["pictures"], answer["classes"], answer["unreadable"]) == (15, 5, 0)
    assert answer["top_1"] >= 0.9
    assert answer["mean_per_class"] == pytest.approx(answer["top_1"])  # three pictures each


def test_wrong_names_are_scored_as_wrong(data, tmp_path, capsys):
    shifted = [f"{colour}_fish\t{COLOURS[i - 1]} fish" for i, colour in enumerate(COLOURS)]
    (tmp_path / "names.txt").write_text("# the colour before\n\n" + "\n".join(shifted))
    _, out, _ = run(capsys, "zero-shot", data / "fish", "--labels", tmp_path / "names.txt", "--json")
    assert json.loads(out)["top_1"] <= 0.1


def test_names_without_pictures_are_wrong_answers_that_can_be_given(data, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{colour} fish" for colour in (*COLOURS, "white", "brown")))
    _, out, _ = run(capsys, "zero-shot", data / "fish", "--labels", names, "--json")
    answer = json.loads(out)
    assert answer["classes"] == 7
    assert answer["top_1"] >= 0.8
    assert "top_5" in answer  # of five classes it would say nothing


def test_a_table_of_labels_gives_what_the_folders_give(data, tmp_path, capsys):
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption"))
        for picture in sorted((data / "fish").rglob("*.png")):
            table.writerow((picture.relative_to(data), picture.parent.name))
    _, folders, _ = run(capsys, "zero-shot", data / "fish", "--json")
    _, table, _ = run(capsys, "zero-shot", tmp_path / "labels.csv", "--images", data, "--json")
    assert json.loads(table) == json.loads(folders)


def test_templates_come_from_a_file_or_by_the_name_of_those_the_paper_quotes(data, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("{}\nnot {}\na picture of {}\n")
    _, mine, _ = run(capsys, "zero-shot", data / "fish", "--templates", tmp_path / "mine.txt", "--json")
    _, sizes, _ = run(capsys, "zero-shot", data / "fish", "--templates", "sizes", "--json")
    assert (json.loads(mine)["templates"], json.loads(sizes)["templates"]) == (3, 2)


def test_shipped_templates_have_a_place_for_the_name_and_say_where_the_paper_has_them():
    files = sorted(TEMPLATES.glob("*.txt"))
    assert {file.stem for file in files} == {"pets", "photo", "satellite", "sizes"}
    for file in files:
        section, *sentences = file.read_text(encoding="utf-8").splitlines()
        assert section.startswith("# CLIP §3.1.4")
        assert all("{}" in sentence for sentence in sentences)


def test_the_table_names_the_figures_and_the_confusions(data, capsys):
    code, out, _ = run(capsys, "zero-shot", data / "test", "--templates", "satellite")
    assert code == 0
    assert "zero-shot of tiny" in out
    assert "top-1 accuracy" in out
    assert "mean per class accuracy" in out
    _, answer, _ = run(capsys, "zero-shot", data / "test", "--templates", "satellite", "--json")
    assert f"{json.loads(answer)['top_1']:.1%}" in out


# Retrieval


def test_retrieval_says_what_the_library_says_in_both_directions(data, capsys):
    code, out, _ = run(capsys, "retrieval", data / "captioned" / "captions.csv", "--at", 1, 3, "--json")
    answer = json.loads(out)
    assert code == 0

    model, preprocess = clip.load("tiny", device="cpu")
    items = read_captions(data / "captioned" / "captions.csv")
    images = gather(encode_images(model, preprocess, [item.source for item in items])).values
    similarities = images @ encode_texts(model, [item.captions[0] for item in items]).T
    identities = [item.identity for item in items]
    right = torch.tensor([[one == other for other in identities] for one in identities])
    for name, *asked in (("picture_to_text", similarities, right), ("text_to_picture", similarities.T, right.T)):
        for k in (1, 3):
            assert answer[f"{name}_R@{k}"] == pytest.approx(recall_at_k(*asked, (k,))[k])
            assert answer[f"{name}_MRR@{k}"] == pytest.approx(mean_reciprocal_rank_at_k(*asked, (k,))[k])
    assert answer["text_to_picture_R@3"] >= 0.8  # the model knows these scenes


def test_several_captions_of_a_picture_ask_one_by_one_and_are_all_right(data, tmp_path, capsys):
    rows = [{"image_path": f"{c}_fish/0.png", "captions": [f"a {c} fish", f"a drawing of a {c} fish"]} for c in COLOURS]
    (tmp_path / "fish.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, out, _ = run(capsys, "retrieval", tmp_path / "fish.jsonl", "--images", data / "fish", "--json")
    answer = json.loads(out)
    assert (answer["pictures"], answer["captions"]) == (5, 10)
    assert answer["text_to_picture_R@1"] >= 0.8


def test_a_prefix_is_put_before_each_caption(data, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "encode_texts", lambda model, texts, **_: seen.extend(texts) or torch.rand(20, 256))
    run(capsys, "retrieval", data / "captioned" / "captions.csv", "--prefix", "a photo of ")
    assert len(seen) == 20
    assert all(text.startswith("a photo of ") for text in seen)


# Linear probe


@pytest.mark.parametrize("own", [False, True], ids=["a fifth of TRAIN", "VALIDATION"])
def test_a_linear_probe_learns_kinds_of_thing(data, capsys, own):
    validation = ["--validation", data / "validation"] if own else []
    code, out, _ = run(capsys, "linear-probe", data / "train", data / "test", *validation, "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["train_pictures"], answer["test_pictures"], answer["classes"]) == (15, 15, 3)
    assert answer.get("validation_pictures") == (15 if own else None)
    assert answer["top_1"] >= 0.8
    assert 1e-6 <= answer["strength"] <= 1e6


def test_the_pictures_of_each_set_are_counted_by_themselves(data, tmp_path, capsys):
    sets = {"train": 2, "validation": 1, "test": 0}
    for name, broken in sets.items():
        shutil.copytree(data / name, tmp_path / name)
        for number in range(broken):
            (tmp_path / name / "key" / f"broken {number}.png").write_bytes(b"no picture")
    arguments = ["linear-probe", tmp_path / "train", tmp_path / "test", "--validation", tmp_path / "validation"]
    code, out, err = run(capsys, *arguments, "--json")
    answer = json.loads(out)
    assert code == 1
    assert {name: answer[f"{name}_unreadable"] for name in sets} == sets
    assert {answer[f"{name}_pictures"] for name in sets} == {15}
    assert err.count("broken") == 3

    _, out, _ = run(capsys, *arguments)
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "pictures", "15"] in rows
    assert ["train", "unreadable", "2"] in rows


def test_a_class_that_was_not_learned_cannot_be_tested(data, capsys):
    code, out, err = run(capsys, "linear-probe", data / "train", data / "fish")
    assert (code, out) == (2, "")
    assert "'black fish' is no class of" in err


def test_without_scikit_learn_a_probe_says_so_before_it_computes(data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setattr(evaluate, "load_model", None)
    code, _, err = run(capsys, "linear-probe", data / "train", data / "test")
    assert code == 2
    assert "pip install clip-from-scratch[evaluate]" in err


# Published figures


def test_the_published_figure_stands_beside_the_measured_one_with_its_source(data, capsys, monkeypatch):
    stand_in = filled(TINY["vit"]), Preprocess(TINY["vit"]["image_resolution"])
    monkeypatch.setattr(evaluate, "load_model", lambda options, **_: stand_in)
    _, out, _ = run(capsys, "zero-shot", data / "fish", "--dataset", "imagenet", model="ViT-B/32")
    [row] = [line for line in out.splitlines() if line.startswith("top-1")]
    assert "63.2 % (CLIP Table 11), 63.32 % (open_clip), 63.33 % (CLIP_benchmark)" in row
    _, out, _ = run(capsys, "linear-probe", data / "train", data / "test", "--dataset", "sun397", model="ViT-B/32")
    assert "76.6 % (CLIP Table 10, by one transcription)" in out
    _, out, _ = run(capsys, "zero-shot", data / "fish", "--dataset", "imagenet", "--json", model="ViT-B/32")
    first = json.loads(out)["published"][0]
    assert first == {"name": "top_1", "percent": 63.2, "source": "CLIP Table 11"}


def test_the_papers_top_5_accuracy_is_known():
    [figure, _] = [each for each in published("zero-shot", "imagenet", "ViT-L/14@336px") if each.name == "top_5"]
    assert (figure.percent, figure.source) == (95, "CLIP §3.1.3, by one transcription")


def test_a_released_file_is_known_by_its_content(data, tmp_path, capsys, monkeypatch):
    clip.save(filled(TINY["vit"]), tmp_path / "copy.pt")
    arguments = ("zero-shot", data / "fish", "--dataset", "imagenet")
    _, out, _ = run(capsys, *arguments, model=str(tmp_path / "copy.pt"))
    assert "nothing published about" in out
    digest = sha256_of(tmp_path / "copy.pt").hexdigest()
    monkeypatch.setitem(MODELS, "ViT-L/14", f"https://host.invalid/{digest}/ViT-L-14.pt")
    _, out, _ = run(capsys, *arguments, model=str(tmp_path / "copy.pt"))
    assert "75.3 % (CLIP Table 11)" in out


def test_nothing_is_published_about_the_embedded_model(data, capsys):
    _, out, _ = run(capsys, "zero-shot", data / "fish", "--dataset", "pets")
    assert "nothing published about tiny on pets" in out


@pytest.mark.parametrize("task", ["zero-shot", "retrieval", "linear-probe"])
def test_published_figures_are_percentages_of_released_models_under_names_that_are_measured(task):
    names = {"top_1", "top_5", "mean_per_class"}
    if task == "retrieval":
        names = {f"{direction}_R@{k}" for direction in ("picture_to_text", "text_to_picture") for k in (1, 5, 10)}
    found = [figure for dataset in datasets(task) for model in MODELS for figure in published(task, dataset, model)]
    assert {figure.name for figure in found} <= names
    assert all(10 < figure.percent < 100 and figure.source for figure in found)
    for dataset in datasets(task):
        assert any(published(task, dataset, model) for model in MODELS)


def test_figures_of_different_sources_are_near_each_other():
    """A digit mistyped in a table would mostly show here; MNIST and CIFAR10 are known to be far apart."""
    for dataset in set(datasets("zero-shot")) - {"mnist", "cifar10"}:
        for model in MODELS:
            values = [f.percent for f in published("zero-shot", dataset, model) if f.name != "top_5"]
            assert max(values, default=0) - min(values, default=0) < 4


# Pictures that cannot be read, and what else can go wrong


def test_a_bad_picture_is_named_and_left_out(tmp_path, capsys):
    for kind in ("house", "key"):
        for number, colour in enumerate(COLOURS):
            draw(kind, colour, 0, tmp_path / kind / f"{number}.png")
    (tmp_path / "key" / "broken.png").write_bytes(b"no picture")
    code, out, err = run(capsys, "zero-shot", tmp_path, "--json")
    answer = json.loads(out)
    assert code == 1
    assert (answer["pictures"], answer["unreadable"]) == (10, 1)
    assert err.count("broken.png") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero-shot", "DATA/nowhere.csv"], "nowhere.csv"),
        (["zero-shot", "DATA/fish", "--templates", "cats"], "nor is it one of pets, photo, satellite, sizes"),
        (["zero-shot", "DATA/fish", "--templates", "DATA/few.txt"], "where the label goes"),
        (["zero-shot", "DATA/fish", "--labels", "DATA/few.txt"], "'black fish' is called (missing: 4 of 5 classes)"),
        (["zero-shot", "DATA/fish", "--labels", "DATA/empty.txt"], "at least one line"),
        (["zero-shot", "DATA/fish", "--labels", "DATA/twice.txt"], "line 2: the class 'red fish' stands in line 1"),
        (["zero-shot", "DATA/fish", "--labels", "DATA/cranes.txt"], "line 3: the name 'crane' stands in line 1"),
        (["zero-shot", "DATA/spaces"], "'a fish' and 'a_fish' are one class"),
        (["zero-shot", "DATA/spaces.jsonl"], "'a fish' and 'a_fish' are one class"),
        (["linear-probe", "DATA/one", "DATA/one"], "at least two classes, got only 'a fish'"),
        (["zero-shot", "DATA/two.jsonl"], "expected one class a picture"),
        (["retrieval", "DATA/two.jsonl"], "no picture can be read (1 tried)"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(data, capsys, arguments, message):
    (data / "few.txt").write_text("red fish\n")
    (data / "twice.txt").write_text("red fish\nred_fish\n")
    (data / "cranes.txt").write_text("bird\tcrane\n\nmachine\tcrane\n")
    (data / "empty.txt").write_text("# nothing\n")
    for folder in ("one/a_fish", "spaces/a_fish", "spaces/a fish"):
        (data / folder).mkdir(parents=True, exist_ok=True)
        (data / folder / "1.png").touch()
    spaces = [{"image_path": f"{name}.png", "caption": name} for name in ("a fish", "a_fish")]
    (data / "spaces.jsonl").write_text("\n".join(map(json.dumps, spaces)))
    (data / "two.jsonl").write_text('{"image_path": "a.png", "captions": ["cat", "dog"]}')
    code, out, err = run(capsys, *(argument.replace("DATA", str(data)) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("clip evaluate: ")


# The picture of the confusions


def test_the_commonest_confusions_come_first_and_right_answers_are_none():
    matrix = torch.tensor([[9, 0, 2], [1, 9, 0], [0, 5, 9]])
    assert commonest_confusions(matrix, "abc", 2) == [(5, "c", "b"), (2, "a", "c")]
    assert commonest_confusions(torch.eye(3, dtype=torch.long), "abc", 2) == []


def test_the_command_draws_a_confusion_matrix(data, tmp_path, capsys):
    run(capsys, "zero-shot", data / "test", "--confusion", tmp_path / "matrix.png")
    with Image.open(tmp_path / "matrix.png") as picture:
        assert min(picture.size) > 500


def test_one_confusion_among_480_classes_can_be_seen(tmp_path):
    names = [str(number) for number in range(480)]
    matrix = 10 * torch.eye(480, dtype=torch.long)
    pictures = []
    for times in (0, 1):
        matrix[20, 400] = times
        draw_confusion(matrix, names, tmp_path / f"{times}.png")
        with Image.open(tmp_path / f"{times}.png") as picture:
            pictures.append(picture.convert("L"))
    assert min(pictures[0].size) > 3 * 480
    matrices = [picture.crop((0, 0, 3 * 480, picture.height)) for picture in pictures]  # without what stands beside
    changed = ImageChops.difference(*matrices)
    left, top, right, bottom = changed.point(lambda level: 255 * (level > 20)).getbbox()
    assert 3 <= right - left <= 5
    assert 3 <= bottom - top <= 5


def test_names_are_drawn_as_they_are_written(tmp_path):
    draw_confusion(torch.tensor([[1, 1], [0, 2]]), ["$\\nonsense$", "$"], tmp_path / "matrix.png")  # no formulas


@pytest.mark.parametrize("name", ["matrix", "matrix.xyz", "nowhere/matrix.png"])
def test_a_picture_that_cannot_be_written_is_told_before_the_work(data, capsys, monkeypatch, name):
    monkeypatch.setattr(evaluate, "read_captions", None)
    with pytest.raises(SystemExit) as stop:
        run(capsys, "zero-shot", data / "test", "--confusion", name)
    assert stop.value.code == 2
    assert "--confusion" in capsys.readouterr().err


@pytest.mark.parametrize("task", [["zero-shot", "test"], ["linear-probe", "train", "test"]], ids=lambda task: task[0])
def test_without_matplotlib_the_command_says_so_before_the_work(data, capsys, monkeypatch, task):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(evaluate, "read_captions", None)
    code, _, err = run(capsys, task[0], *(data / name for name in task[1:]), "--confusion", "matrix.png")
    assert code == 2
    assert "pip install clip-from-scratch[evaluate]" in err


def test_without_matplotlib_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"clip-from-scratch\[evaluate\]"):
        draw_confusion(torch.eye(2, dtype=torch.long), "ab", tmp_path / "matrix.png")


@pytest.mark.parametrize("task", ["zero-shot", "retrieval", "linear-probe"])
def test_the_help_of_each_task_has_examples(task, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", task, "--help"])
    assert f"  clip evaluate {task} " in capsys.readouterr().out
