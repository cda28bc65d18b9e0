"""Models that read pictures of another size than they were trained on."""

import re
import warnings

import numpy as np
import pytest
import torch
from conftest import TINY, filled
from PIL import Image

import clip
from clip.model import config_of
from clip.positions import interpolate_positions

SMALL = {kind: TINY[kind] | {"vocab_size": 50} for kind in TINY}  # nobody reads a text here
TABLES = {"vit": "visual.positional_embedding", "rn": "visual.attnpool.positional_embedding"}
SIZES = {"vit": (32, 80), "rn": (32, 128)}  # trained at 48 and 64


def table(grid, width=6):
    return torch.randn(grid**2 + 1, width, generator=torch.Generator().manual_seed(grid))


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.fixture(scope="module", params=["vit", "rn"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def file(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "model.safetensors"
    clip.save(filled(SMALL[kind]), path)
    return path


@pytest.fixture
def model(kind):
    return filled(SMALL[kind])


def load_at(file, size):
    with pytest.warns(UserWarning, match=f"loaded for {size} x {size}"):
        return clip.load(file, device="cpu", image_size=size)


# -- the interpolation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [3, 5, 6, 11])
def test_positions_are_resized_as_pillow_resizes_a_picture(grid):
    positions = table(7)
    resized = interpolate_positions(positions, grid)
    for channel in range(positions.shape[1]):
        picture = Image.fromarray(positions[1:, channel].reshape(7, 7).numpy())
        expected = np.asarray(picture.resize((grid, grid), Image.Resampling.BICUBIC)).flatten()
        np.testing.assert_allclose(resized[1:, channel].numpy(), expected, atol=1e-5)


def test_the_class_tokens_position_is_kept_and_the_same_grid_changes_no_bit():
    positions = table(7)
    assert torch.equal(interpolate_positions(positions, 10)[0], positions[0])
    assert torch.equal(interpolate_positions(positions, 7), positions)


def test_positions_in_half_precision_are_interpolated_in_float32():
    positions = table(7)
    assert torch.equal(interpolate_positions(positions.half(), 9), interpolate_positions(positions.half().float(), 9))
    assert interpolate_positions(positions.double(), 9).dtype == torch.float64


@pytest.mark.parametrize("rows", [1, 7])
def test_positions_of_no_square_are_refused(rows):
    with pytest.raises(ValueError, match=rf"square grid.*got {rows}"):
        interpolate_positions(torch.zeros(rows, 4), 3)


# -- load and save ----------------------------------------------------------------------------------------------------


def test_the_trained_size_changes_no_bit_and_needs_no_warning(file, kind):
    whole, _ = clip.load(file, device="cpu")
    same, preprocess = clip.load(file, device="cpu", image_size=TINY[kind]["image_resolution"])
    assert all(torch.equal(entry, whole.state_dict()[name]) for name, entry in same.state_dict().items())
    assert config_of(same) == config_of(whole)
    assert preprocess.transforms[0].size == TINY[kind]["image_resolution"]


def test_another_size_changes_the_positions_and_nothing_else(file, kind):
    trained = clip.load(file, device="cpu")[0].state_dict()
    for size in SIZES[kind]:
        model, preprocess = load_at(file, size)
        assert preprocess(Image.new("RGB", (50, 70))).shape == (3, size, size)
        assert model.encode_image(images(size)).shape == (2, 24)
        assert model.visual.input_resolution == size
        stride = TINY[kind]["vision_patch_size"] or 32
        for name, entry in model.state_dict().items():
            expected = trained[name]
            expected = interpolate_positions(expected, size // stride) if name == TABLES[kind] else expected
            assert torch.equal(entry, expected), name


def test_a_model_of_another_size_is_saved_and_loaded_bit_for_bit(file, kind, tmp_path):
    size = SIZES[kind][1]
    model, _ = load_at(file, size)
    clip.save(model, tmp_path / "resized.pt")
    again, preprocess = clip.load(tmp_path / "resized.pt", device="cpu")
    assert all(torch.equal(entry, model.state_dict()[name]) for name, entry in again.state_dict().items())
    assert torch.equal(again.encode_image(images(size)), model.encode_image(images(size)))
    assert preprocess.transforms[0].size == size


def test_the_warning_says_what_it_costs_and_where_it_was_asked_for(file, kind):
    trained = TINY[kind]["image_resolution"]
    with pytest.warns(UserWarning, match=f"trained at {trained} x {trained} pixels") as caught:
        clip.load(file, device="cpu", image_size=2 * trained)
    [warning] = caught
    assert "not as accurate as published" in str(warning.message)
    assert "about 4 times the computation" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("size", "nearest"), [(50, {"vit": "48 and 64", "rn": "32 and 64"}), (3, {"vit": "16", "rn": "32"})]
)
def test_a_size_that_is_no_whole_grid_is_refused_with_the_nearest(file, kind, size, nearest):
    with pytest.raises(ValueError, match=rf"multiple of \d+ pixels.*got {size}; near: {nearest[kind]}$"):
        clip.load(file, device="cpu", image_size=size)


@pytest.mark.parametrize("size", [0, -32, 80.0, "80"])
def test_what_is_no_size_is_refused(file, size):
    with pytest.raises(ValueError, match="positive number of pixels, got"):
        clip.load(file, device="cpu", image_size=size)


# -- pictures of a wrong size -----------------------------------------------------------------------------------------


def test_a_picture_of_another_size_is_refused_with_what_to_do(model):
    side = model.visual.input_resolution
    sizes = [(2 * side, 2 * side), (side, 2 * side), (side + 1, side + 1), (side, side + 5)]  # the last two nearly fit
    for shape in [*((1, 3, *size) for size in sizes), (3, side, side), (1, 1, side, side)]:
        expected = re.escape(f"expected pictures (N, 3, {side}, {side}), got {shape}")
        with pytest.raises(ValueError, match=rf"^{expected}.*image_size=") as caught:
            model.encode_image(torch.zeros(shape))
        assert caught.value.__cause__ is not None


def test_an_error_about_something_else_comes_as_it_is(model):
    def fail(*_):
        raise RuntimeError("mine")

    model.visual.conv1.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"^mine$"):
        model.encode_image(images(model.visual.input_resolution))


def test_clients_that_put_in_positions_of_their_own_may_show_other_sizes():
    model = filled(SMALL["vit"])
    tower = model.visual
    tower.positional_embedding = torch.nn.Parameter(interpolate_positions(tower.positional_embedding.detach(), 5))
    assert model.encode_image(images(80)).shape == (2, 24)


@pytest.mark.parametrize("how", ["traced", "compiled"])
def test_the_question_about_the_size_is_no_part_of_a_recorded_graph(how):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = filled(SMALL["vit"] | {"vision_layers": 1})

        def forward(self, image):
            return self.model.encode_image(image)

    tower, image = Tower().eval(), images(48)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated
        if how == "traced":
            recorded = torch.jit.trace(tower, (image,))
        else:
            recorded = torch.compile(tower, backend="eager", fullgraph=True)
        torch.testing.assert_close(recorded(image), tower(image))
