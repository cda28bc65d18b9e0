"""Loading the image tower or the text tower alone."""

import copy

import pytest
import torch
from archive import write_archive
from conftest import TINY, filled
from PIL import Image

import clip
from clip.app.cli import main
from clip.checkpoints import read_checkpoint
from clip.checkpoints.archive import Storage, StoredTensor
from clip.checkpoints.mapped_file import MappedFile, map_file
from clip.clip import preprocess_of
from clip.model import CLIP, ImageTower, TextTower
from clip.tasks.encode import encode_images, encode_texts, gather

# Bare weights do not say how their model was trained; that is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.* does not say its model's")

# One head to 64 channels, as a file without a configuration implies
SIZES = TINY["vit"] | {"transformer_heads": 1, "vocab_size": 50}
FORMS = ["archive", "state dict", "legacy", "wrapped", "safetensors", "ours"]
TOWERS = ["image", "text"]
TOKENS = torch.tensor([[48, 7, 49, 0, 0], [48, 3, 11, 5, 49]])
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def belongs(name, tower):
    return name == "logit_scale" or name.startswith("visual.") == (tower == "image")


def encode(model, tower, images=IMAGES):
    with torch.no_grad():
        return model.encode_image(images) if tower == "image" else model.encode_text(TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("towers")


@pytest.fixture(scope="module", params=FORMS)
def file(request, folder):
    """One model in every form of file."""
    path = folder / request.param.replace(" ", "-")
    model = filled(SIZES)
    if request.param == "archive":
        write_archive(model.state_dict(), path, input_resolution=48)
    elif request.param == "safetensors":
        path = path.with_suffix(".safetensors")
        clip.save(model, path)
    elif request.param == "ours":
        path = path.with_suffix(".pt")
        clip.save(model, path)
    else:
        prefix = "module._orig_mod." if request.param == "wrapped" else ""
        weights = {prefix + name: entry for name, entry in model.state_dict().items()}
        torch.save(weights, path, _use_new_zipfile_serialization=request.param != "legacy")
    return path


@pytest.mark.parametrize("tower", TOWERS)
def test_one_tower_says_what_the_whole_model_says(file, tower):
    whole, _ = clip.load(file, device="cpu")
    part, preprocess = clip.load(file, device="cpu", tower=tower)
    assert isinstance(part, CLIP)
    assert not part.training
    assert torch.equal(encode(part, tower), encode(whole, tower))
    assert preprocess.transforms[0].size == 48


@pytest.mark.parametrize("tower", TOWERS)
def test_its_entries_are_those_of_the_whole_model_that_belong_to_it(file, tower):
    whole, part = clip.load(file, device="cpu")[0].state_dict(), clip.load(file, device="cpu", tower=tower)[0]
    assert list(part.state_dict()) == [name for name in whole if belongs(name, tower)]
    assert all(torch.equal(entry, whole[name]) for name, entry in part.state_dict().items())


@pytest.mark.parametrize("tower", TOWERS)
def test_the_file_is_asked_for_this_towers_numbers_only(file, tower, monkeypatch):
    asked = []
    original = MappedFile.tensor

    def tensor(self, start, count, dtype):
        asked.append(count * dtype.itemsize)
        return original(self, start, count, dtype)

    monkeypatch.setattr(MappedFile, "tensor", tensor)
    _, weights = read_checkpoint(file, tower)
    assert all(belongs(name, tower) for name in weights)
    needed = sum(entry.numel() * entry.element_size() for entry in weights.values())
    assert needed <= sum(asked) <= needed + 24  # an archive holds three sizes besides
    asked.clear()
    read_checkpoint(file)
    assert len(asked) > len(weights)


def test_damage_in_the_other_tower_is_not_even_seen(folder):
    model, path = filled(SIZES), folder / "damaged.pt"
    torch.save(model.state_dict(), path)
    numbers = model.token_embedding.weight.detach().numpy().tobytes()[:64]
    content = path.read_bytes()
    assert content.count(numbers) == 1
    path.write_bytes(content.replace(numbers, bytes(64)))
    with pytest.raises(clip.CheckpointError, match="checksum"):
        clip.load(path, device="cpu")
    part, _ = clip.load(path, device="cpu", tower="image")
    assert torch.equal(encode(part, "image"), encode(model, "image"))


def test_parameters_and_classes_of_the_embedded_model():
    whole, _ = clip.load("tiny", device="cpu")
    image, text = (clip.load("tiny", device="cpu", tower=tower)[0] for tower in TOWERS)
    assert (type(image), type(text)) == (ImageTower, TextTower)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (whole, image, text)]
    assert counts[0] == counts[1] + counts[2] - 1  # logit_scale belongs to both
    tokens = clip.tokenize(["a red fish", "a zyzzyva"])  # of which the training captions hold one and not the other
    assert torch.equal(text.encode_text(tokens), whole.encode_text(tokens))


def test_the_absent_tower_says_why_it_is_absent(folder):
    clip.save(filled(SIZES), folder / "whole.pt")
    image, text = (clip.load(folder / "whole.pt", device="cpu", tower=tower)[0] for tower in TOWERS)
    with pytest.raises(RuntimeError, match='cannot embed texts: it was loaded with tower="image"'):
        image.encode_text(TOKENS)
    with pytest.raises(RuntimeError, match='cannot embed pictures: it was loaded with tower="text"'):
        text.encode_image(IMAGES)
    for model in (image, text):
        with pytest.raises(RuntimeError, match="it was loaded with tower="):
            model(IMAGES, TOKENS)


