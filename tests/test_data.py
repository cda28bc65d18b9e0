"""Captioned pictures: every form they are read in, and the order in which they are dealt out."""

import csv
import io
import json
import os
import pickle
import random
import signal
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip import tokenize
from clip.preprocess import ImageError, Preprocess
from clip.training.data import Batches, CaptionedPictures, Mixed, Pair, read_captions, split

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


preprocess = Preprocess(8)


def color_of(image):
    """The one color of a test picture, blurred by JPEG to tens."""
    return tuple(round(level / 10) * 10 for level in image.convert("RGB").getpixel((0, 0)))


def encoded(color, suffix="png"):
    file = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(file, "JPEG" if suffix == "jpg" else suffix)
    return file.getvalue()


def write(path, content, newline="\n", encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.replace("\n", newline).encode(encoding) if isinstance(content, str) else content)
    return path


def captions_of(items, folder):
    return {os.path.relpath(item.source, folder): item.captions for item in items}


# Forms

EXPECTED = {"1.jpg": ("a dog", "a pet, running"), "sub/2.jpg": ('a "cat"',)}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.txt", 'image,caption\n1.jpg,a dog\n1.jpg,"a pet, running"\nsub/2.jpg,"a ""cat"""\n'),
        ("captions.csv", 'caption,url,filename\n"a ""cat""",x,sub/2.jpg\na dog,x,1.jpg\n\n"a pet, running",x,1.jpg'),
        ("train.tsv", 'filepath\ttitle\n1.jpg\ta dog\n1.jpg\ta pet, running\nsub/2.jpg\t"a ""cat"""\n'),
        (
            "pairs.jsonl",
            '{"image_path": "1.jpg", "captions": ["a dog", "a pet, running"]}\n\n'
            '{"image_path": "sub/2.jpg", "captions": ["a \\"cat\\""]}\n',
        ),
        (
            "lines.json",
            '{"image": "1.jpg", "caption": "a dog"}\n{"image": "1.jpg", "caption": "a pet, running"}\n'
            '{"image": "sub/2.jpg", "title": "a \\"cat\\""}',
        ),
    ],
)
def test_each_text_form_gives_the_same_pictures_and_captions(tmp_path, name, text, newline, encoding):
    items = read_captions(write(tmp_path / name, text, newline, encoding))
    assert captions_of(items, tmp_path) == EXPECTED
    assert {item.identity for item in items} == {"1.jpg", "sub/2.jpg"}


@pytest.mark.parametrize("indent", [None, 1])
def test_coco_captions_are_joined_by_image_id(tmp_path, indent):
    document = {
        "info": {},
        "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 3, "file_name": "sub/2.jpg"}, {"id": 9, "file_name": "x"}],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "a dog\n"},
            {"image_id": 3, "id": 2, "caption": 'a "cat"'},
            {"image_id": 7, "id": 3, "caption": "a pet, running"},
        ],
    }
    path = write(tmp_path / "annotations" / "captions_val.json", json.dumps(document, indent=indent))
    assert captions_of(read_captions(path, tmp_path / "pictures"), tmp_path / "pictures") == EXPECTED


def test_an_id_column_is_the_identity_and_may_be_shared(tmp_path):
    table = "image,caption,id\na/1.png,grin,1f600\nb/1.png,grin,1f600\nb/2.png,wink,1f609\n"
    items = read_captions(write(tmp_path / "captions.csv", table))
    assert [item.identity for item in items] == ["1f600", "1f600", "1f609"]
    line = '{"image_path": "1.jpg", "captions": ["grin"], "id": 600}'
    assert read_captions(write(tmp_path / "pairs.jsonl", line))[0].identity == "600"


def test_a_caption_may_run_over_lines(tmp_path):
    table = 'image,caption\n1.jpg,"a dog\nin the rain"\n2.jpg,a cat\n'
    assert captions_of(read_captions(write(tmp_path / "c.csv", table)), tmp_path)["1.jpg"] == ("a dog\nin the rain",)


