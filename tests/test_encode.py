"""Streams of pictures and texts, embedded batch by batch."""

import threading

import pytest
import torch
from conftest import TINY, filled
from PIL import Image

import clip
from clip.preprocess import ImageError, Preprocess
from clip.tasks.encode import encode_images, encode_texts, gather, read_pictures

TEXTS = ["a dog", "a photo of a very small cat on a very large mat", "!", "", "a dog", "two words"]


@pytest.fixture(scope="module", params=["vit", "rn"])
def model(request):
    return filled(TINY[request.param])


@pytest.fixture
def pictures(tmp_path):
    """Seven paths; the third does not exist, the sixth is torn."""
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for path in paths:
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
    paths[2].unlink()
    paths[5].write_bytes(paths[5].read_bytes()[:200])
    return paths


def preprocess_of(model):
    return Preprocess(model.visual.input_resolution)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_whatever_the_batch_each_row_is_its_own_pictures_vector(model, pictures, batch_size):
    preprocess = preprocess_of(model)
    rows = gather(encode_images(model, preprocess, pictures, batch_size))
    assert rows.indices == [0, 1, 3, 4, 6]
    assert sorted(rows.errors) == [2, 5]
    assert len(rows) == 7
    for index, vector in zip(rows.indices, rows.values, strict=True):
        with torch.no_grad():
            expected = model.encode_image(preprocess(Image.open(pictures[index]))[None])[0].float()
        torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-5, rtol=0)


def test_an_error_names_its_file(pictures):
    errors = gather(read_pictures(pictures, Preprocess(32))).errors
    assert "2.png: No such file" in str(errors[2])
    assert "5.png: truncated or damaged" in str(errors[5])


def test_pictures_may_be_paths_pictures_or_functions(pictures):
    path = pictures[0]
    [rows] = read_pictures([path, str(path), Image.open(path), lambda: Image.open(path)], Preprocess(32))
    assert rows.indices == [0, 1, 2, 3]
    assert all(torch.equal(image, rows.values[0]) for image in rows.values)


def test_a_batch_without_a_readable_picture_goes_by(pictures, model):
    first, second = encode_images(model, preprocess_of(model), [pictures[2], pictures[5], pictures[0]], batch_size=2)
    assert (first.indices, len(first)) == ([], 2)
    assert (second.indices, len(second)) == ([2], 1)


def test_no_readable_picture_at_all_is_an_error(pictures):
    with pytest.raises(ImageError, match=r"no picture can be read \(2 tried\)"):
        gather(read_pictures([pictures[2], pictures[5]], Preprocess(32)))
    assert len(gather(read_pictures([], Preprocess(32)))) == 0


def test_not_more_than_two_batches_are_taken_from_the_stream_before_they_are_used(pictures):
    taken = []

    def stream():
        for number in range(100):
            taken.append(number)
            yield pictures[0]

    batches = read_pictures(stream(), Preprocess(32), batch_size=4)
    next(batches)
    assert len(taken) == 8
    batches.close()
    assert threading.active_count() < 10


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_texts_come_back_in_their_order(model, batch_size):
    with torch.no_grad():
        expected = torch.cat([model.encode_text(clip.tokenize(text)).float() for text in TEXTS])
    expected /= expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encode_texts(model, TEXTS, batch_size), expected, atol=1e-5, rtol=0)


def test_a_text_that_is_too_long_is_refused_or_cut(model):
    with pytest.raises(RuntimeError, match="context length"):
        encode_texts(model, ["dog " * 80])
    vectors = encode_texts(model, ["dog " * 80, "dog " * 90], truncate=True)
    assert torch.equal(vectors[0], vectors[1])


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": 0}])
def test_nothing_at_once_is_refused(wrong):
    with pytest.raises(ValueError, match="at least one"):
        list(read_pictures([], Preprocess(32), **wrong))


def test_no_texts_are_refused(model):
    with pytest.raises(ValueError, match="at least one text"):
        encode_texts(model, [])