# Nothing as it would be taken to be, were it not written down
UNUSUAL = {
    "transformer_heads": 8,
    "vocab_size": 50,
    "context_length": 5,
    "activation": "gelu",
    "vision_heads": 4,
    "image_std": (0.5, 0.25, 0.125),
    "image_resize": "squash",
}


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", TINY)
def test_a_saved_tower_comes_back_bit_for_bit(kind, tower, ending, tmp_path):
    whole = filled(TINY[kind] | UNUSUAL)
    clip.save(whole, tmp_path / "whole.pt")
    part, _ = clip.load(tmp_path / "whole.pt", device="cpu", tower=tower)
    clip.save(part, tmp_path / f"part{ending}")
    again, preprocess = clip.load(tmp_path / f"part{ending}", device="cpu", tower=tower)
    assert type(again) is type(part)
    assert list(again.state_dict()) == list(part.state_dict())
    assert all(torch.equal(entry, part.state_dict()[name]) for name, entry in again.state_dict().items())
    images = IMAGES if kind == "vit" else torch.nn.functional.pad(IMAGES, [8] * 4)  # 48 pixels, or 64
    assert torch.equal(encode(again, tower, images), encode(whole, tower, images))  # heads and activation show here
    if tower == "image":
        assert repr(preprocess) == repr(preprocess_of(whole))


@pytest.mark.parametrize(("tower", "other"), [TOWERS, TOWERS[::-1]])
def test_a_file_of_one_tower_says_so_to_whoever_needs_more(tower, other, tmp_path, capsys):
    clip.save(clip.load("tiny", device="cpu", tower=tower)[0], tmp_path / "part.pt")
    message = f'part.pt: it holds the {tower} tower only: load it with tower="{tower}", or the file of a whole model'
    for asked in (None, other):
        with pytest.raises(clip.CheckpointError, match=message):
            clip.load(tmp_path / "part.pt", device="cpu", tower=asked)
    assert main(["convert", str(tmp_path / "part.pt"), str(tmp_path / "target"), "--to", "open_clip"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_that_could_not_be_loaded_again_is_not_saved(tower, tmp_path):
    part, _ = clip.load("tiny", device="cpu", tower=tower)
    part.adapter = torch.nn.Linear(2, 3)
    with pytest.raises(RuntimeError, match=r"2 unexpected: adapter.weight, adapter.bias"):
        clip.save(part, tmp_path / "part.pt")
    assert not (tmp_path / "part.pt").exists()


def test_what_embeds_streams_needs_one_tower_only():
    text, _ = clip.load("tiny", device="cpu", tower="text")
    image, preprocess = clip.load("tiny", device="cpu", tower="image")
    assert encode_texts(text, ["a dog"]).norm() == pytest.approx(1)
    rows = gather(encode_images(image, preprocess, [Image.new("RGB", (30, 40), "red")]))
    assert rows.values.norm() == pytest.approx(1)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_has_its_dtype_and_can_be_copied(folder, tower):
    clip.save(filled(SIZES), folder / "half.pt")
    part, _ = clip.load(folder / "half.pt", device="cpu", dtype=torch.bfloat16, tower=tower)
    assert part.dtype == encode(part, tower).dtype == torch.bfloat16
    assert torch.equal(encode(copy.deepcopy(part), tower), encode(part, tower))


def test_an_image_tower_can_have_another_size(folder):
    clip.save(filled(SIZES), folder / "sized.pt")
    with pytest.warns(UserWarning, match="80 x 80"):
        part, preprocess = clip.load(folder / "sized.pt", device="cpu", tower="image", image_size=80)
    assert part.encode_image(torch.zeros(1, 3, 80, 80)).shape == (1, 24)
    assert preprocess.transforms[0].size == 80
    clip.save(part, folder / "resized.pt")
    assert clip.load(folder / "resized.pt", device="cpu", tower="image")[0].visual.input_resolution == 80
    with pytest.raises(ValueError, match="about the image tower"):
        clip.load(folder / "sized.pt", device="cpu", tower="text", image_size=80)
    with pytest.raises(ValueError, match=r'"image" or "text".*got .vision.'):
        clip.load(folder / "sized.pt", device="cpu", tower="vision")


def test_a_tower_with_a_missing_entry_is_an_error_and_one_missing_elsewhere_is_none(folder):
    weights = filled(SIZES).state_dict()
    del weights["visual.ln_post.bias"]
    torch.save(weights, folder / "gap.pt")
    with pytest.raises(clip.CheckpointError, match=r"1 missing: visual.ln_post.bias"):
        clip.load(folder / "gap.pt", device="cpu", tower="image")
    assert isinstance(clip.load(folder / "gap.pt", device="cpu", tower="text")[0], TextTower)


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused_even_if_it_is_not_wanted(tmp_path):
    (tmp_path / "short").write_bytes(bytes(1000))
    with map_file(tmp_path / "short") as file:
        for count, fits in [(250, True), (251, False), (2**61, False)]:
            claim = StoredTensor(Storage(file, lambda length: 0, torch.float32, count), 0, (count,), (1,))
            if fits:
                assert claim.outline().is_meta
            else:
                with pytest.raises(clip.CheckpointError, match="does not fit the file"):
                    claim.outline()
