import hashlib

import pytest
import torch
from conftest import TINY, filled

import clip
from clip.app import verify
from clip.app.cli import main
from clip.config import RELEASED
from clip.model import CLIP
from clip.preprocess import Preprocess


@pytest.fixture(scope="module")
def full_size():
    """A ViT-B/32 whose weights are none: only its sizes are looked at."""
    with torch.device("meta"):
        return CLIP(**vars(RELEASED["ViT-B/32"]))


def published():
    return torch.tensor(list(verify.COSINES.values()))


@pytest.mark.parametrize(("noise", "passes"), [(0.0, True), (0.008, True), (0.02, False)])
def test_the_published_table_passes_and_another_fails(full_size, monkeypatch, noise, passes):
    monkeypatch.setattr(verify, "cosine_table", lambda *_: published() + noise)
    checks = list(verify.verify(full_size, Preprocess(224), "not opened"))
    assert len(checks) == 1 + 1 + 3 + 8
    assert all(check.passed for check in checks) is passes
    assert all(check.passed for check in checks[:5])


def test_where_no_cosines_are_published_the_file_itself_is_compared(tmp_path):
    with torch.device("meta"):
        model = CLIP(**vars(RELEASED["RN50"]))
    (tmp_path / "RN50.pt").write_bytes(b"made up")
    *sizes, digest = verify.verify(model, Preprocess(224), tmp_path / "RN50.pt")
    assert all(check.passed for check in sizes)
    assert not digest.passed
    assert digest.expected == "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"
    assert digest.measured == hashlib.sha256(b"made up").hexdigest()


def test_each_picture_is_closest_to_its_own_text():
    own = [0, 1, 2, 3, 4, 5, 7]  # the camera's picture is left out, its text stays
    assert published().argmax(dim=0).tolist() == own


def test_the_table_is_measured_on_the_seven_photographs():
    model = filled(TINY["vit"])
    table = verify.cosine_table(model, Preprocess(48), ["a dog", "a cat"])
    assert table.shape == (2, 7)
    assert table.abs().max() <= 1
    assert table.unique().numel() == 14


def test_sizes_of_none_of_the_nine_fail(tmp_path, capsys):
    clip.save(filled(TINY["vit"]), tmp_path / "tiny.pt")
    assert main(["verify", str(tmp_path / "tiny.pt"), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  architecture" in out
    assert "none of them" in out
    assert "1 checks failed" in out


def test_without_the_weights_it_says_how_to_get_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    assert main(["verify", "ViT-B/32"]) == 2
    err = capsys.readouterr().err
    assert "ViT-B-32.pt" in err
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in err
    assert str(tmp_path) in err
    assert "--download" in err


@pytest.mark.requires_weights
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_models_pass(name, capsys):
    try:
        clip.load(name, device="cpu", local_files_only=True)
    except clip.DownloadError as error:
        pytest.skip(f"the released file is not here: {error}")
    assert main(["verify", name, "--device", "cpu"]) == 0, capsys.readouterr().out


def test_of_our_own_model_nothing_was_published(capsys):
    assert main(["verify", "tiny"]) == 2
    assert "docs/model_card.md" in capsys.readouterr().err
