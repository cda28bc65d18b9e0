import json

import numpy as np
import pytest
import torch
from conftest import TINY, filled
from PIL import Image

import clip
from clip.app.cli import main
from clip.app.explain import MARGIN, PANEL
from clip.tasks.explain import explain, seen_box

TEXTS = ["a dog", "una bicicletta è rossa"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ViT, a picture wider than high, and one that is broken."""
    folder = tmp_path_factory.mktemp("explain")
    clip.save(filled(TINY["vit"]), folder / "model.safetensors")
    pixels = torch.randint(0, 256, (60, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(folder / "wide.png")
    (folder / "broken.png").write_bytes((folder / "wide.png").read_bytes()[:300])
    return folder


def run(folder, picture="wide.png", options=(), texts=TEXTS):
    model = ["--model", str(folder / "model.safetensors"), "--device", "cpu"]
    return main(["explain", str(folder / picture), "--text", *texts, *model, *options])


@pytest.mark.parametrize("method", [None, "occlusion"])
def test_json_says_what_the_library_says(folder, capsys, method):
    assert run(folder, options=["--json", *(["--method", method] if method else [])]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == TEXTS

    model, preprocess = clip.load(folder / "model.safetensors", device="cpu")
    picture = Image.open(folder / "wide.png")
    with torch.no_grad():
        features = model.encode_image(preprocess(picture)[None])
        cosines = torch.cosine_similarity(features, model.encode_text(clip.tokenize(TEXTS)))
    for line, cosine in zip(lines, cosines.tolist(), strict=True):
        heat = explain(model, picture, line["text"], method)
        x, y = line["peak"]
        assert heat[y, x] == pytest.approx(1, abs=1e-3)
        assert line["spread"] == pytest.approx((heat > 0.5).float().mean().item())
        assert line["cosine"] == pytest.approx(cosine, abs=1e-5)
        assert line["method"] == (method or "attention")
        assert line["seen"] == list(seen_box(model, picture))
        assert line["seen"] == pytest.approx([18, 0, 78, 60], abs=0.5)


def test_the_table_has_a_line_for_each_text(folder, capsys):
    assert run(folder, texts=[TEXTS[0], "--text", TEXTS[1]]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == f"{folder / 'wide.png'}, 96 x 60, attention"
    assert header.split() == ["text", "cosine", "peak", "spread"]
    assert [row[2 : 2 + len(text)] for row, text in zip(rows, TEXTS, strict=True)] == TEXTS


def test_the_picture_shows_the_original_and_a_map_for_each_text(folder, capsys):
    out = folder / "heat.png"
    assert run(folder, options=["-o", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    drawn = np.asarray(Image.open(out)).astype(int)
    assert drawn.shape[1] == 3 * PANEL + 4 * MARGIN
    height = PANEL * 60 // 96
    panels = [drawn[MARGIN : MARGIN + height, MARGIN + i * (PANEL + MARGIN) :][:, :PANEL] for i in range(3)]

    original = Image.open(folder / "wide.png").resize((PANEL, height), Image.Resampling.BICUBIC)
    assert np.array_equal(panels[0], np.asarray(original))
    for panel, line in zip(panels[1:], lines, strict=True):
        colors = np.ptp(panel, axis=-1)  # 0 where it is grey
        x, y = ((edge + 0.5) * PANEL / 96 for edge in line["peak"])
        assert colors[int(y), int(x)] > 60
        left, right = (round(edge * PANEL / 96) for edge in line["seen"][::2])
        assert (colors[:, : left - 4] == 0).all()
        assert (colors[:, right + 4 :] == 0).all()
        assert panel[:, : left - 4].mean() > np.asarray(original)[:, : left - 4].mean() + 50  # paler


def test_a_text_that_would_break_the_table_is_cut_and_json_has_the_whole(folder, capsys):
    texts = ["a dog\n\tand\x1b[31m " + "very " * 50 + "red", "a cat"]
    assert run(folder, texts=texts) == 0
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert [row[:17] for row in rows] == ["  a dog and [31m ", "  a cat          "]
    assert {len(row) for row in rows} == {len(header)}
    assert len(header) < 100
    assert run(folder, texts=texts, options=["--json"]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == texts


@pytest.mark.parametrize("name", ["heat", "heat.xyz", "nowhere/heat.png"])
def test_a_picture_that_cannot_be_written_is_told_before_the_work(folder, capsys, monkeypatch, name):
    monkeypatch.setattr("clip.app.explain.load_model", None)
    with pytest.raises(SystemExit) as stop:
        run(folder, options=["-o", name])
    assert stop.value.code == 2
    assert "-o/--out" in capsys.readouterr().err


def test_window_and_stride_reach_the_method(folder, capsys):
    answers = []
    for options in ([], ["--window", "8", "--stride", "8"]):
        assert run(folder, options=["--json", "--method", "occlusion", *options], texts=["a dog"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["spread"])
    assert answers[0] != answers[1]


@pytest.mark.parametrize(("name", "message"), [("broken.png", "truncated or damaged"), ("nowhere.png", "No such file")])
def test_a_picture_that_cannot_be_read_is_exit_code_1(folder, capsys, name, message):
    assert run(folder, name) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith(f"clip explain: {folder / name}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "grad-cam"], "grad-cam needs a ModifiedResNet as the image tower"),
        (["--window", "8"], "window and stride belong to occlusion"),
        (["--text", "dog " * 80], "context length of 77"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(folder, capsys, options, message):
    assert run(folder, options=options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("clip explain: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("size", [(300, 4), (3, 200)])
def test_a_very_long_or_high_picture_is_drawn_with_its_captions(folder, size):
    Image.new("RGBA", size, "green").save(folder / "thin.png")
    assert run(folder, "thin.png", ["-o", str(folder / "thin.jpg")], texts=["a very " + "long " * 30 + "text"]) == 0
    drawn = Image.open(folder / "thin.jpg")
    assert drawn.height > 6 * 15  # several lines of caption
    assert np.asarray(drawn.convert("L"))[-100:].min() < 100