def test_a_folder_of_classes_gives_every_template_to_every_picture(tmp_path):
    for name in ("hot_dog/1.png", "hot_dog/2.JPG", "cat/1.webp"):
        write(tmp_path / name, b"")
    write(tmp_path / "cat" / "notes.md", "")
    items = read_captions(tmp_path, templates=("a {}.", "my {}!"))
    assert captions_of(items, tmp_path) == {
        "cat/1.webp": ("a cat.", "my cat!"),
        "hot_dog/1.png": ("a hot dog.", "my hot dog!"),
        "hot_dog/2.JPG": ("a hot dog.", "my hot dog!"),
    }
    assert [item.identity for item in items] == ["cat", "hot_dog", "hot_dog"]
    assert read_captions(tmp_path)[0].captions == ("a photo of a cat.",)


def write_shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    write_shard(
        tmp_path / "009.tar",
        {
            "a/1.jpg": encoded((200, 0, 0), "jpg"),
            "a/1.txt": b"red\n",
            "b/1.png": encoded((0, 200, 0)),
            "b/1.json": b'{"caption": "green", "width": 9}',
        },
    )
    write_shard(
        tmp_path / "010.tar", {"2.seg.png": b"?", "2.txt": "café".encode(), "2.webp": encoded((0, 0, 200), "webp")}
    )
    return tmp_path


@pytest.mark.parametrize("pattern", [".", "*.tar", "0{09..10}.tar"])
def test_shards_are_read_as_a_folder_or_a_pattern(shards, pattern):
    items = read_captions(shards / pattern)
    assert [item.captions for item in items] == [("red",), ("green",), ("café",)]
    assert [color_of(item.open()) for item in items] == [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    assert len({item.identity for item in items}) == 3
    assert [item.identity for item in items][:2] == ["009.tar/a/1", "009.tar/b/1"]


def test_a_damaged_picture_in_a_shard_is_an_image_error_that_names_it(tmp_path):
    write_shard(tmp_path / "0.tar", {"1.jpg": b"no picture", "1.txt": b"a dog"})
    (item,) = read_captions(tmp_path / "0.tar")
    with pytest.raises(ImageError, match=r"0\.tar/1\.jpg"):
        item.open()
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ImageError, match=r"0\.tar/1\.jpg: No such file"):
        item.open()


