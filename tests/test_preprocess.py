"""Preprocessing against the released one: bit for bit on pictures, within stated bounds on tensors."""

import copy
import hashlib
import json
import pickle
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    CenterCrop,
    ImageError,
    Normalize,
    Preprocess,
    Resize,
    ToTensor,
    _convert_image_to_rgb,
    open_image,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "preprocess.json").read_text())["cases"]
SKIMAGE = Path(skimage.data_dir)
PHOTOGRAPHS = [
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
]


def noise(mode, width, height, key="noise"):
    """The picture of random pixels that golden/README.md describes, drawn from `key`."""
    g = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    if mode == "1":
        grey = Image.fromarray((g.integers(0, 2, (height, width)) * 255).astype(np.uint8))
        return grey.convert("1", dither=Image.Dither.NONE)
    if mode == "I;16":
        return Image.frombytes(mode, (width, height), g.integers(0, 65536, (height, width)).astype("<u2").tobytes())
    if mode == "F":
        return Image.frombytes(mode, (width, height), (g.random((height, width)) * 255).astype("<f4").tobytes())
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if mode == "P" else (height, width, bands)
    picture = Image.frombytes(mode, (width, height), g.integers(0, 256, shape).astype(np.uint8).tobytes())
    if mode == "P":
        picture.putpalette(g.integers(0, 256, 768).astype(np.uint8).tobytes())
    return picture