caption_texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), caption_texts), min_size=1), st.booleans())
def test_tables_and_json_lines_give_back_what_was_written(tmp_path_factory, pairs, tabs):
    folder = tmp_path_factory.mktemp("written")
    with open(folder / "c.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if tabs else ",")
        writer.writerows([("image", "caption"), *((f"{i}.jpg", caption) for i, caption in pairs)])
    lines = (json.dumps({"image_path": f"{i}.jpg", "captions": [caption]}, ensure_ascii=False) for i, caption in pairs)
    write(folder / "c.jsonl", "\n".join(lines))
    expected = {}
    for i, caption in pairs:
        expected.setdefault(f"{i}.jpg", []).append(caption)
    expected = {name: tuple(captions) for name, captions in expected.items()}
    assert captions_of(read_captions(folder / "c.csv"), folder) == expected
    assert captions_of(read_captions(folder / "c.jsonl"), folder) == expected


# What is wrong with a file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "picture,text\n1.jpg,a dog\n", r"c\.csv, line 1: expected .* image .*, got 'picture, text'"),
        ("c.csv", "image,filename,caption\n1.jpg,1.jpg,a\n", r"line 1: expected .* one column"),
        ("c.csv", "", r"line 1: expected a header"),
        ("c.csv", "image,caption\n", "found none"),
        ("c.csv", 'image,caption\n1.jpg,"a\ndog"\n2.jpg,a dog, a cat\n', r"c\.csv, line 4: expected 2 fields .* got 3"),
        ("c.csv", 'image,caption\n1.jpg,ok\n2.jpg,"a" dog\n', r"c\.csv, line 3: .* doubled"),
        ("c.csv", 'image,caption\n1.jpg,"a dog\n', r"line 2"),
        ("c.csv", "image,caption\n,a dog\n", r"line 2: expected the name of a picture"),
        ("c.csv", "image,caption,id\n1.jpg,a,7\n1.jpg,b,8\n", r"line 3: .*1\.jpg has the id '8' here, and '7' before"),
        ("c.csv", "image,caption\n1.jpg,caf\xe9\n".encode("latin-1"), r"c\.csv: expected UTF-8"),
        ("c.jsonl", '{"image_path": "1.jpg", "captions": ["a"]}\n{"image_path"', r"line 2: expected a JSON object"),
        ("c.jsonl", '{"image_path": "1.jpg"}', r'line 1: expected \{"image_path'),
        ("c.jsonl", "[1, 2]", r"line 1: expected"),
        ("c.jsonl", '{"image_path": "1.jpg", "captions": "a dog"}', r"line 1: expected a list of captions"),
        ("c.jsonl", '{"image_path": 1, "captions": ["a"]}', r"line 1: expected the name of a picture, got 1"),
        ("c.json", '{\n"images": []}', r"c\.json: expected JSON lines, or COCO"),
        ("c.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}', r"annotations\[0\]: expected"),
        ("c.xlsx", "", r"c\.xlsx: expected a table"),
        ("c.tar", "not an archive", r"c\.tar: expected an uncompressed"),
        ("d/1.jpg", "", "expected a folder with a folder of pictures for each class"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        read_captions(path.parent if name.startswith("d/") else path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.jpg": b"", "1.cls": b"3"}, r"0\.tar/1: expected a picture .* and a \.txt or \.json, got \.jpg, \.cls"),
        ({"1.txt": b"a dog"}, r"0\.tar/1: expected a picture"),
        ({"1.jpg": b"", "1.json": b'{"text": "a"}'}, r"0\.tar/1\.json: expected a caption \(KeyError"),
        ({"1.jpg": b"", "1.json": b'{"caption": 3}'}, r"0\.tar/1\.json: expected a caption"),
        ({"1.jpg": b"", "1.txt": b"\xff"}, r"0\.tar/1\.txt: expected a caption \(UnicodeDecodeError"),
    ],
)
def test_errors_name_the_sample_of_a_shard(tmp_path, files, message):
    write_shard(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / "0.tar")


def test_missing_files_are_os_errors_that_name_them(tmp_path):
    for name in ("c.csv", "c.jsonl", "0.tar", "{0..1}.tar"):
        with pytest.raises(FileNotFoundError, match=r"c\.csv|c\.jsonl|0\.tar"):
            read_captions(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.tar"):
        read_captions(tmp_path / "*.tar")


def test_empty_captions_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "c.csv", "image,caption\n1.jpg,a dog\n1.jpg,\n2.jpg,  \n3.jpg,a cat\n")
    with pytest.warns(UserWarning, match=r"2 empty captions were left out, the first in .*c\.csv, line 3"):
        items = read_captions(path)
    assert captions_of(items, tmp_path) == {"1.jpg": ("a dog",), "3.jpg": ("a cat",)}


def test_a_template_without_a_place_for_the_class_is_refused(tmp_path):
    write(tmp_path / "cat" / "1.png", b"")
    with pytest.raises(ValueError, match="'a photo'"):
        read_captions(tmp_path, templates=("a photo",))


# Splits


def table(tmp_path, count, name="c.csv"):
    rows = (f"{i}.png,a thing,{i // 2}" for i in range(count))
    return read_captions(write(tmp_path / name, "image,caption,id\n" + "\n".join(rows)))


def test_no_identity_is_on_both_sides_of_a_split_and_every_picture_on_one(tmp_path):
    items = table(tmp_path, 400)
    train, validation = split(items, 0.2, seed=0)
    assert not {item.identity for item in train} & {item.identity for item in validation}
    assert sorted([*train, *validation], key=items.index) == items
    assert 50 <= len(validation) <= 110  # 80 in the mean, standard deviation 11


def test_other_rows_do_not_move_a_picture_to_the_other_side(tmp_path):
    items = table(tmp_path, 200)
    kept = set(split(items, 0.3, seed=1)[1])
    fewer = items[::-1][:101]
    assert set(split(fewer, 0.3, seed=1)[1]) == kept & set(fewer)


def test_the_seed_chooses_the_split_and_the_fraction_its_size(tmp_path):
    items = table(tmp_path, 100)
    assert split(items, 0.5, seed=0) != split(items, 0.5, seed=1)
    assert split(items, 0.0, seed=0) == (items, [])
    assert split(items, 1.0, seed=0) == ([], items)
    assert set(split(items, 0.2, 0)[1]) < set(split(items, 0.4, 0)[1])
    with pytest.raises(ValueError, match="got 20"):
        split(items, 20, seed=0)


def test_a_folder_of_classes_is_split_by_picture(tmp_path):
    for i in range(40):
        write(tmp_path / f"class{i % 2}" / f"{i}.png", b"")
    train, validation = split(read_captions(tmp_path), 0.5, seed=0)
    assert {item.identity for item in train} == {item.identity for item in validation} == {"class0", "class1"}


# Data sets


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures, of which 4.png and 7.png cannot be read, with two captions each."""
    rows = ["image,caption"]
    for i in range(12):
        data = b"" if i == 4 else encoded((20 * i, 0, 0))[:45] if i == 7 else encoded((20 * i, 0, 0))
        write(tmp_path / f"{i}.png", data)
        rows += [f"{i}.png,thing {i}", f"{i}.png,number {i}"]
    return CaptionedPictures(read_captions(write(tmp_path / "captions.csv", "\n".join(rows))))


def test_a_draw_is_a_picture_with_one_of_its_captions(pictures):
    drawn = [pictures.draw(5, random.Random(seed))[0] for seed in range(40)]
    assert Counter(pair.caption for pair in drawn).keys() == {"thing 5", "number 5"}
    assert {pair.identity for pair in drawn} == {"5.png"}
    assert all(pair.image.mode == "RGB" and color_of(pair.image) == (100, 0, 0) for pair in drawn)


def test_an_augmentation_takes_the_picture_and_the_generator_of_the_draw(pictures):
    def brighten(image, rng):
        generators.append(rng.random())
        return image.point(lambda level: level + 10)

    generators = []
    varied = CaptionedPictures(pictures.items, brighten)
    for seed in (0, 0, 1):
        (pair,) = varied.draw(5, random.Random(seed))
        assert color_of(pair.image) == (110, 10, 10)
    assert generators[0] == generators[1] != generators[2]


def test_a_picture_that_cannot_be_read_is_an_image_error(pictures):
    for index in (4, 7):
        with pytest.raises(ImageError, match=rf"{index}\.png"):
            pictures.draw(index, random.Random(0))


class Numbers:
    """Pairs without files: index i gives `twins` pairs."""

    def __init__(self, count, name="n", twins=1):
        self.count, self.name, self.twins = count, name, twins

    def __len__(self):
        return self.count

    def draw(self, index, rng):
        image = Image.new("RGB", (8, 8), (index % 256, rng.randrange(256), 0))
        return [Pair(image, f"{self.name} {index} {twin}", f"{self.name} {index}") for twin in range(self.twins)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(0, 10**6))
def test_a_mixture_whose_block_is_a_multiple_of_a_part_draws_each_item_equally_often(first, second, times, seed):
    parts = [Numbers(first, "a"), Numbers(second, "b")]
    mixed = Mixed(parts, [first * times, second], length=first * times + second)
    rng = random.Random(seed)
    drawn = Counter(mixed.draw(index, rng)[0].identity for index in range(len(mixed)))
    assert drawn == {**{f"a {i}": times for i in range(first)}, **{f"b {i}": 1 for i in range(second)}}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 10**6))
def test_a_mixture_never_favours_an_item_by_more_than_the_neighbouring_stretches(count, length, seed):
    mixed = Mixed([Numbers(count)], [1.0], length=length)
    rng = random.Random(seed)
    drawn = Counter(mixed.draw(index, rng)[0].identity for index in range(length))
    assert max(drawn.values()) <= length / count + 2
    assert sum(drawn.values()) == length


def test_a_mixture_keeps_its_shares_and_reaches_every_item_of_a_part_that_is_too_long():
    mixed = Mixed([Numbers(50, "a"), Numbers(3, "b")], [1, 3], length=40)
    names, seen = Counter(), set()
    for epoch in range(40):
        for index in range(len(mixed)):
            (pair,) = mixed.draw(index, random.Random(f"{epoch} {index}"))
            names[pair.identity[0]] += 1
            seen.add(pair.identity)
    assert names == {"a": 10 * 40, "b": 30 * 40}
    assert len(seen) == 53
    assert len(Mixed([Numbers(50), Numbers(3)], [1, 1])) == 53


def test_a_mixture_that_cannot_be_is_refused():
    for parts, weights in (([], []), ([Numbers(3)], [1, 2]), ([Numbers(3)], [0]), ([Numbers(0)], [1])):
        with pytest.raises(ValueError, match="expected"):
            Mixed(parts, weights)


# Batches


def same(one, other):
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(one.identities, other.identities)
        and (one.captions, one.sources, one.bad) == (other.captions, other.sources, other.bad)
    )


def all_same(some, others):
    some, others = list(some), list(others)
    return len(some) == len(others) and all(map(same, some, others))


def test_a_batch_holds_what_was_drawn(pictures):
    (batch,) = Batches(pictures, 12, preprocess, seed=3).epoch(0)
    assert batch.images.shape == (10, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert torch.equal(batch.tokens, tokenize(batch.captions))
    numbers = [int(caption.split()[1]) for caption in batch.captions]
    assert sorted(numbers) == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]
    for image, number, source in zip(batch.images, numbers, batch.sources, strict=True):
        assert torch.equal(image, preprocess(Image.new("RGB", (9, 7), (20 * number, 0, 0))))
        assert source.endswith(f"{number}.png")


def test_bad_pictures_are_skipped_and_listed(pictures):
    batches = list(Batches(pictures, 4, preprocess).epoch(0))
    assert sorted(os.path.basename(bad.split(": ")[0]) for batch in batches for bad in batch.bad) == ["4.png", "7.png"]
    assert sum(len(batch.images) for batch in batches) == 10
    assert all(": " in bad for batch in batches for bad in batch.bad)


def test_a_picture_that_cannot_be_preprocessed_is_bad_too(pictures):
    def refuse(image):
        if color_of(image) == (60, 0, 0):
            raise ValueError("too thin")
        return preprocess(image)

    (batch,) = Batches(pictures, 12, refuse).epoch(0)
    assert len(batch.bad) == 3
    assert any(bad.endswith("3.png: too thin") for bad in batch.bad)


def test_a_batch_without_one_readable_picture_is_an_error_that_says_why(tmp_path):
    items = read_captions(write(tmp_path / "c.csv", "image,caption\n1.png,a\n2.png,b\n"), images=tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"folder of pictures right\? .*elsewhere.*png: No such file"):
        next(Batches(CaptionedPictures(items), 2, preprocess).epoch(0))


def test_identities_are_equal_where_the_names_are_and_the_same_on_every_machine():
    batch = next(Batches(Numbers(6, twins=2), 6, preprocess).epoch(0))
    names = [caption.rsplit(" ", 1)[0] for caption in batch.captions]
    assert [names.index(name) for name in names] == [batch.identities.tolist().index(i) for i in batch.identities]
    assert batch.identities[names.index("n 0")] == -5393089308565944980
    assert batch.identities.dtype == torch.int64


def test_batch_size_counts_draws_and_twins_come_on_top():
    batches = Batches(Numbers(10, twins=3), 4, preprocess)
    assert len(batches) == 2
    assert [len(batch.images) for batch in batches.epoch(0)] == [12, 12]


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_is_a_permutation(drop_last):
    batches = Batches(Numbers(10), 4, preprocess, drop_last=drop_last)
    for epoch in range(3):
        drawn = [caption for batch in batches.epoch(epoch) for caption in batch.captions]
        assert len(set(drawn)) == len(drawn) == (8 if drop_last else 10)
    assert len(batches) == len(list(batches.epoch(0))) == (2 if drop_last else 3)


def test_seed_and_epoch_choose_order_and_draws():
    def epoch(seed, number):
        return list(Batches(Numbers(20), 10, preprocess, seed).epoch(number))

    assert all_same(epoch(1, 5), epoch(1, 5))
    for other in (epoch(2, 5), epoch(1, 6)):
        assert epoch(1, 5)[0].captions != other[0].captions
        by_caption = {c: i for batch in other for c, i in zip(batch.captions, batch.images, strict=True)}
        first = epoch(1, 5)[0]
        same_pixels = [torch.equal(i, by_caption[c]) for c, i in zip(first.captions, first.images, strict=True)]
        assert sum(same_pixels) <= 2  # each draw's own generator differs too


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_an_epoch_begun_in_the_middle_goes_on_as_the_whole_one(start):
    batches = Batches(Numbers(17, twins=2), 4, preprocess, seed=7)
    assert all_same(batches.epoch(2, start), list(batches.epoch(2))[start:])


@forks
def test_workers_give_the_same_bits_wherever_an_epoch_begins_and_ends(pictures):
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    here, there = (Batches(pictures, 3, preprocess, 5, workers) for workers in (0, 2))
    assert all_same(there.epoch(0), here.epoch(0))
    workers = there._ahead
    assert all_same(there.epoch(1), here.epoch(1))
    assert there._ahead is workers  # they went on into the next epoch by themselves
    interrupted = there.epoch(2)
    assert same(next(interrupted), next(here.epoch(2)))
    assert all_same(there.epoch(4, start=2), here.epoch(4, start=2))  # started anew
    assert all_same(interrupted, here.epoch(2, start=1))  # and so was the one left in the middle
    assert torch.equal(torch.get_rng_state(), random_state)


class Deadly(Numbers):
    def draw(self, index, rng):
        os.kill(os.getpid(), signal.SIGKILL)


@forks
def test_a_worker_that_dies_is_an_error_with_advice():
    with pytest.raises(RuntimeError, match=r"a process that reads pictures died .* use fewer workers"):
        next(Batches(Deadly(4), 2, preprocess, workers=1).epoch(0))


def test_what_goes_to_a_worker_can_be_pickled(pictures):
    maker = Batches(Mixed([pictures, Numbers(3)], [1, 1]), 4, preprocess)._maker
    key = (0, torch.tensor([0, 1, 2]))
    assert same(pickle.loads(pickle.dumps(maker))[key], maker[key])


def test_captions_longer_than_the_context_are_cut():
    class Long(Numbers):
        def draw(self, index, rng):
            return [Pair(Image.new("RGB", (8, 8)), "dog " * 100, "long")]

    batch = next(Batches(Long(2), 2, preprocess, context_length=16).epoch(0))
    assert batch.tokens.shape == (2, 16)
    assert batch.tokens[0, -1] == 49407


def test_the_fingerprint_tells_other_data_and_only_that(tmp_path, pictures):
    def fingerprint(dataset, batch_size=4, seed=0):
        return Batches(dataset, batch_size, preprocess, seed).fingerprint

    own = fingerprint(pictures)
    moved = tmp_path / "moved"
    for item in pictures.items:
        write(moved / os.path.basename(item.source), Path(item.source).read_bytes())
    write(moved / "captions.csv", (tmp_path / "captions.csv").read_text())
    assert fingerprint(CaptionedPictures(read_captions(moved / "captions.csv"))) == own
    others = [
        fingerprint(pictures, batch_size=5),
        fingerprint(pictures, seed=1),
        fingerprint(CaptionedPictures(pictures.items[::-1])),
        fingerprint(CaptionedPictures(pictures.items[1:])),
    ]
    assert len({own, *others}) == 5


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        Batches(Numbers(3), 0, preprocess)