def tensor_of(picture):
    """The uint8 tensor (3, H, W) of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def by_hand(picture, side):
    """The released preprocessing written with Pillow and NumPy only, as one function."""
    width, height = picture.size
    if width < height:
        picture = picture.resize((side, int(side * height / width)), Image.Resampling.BICUBIC)
    else:
        picture = picture.resize((int(side * width / height), side), Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in picture.size)
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)).convert("RGB"))
    scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (scaled - mean) / std


# Pictures: equal to the release


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["key"])
def test_golden_pictures_are_equal_to_the_last_bit(case):
    picture = noise(case["mode"], case["width"], case["height"], case["key"])
    image = Preprocess(case["resolution"])(picture)
    assert image.dtype == torch.float32
    assert image.shape == (3, case["resolution"], case["resolution"])
    assert torch.allclose(image.flatten()[case["probe_index"]], torch.tensor(case["probe"]), rtol=0, atol=1e-6)
    assert hashlib.sha256(image.numpy().astype("<f4").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, "horse.png", "page.png"])  # horse is RGBA, page grey
def test_photographs_equal_plain_pillow_and_numpy(name):
    picture = open_image(SKIMAGE / name)
    assert np.array_equal(Preprocess(224)(picture).numpy(), by_hand(picture, 224))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"]), st.integers(1, 90), st.integers(1, 90))
def test_any_small_picture_equals_plain_pillow_and_numpy(mode, width, height):
    picture = noise(mode, width, height)
    assert np.array_equal(Preprocess(16)(picture).numpy(), by_hand(picture, 16))


def test_transparent_pixels_are_converted_after_the_resize():
    """Red under full transparency is weighted away by a resize in RGBA, and bleeds into white if RGB comes first."""
    pixels = np.full((60, 90, 4), 255, np.uint8)
    pixels[:, ::3] = (255, 0, 0, 0)
    picture = Image.fromarray(pixels)
    preprocess = Preprocess(32)
    assert np.array_equal(preprocess(picture).numpy(), by_hand(picture, 32))
    green = preprocess(picture)[1] * CLIP_STD[1] + CLIP_MEAN[1]
    assert green[8:24, 8:24].min() > 0.99
    assert (preprocess(picture.convert("RGB")) - preprocess(picture)).abs().max() > 1


def test_palette_pictures_only_ever_show_colours_of_their_palette():
    picture = Image.frombytes("P", (50, 40), bytes(np.arange(2000) % 2))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    grey = Preprocess(16)(picture)[0] * CLIP_STD[0] + CLIP_MEAN[0]
    assert set(grey.round(decimals=4).abs().unique().tolist()) == {0.0, 1.0}


def test_the_picture_given_is_left_alone():
    picture = noise("RGB", 30, 20)
    before = picture.tobytes()
    Preprocess(16)(picture)
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGB", (30, 20), before)


@pytest.mark.parametrize("shape", [(31, 45), (31, 45, 3), (31, 45, 4)])
def test_arrays_equal_their_pictures(shape):
    array = np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)
    preprocess = Preprocess(16)
    assert torch.equal(preprocess(array), preprocess(Image.fromarray(array)))
    assert torch.equal(preprocess(array[::-1, ::2]), preprocess(Image.fromarray(array[::-1, ::2].copy())))


# Steps


def test_there_are_five_steps_with_the_attributes_clients_read():
    resize, crop, to_rgb, to_tensor, normalize = Preprocess(224).transforms
    assert isinstance(resize, Resize)
    assert (resize.size, resize.interpolation) == (224, Image.Resampling.BICUBIC)
    assert isinstance(crop, CenterCrop)
    assert crop.size == (224, 224)
    assert to_rgb is _convert_image_to_rgb
    assert isinstance(to_tensor, ToTensor)
    assert isinstance(normalize, Normalize)
    assert (normalize.mean, normalize.std) == (CLIP_MEAN, CLIP_STD)


def test_representation_shows_every_step():
    assert repr(Preprocess(224)) == (
        "Preprocess(\n"
        "    Resize(size=224, interpolation=bicubic)\n"
        "    CenterCrop(size=(224, 224))\n"
        "    _convert_image_to_rgb\n"
        "    ToTensor()\n"
        "    Normalize(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))\n"
        ")"
    )


def test_edited_steps_are_the_ones_that_run():
    picture = noise("RGB", 50, 30)
    preprocess = Preprocess(16)
    preprocess.transforms[0].size = 24
    preprocess.transforms[1].size = 20
    preprocess.transforms[-1] = Normalize((0.0,) * 3, (1.0,) * 3)
    preprocess.transforms.insert(2, lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    image = preprocess(picture)
    assert image.shape == (3, 20, 20)
    pixels = picture.resize((40, 24), Image.Resampling.BICUBIC).crop((10, 2, 30, 22))
    assert torch.equal(image, tensor_of(pixels).flip(-1) / 255)


def test_steps_of_a_generator_loss_run_on_tensors_in_minus_one_to_one():
    """Normalize from [-1, 1], then steps 0, 1 and 4: what StyleCLIP-like losses build from the list."""
    steps = [Normalize([-1.0] * 3, [2.0] * 3), *Preprocess(16).transforms[:2], *Preprocess(16).transforms[4:]]
    pixels = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    image = 2 * pixels - 1
    for step in steps:
        image = step(image)
    assert torch.allclose(image, Preprocess(16)(pixels), rtol=0, atol=1e-5)


def test_without_steps_two_and_three_float_tensors_give_the_same():
    pixels = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    shorter = Preprocess(16)
    shorter.transforms.pop(2)
    shorter.transforms.pop(2)
    assert torch.equal(shorter(pixels), Preprocess(16)(pixels))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_independent_and_equal(duplicate):
    preprocess = Preprocess(16)
    twin = duplicate(preprocess)
    picture = noise("RGB", 20, 30)
    assert torch.equal(twin(picture), preprocess(picture))
    twin.transforms[0].size = 99
    assert preprocess.transforms[0].size == 16


def test_resize_takes_height_and_width():
    assert Resize((12, 34))(noise("RGB", 50, 40)).size == (34, 12)
    assert Resize((12, 34))(torch.zeros(3, 40, 50)).shape == (3, 12, 34)


@pytest.mark.parametrize(
    ("sides", "crop", "kept"),
    [
        ((7, 4), 4, [2, 3, 4, 5]),  # 1.5 rounds to 2
        ((9, 4), 4, [2, 3, 4, 5]),  # 2.5 rounds to 2: halves go to the even side
        ((5, 4), 4, [0, 1, 2, 3]),  # 0.5 rounds to 0
        ((3, 4), 4, [0, 1, 2, None]),  # one missing: padded on the right
        ((1, 4), 4, [None, 0, None, None]),  # three missing: one on the left, two on the right
    ],
)
def test_center_crop_keeps_the_columns_worked_out_by_hand(sides, crop, kept):
    width, height = sides
    columns = [0 if index is None else 10 + index for index in kept]
    row = torch.arange(10, 10 + width, dtype=torch.uint8).expand(3, height, width)
    assert CenterCrop(crop)(row)[0, 0].tolist() == columns
    assert np.asarray(CenterCrop(crop)(Image.fromarray(row[0].numpy().copy())))[0].tolist() == columns


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*[st.integers(1, 12)] * 4)
def test_center_crop_of_tensor_and_picture_agree(width, height, crop_height, crop_width):
    picture, crop = noise("RGB", width, height), CenterCrop((crop_height, crop_width))
    assert torch.equal(crop(tensor_of(picture)), tensor_of(crop(picture)))


def test_to_tensor_scales_bytes_and_bits_and_keeps_wider_pixels():
    bits, ints, floats = noise("1", 5, 3), Image.new("I", (5, 3), 70000), noise("F", 5, 3)
    deep = noise("I;16", 5, 3)
    assert torch.equal(ToTensor()(bits), torch.from_numpy(np.array(bits, np.float32))[None])
    assert torch.equal(ToTensor()(ints), torch.full((1, 3, 5), 70000, dtype=torch.int32))
    assert torch.equal(ToTensor()(floats), torch.from_numpy(np.array(floats))[None])
    assert np.array_equal(ToTensor()(deep)[0].numpy(), np.array(deep))
    for mode, bands in {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 1}.items():
        picture = noise(mode, 5, 3)
        expected = np.array(picture).reshape(3, 5, bands).transpose(2, 0, 1) / np.float32(255)
        tensor = ToTensor()(picture)
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), expected)


def test_to_tensor_is_in_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert Preprocess(16)(noise("RGB", 20, 20)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_normalize_keeps_dtype_and_argument():
    tensor = torch.full((2, 3, 1, 1), 0.75, dtype=torch.float64)
    result = Normalize((0.25, 0.5, 0.75), (0.5, 0.25, 1.0))(tensor)
    assert result.dtype == torch.float64
    assert result[1].flatten().tolist() == [1.0, 1.0, 0.0]
    assert (tensor == 0.75).all()


# Tensors: close to the pictures


@pytest.mark.parametrize(("floating", "mean", "maximum"), [(False, 0.0003, 1), (True, 0.27, 26)])
def test_tensors_are_as_close_to_pictures_as_the_docstring_says(floating, mean, maximum):
    means, maxima = [], []
    for resolution in (224, 336):
        preprocess = Preprocess(resolution)
        for name in PHOTOGRAPHS:
            picture = open_image(SKIMAGE / name).convert("RGB")
            tensor = tensor_of(picture) / 255 if floating else tensor_of(picture)
            levels = (preprocess(tensor) - preprocess(picture)).abs() * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
            means.append(levels.mean().item())
            maxima.append(levels.max().item())
    assert np.mean(means) < 1.2 * mean
    assert max(maxima) < 1.01 * maximum


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_leading_dimensions_are_a_batch(dtype):
    pixels = torch.randint(0, 256, (2, 5, 3, 37, 29), generator=torch.Generator().manual_seed(1)) / 255
    pixels = (pixels * 255).to(dtype) if dtype == torch.uint8 else pixels
    preprocess = Preprocess(16)
    images = preprocess(pixels)
    assert images.shape == (2, 5, 3, 16, 16)
    for i in range(2):
        for j in range(5):
            assert torch.allclose(images[i, j], preprocess(pixels[i, j]), rtol=0, atol=1e-5)
    assert preprocess(pixels[:0]).shape == (0, 5, 3, 16, 16)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)  # one rounding of a value near 1, divided by the smallest std
def test_other_precisions_come_out_as_float32(dtype, tolerance):
    pixels = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(2))
    image = Preprocess(16)(pixels.to(dtype))
    assert image.dtype == torch.float32
    assert torch.allclose(image, Preprocess(16)(pixels), rtol=0, atol=tolerance)
    assert Resize(16)(pixels.to(dtype)).dtype == dtype


def test_the_float_path_is_linear_and_its_gradient_is_right():
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(2, 3, 9, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    resize, crop, _, _, normalize = Preprocess(5).transforms
    assert torch.autograd.gradcheck(lambda x: normalize(crop(resize(x))), pixels)
    half = 0.5 * pixels.detach()
    assert torch.allclose(resize(half), 0.5 * resize(pixels).detach())


def test_gradients_reach_the_pixels_through_all_five_steps():
    pixels = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(5), requires_grad=True)
    Preprocess(16)(pixels).sum().backward()
    # The weights of each output sum to one, so each channel's gradients sum to its outputs over its std.
    expected = 16 * 16 / torch.tensor(CLIP_STD)
    assert torch.allclose(pixels.grad.sum(dim=(0, 2, 3)), expected, rtol=1e-4)


def test_overshoot_of_pixels_in_zero_to_one_is_never_refused():
    worst = 0.0
    for side in range(1, 40):
        for new_side in range(1, 60):
            weights = Resize((side, new_side))(torch.eye(side)[None])[0]  # column j weighs the inputs of output j
            worst = max(worst, weights.abs().sum(0).max().item())
    assert (worst**2 - 1) / 2 < 0.31  # both directions at once, all weights against us


@pytest.mark.requires_cuda
@pytest.mark.parametrize(("scale", "tolerance"), [(1, 1.01 / 255 / min(CLIP_STD)), (255, 1e-4)])
def test_a_gpu_gives_the_same_image(scale, tolerance):
    """uint8 within one grey level, floats within rounding."""
    pixels = tensor_of(open_image(SKIMAGE / "coffee.png"))
    pixels = pixels if scale == 1 else pixels / scale
    image = Preprocess(224)(pixels.cuda())
    assert image.device.type == "cuda"
    difference = (image.cpu() - Preprocess(224)(pixels)).abs()
    assert difference.max() <= tolerance
    assert difference.mean() < 1e-4


# Mistakes


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("cat.jpg", TypeError, r"got str; open a file with .*open_image"),
        ([1, 2], TypeError, r"got list.*preprocess\.batch"),
        (None, TypeError, "got NoneType"),
        (np.zeros((8, 8, 3)), TypeError, r"uint8 array .* got float64 of shape \(8, 8, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), TypeError, r"got uint8 of shape \(3, 8, 8\).*channels-first"),
        (np.zeros(8, np.uint8), TypeError, r"\(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "8 x 0"),
        (Image.new("RGB", (0, 5)), ValueError, "with pixels, got one of 0 x 5"),
        (Image.new("1", (1, 60000)), ValueError, "would be resized to 224 x 13440000"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "uint8 or floating point, got torch.int64"),
        (torch.zeros(3, 0, 8), ValueError, "8 x 0"),
        (torch.zeros(8, 8), ValueError, r"\(\.\.\., 3, H, W\), got \(8, 8\)"),
        (torch.zeros(8, 8, 3), ValueError, r"\(\.\.\., 3, H, W\).*got \(8, 224, 224\)"),
        (torch.zeros(1, 8, 8), ValueError, r"\(\.\.\., 3, H, W\).*got \(1, 224, 224\)"),
        (torch.full((3, 8, 8), 255.0), ValueError, r"floats in \[0, 1\], got values from 255 to 255"),
        (torch.full((3, 8, 8), -1.0), ValueError, r"floats in \[0, 1\], got values from -1 to -1"),
        (torch.full((3, 8, 8), float("nan")), ValueError, r"floats in \[0, 1\], got values from nan to nan"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(picture, error, message):
    with pytest.raises(error, match=message):
        Preprocess(224)(picture)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "apply ToTensor first"),
        (torch.zeros(1, 4, 4), ValueError, r"\(\.\.\., 3, H, W\), got \(1, 4, 4\)"),
        (torch.zeros(3), ValueError, r"got \(3,\)"),
    ],
)
def test_normalize_refuses_what_it_would_spoil(tensor, error, message):
    with pytest.raises(error, match=message):
        Normalize(CLIP_MEAN, CLIP_STD)(tensor)


def test_to_tensor_refuses_what_holds_no_pixels():
    with pytest.raises(TypeError, match="got list"):
        ToTensor()([1, 2])
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        ToTensor()(torch.zeros(3, 2, 2, dtype=torch.int64))


# Batches


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_batch_equals_its_pictures_one_by_one(workers, tmp_path):
    noise("RGB", 47, 31).save(tmp_path / "picture.png")
    pictures = [
        noise("RGB", 50, 30),
        noise("P", 30, 50),
        np.zeros((20, 30), np.uint8),
        torch.zeros(3, 20, 20),
        tmp_path / "picture.png",
        str(tmp_path / "picture.png"),
        *(noise("RGBA", 40, 40, str(i)) for i in range(20)),
    ]
    preprocess = Preprocess(16)
    single = [preprocess(open_image(p) if isinstance(p, str | Path) else p) for p in pictures]
    assert torch.equal(preprocess.batch(iter(pictures), workers), torch.stack(single))


def test_a_picture_not_yet_decoded_may_occur_twice_in_a_batch():
    path = SKIMAGE / "rocket.jpg"
    preprocess = Preprocess(16)
    expected = preprocess(open_image(path)).expand(8, 3, 16, 16)
    for _ in range(3):
        with Image.open(path) as picture:
            assert torch.equal(preprocess.batch([picture] * 8, workers=4), expected)


def test_a_failing_picture_is_named_by_its_place(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    good = noise("RGB", 20, 20)
    with pytest.raises(ImageError, match=r"^picture 2: .*notes\.txt: empty, or not in a picture format"):
        Preprocess(16).batch([good, good, tmp_path / "notes.txt", good])
    with pytest.raises(ImageError, match=r"^picture 1: expected a PIL picture") as caught:
        Preprocess(16).batch([good, None])
    assert isinstance(caught.value.__cause__, TypeError)


def test_an_empty_batch_and_a_lone_path_are_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        Preprocess(16).batch([])
    with pytest.raises(TypeError, match=r"batch\(\['cat.jpg'\]\)"):
        Preprocess(16).batch("cat.jpg")


# Files


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
        (99, [[1, 2, 3], [4, 5, 6]]),  # no such orientation: left alone
    ],
)
def test_every_exif_orientation_is_turned_upright(orientation, upright, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)).save(tmp_path / "turned.png", exif=exif)
    picture = open_image(tmp_path / "turned.png")
    assert np.asarray(picture).tolist() == upright
    assert picture.size == np.asarray(picture).shape[::-1]
    assert open_image(tmp_path / "turned.png").getexif().get(0x0112, 1) in (1, 99)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_file_keeps_its_mode_and_pixels(mode, tmp_path):
    picture = noise(mode, 13, 7)
    picture.save(tmp_path / "picture.png")
    opened = open_image(str(tmp_path / "picture.png"))
    assert (opened.mode, opened.tobytes()) == (mode, picture.tobytes())


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_the_first_of_many_frames_is_read_and_the_file_is_closed(suffix, tmp_path):
    path = tmp_path / f"frames.{suffix}"
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    picture = open_image(path)
    path.unlink()
    assert torch.equal(Preprocess(16)(picture), Preprocess(16)(frames[0]))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_named(suffix, tmp_path):
    path = tmp_path / f"half.{suffix}"
    noise("RGB", 200, 200).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"half\.{suffix}: (truncated or damaged|empty, or not in)"):
        open_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html><body>404</body></html>", b"version https://git-lfs", b"\xff\xd8\xff"]
)
def test_a_file_that_is_no_picture_is_named(content, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"cat\.jpg: "):
        open_image(tmp_path / "cat.jpg")


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png: No such file or directory"):
        open_image(tmp_path / "absent.png")
    if sys.platform != "win32":
        with pytest.raises(ImageError, match=r"Is a directory"):
            open_image(tmp_path)


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns of the first and refuses the second
def test_decompression_bombs_are_refused_whatever_the_warning_filters(action, side, tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e"
    )
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=r"bomb\.png: too large to decode safely"):
            open_image(tmp_path / "bomb.png")


def test_mutated_files_give_a_picture_or_an_image_error(tmp_path):
    generator = np.random.default_rng(6)
    path = tmp_path / "mutated"
    refusals = []
    for suffix in ("jpeg", "png", "gif", "webp", "tiff", "bmp"):
        noise("RGB", 24, 16).save(path, suffix)
        original = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            mutated = original.copy()
            mutated[generator.integers(0, len(mutated), 3)] = generator.integers(0, 256, 3)
            path.write_bytes(mutated.tobytes())
            try:
                open_image(path)
            except ImageError as error:
                refusals.append(str(error))
    assert 0 < len(refusals) < 240
    assert all("mutated: " in message for message in refusals)


def test_a_postscript_picture_is_not_run(tmp_path):
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (4, 4)).save(path, format="EPS")
    with pytest.raises(ImageError, match="not in a picture format"):
        open_image(path)


@pytest.mark.parametrize(
    ("side", "size"), [(None, (1411, 1411)), (1000, (1411, 1411)), (448, (706, 706)), (100, (177, 177))]
)
def test_a_draft_keeps_the_shorter_side(side, size):
    assert open_image(SKIMAGE / "retina.jpg", draft=side).size == size


def test_a_draft_of_twice_the_side_looks_nearly_the_same():
    exact, draft = (Preprocess(112)(open_image(SKIMAGE / "retina.jpg", draft=side)) for side in (None, 224))
    error = 255 * ((exact - draft).abs().mean(dim=(1, 2)) * torch.tensor(CLIP_STD)).mean()
    assert 0 < error < 0.5


def test_only_jpegs_have_a_draft():
    exact, draft = (open_image(SKIMAGE / "coffee.png", draft=side) for side in (None, 50))
    assert exact.tobytes() == draft.tobytes()
