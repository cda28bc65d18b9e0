"""The drawn world: captions say what the pictures show, and held-out combinations stay out."""

import csv
import itertools
import pickle
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from clip.training.data import read_captions
from clip.training.drawn import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NUMBERS,
    PLURALS,
    RELATIONS,
    SIZES,
    DrawnWorld,
    Scene,
    Thing,
    _shade,
    draw_scene,
    held_out,
    questions,
    sample_scene,
    write_folder,
)
from clip.training.drawn_kinds import BODY, ROOM

COMBINATIONS = list(itertools.product(KINDS, COLOURS))
NOUNS = {kind: kind for kind in KINDS} | {PLURALS.get(kind, kind + "s"): kind for kind in KINDS}
ROOMY = [name for name, kind in KINDS.items() if kind.roomy]
RED_FISH, BLUE_BOAT = Thing("fish", "red"), Thing("boat", "blue")

_rng = random.Random(0)
SHADES = {colour: np.array([_shade(colour, _rng) for _ in range(300)], dtype=float) for colour in COLOURS}


def named(combination_caption):
    """The combinations of colour and kind that a caption names, found word by word."""
    words = re.findall(r"[a-z]+", combination_caption)
    return {(NOUNS[noun], colour) for colour, noun in itertools.pairwise(words) if colour in COLOURS and noun in NOUNS}


def drawn_plainly(scene, count, resolution=64):
    """Drawings of a scene on a ground of one colour, (R, R, 3), each with where it is not ground, (R, R)."""
    seeds = itertools.count()
    while count:
        pixels = np.asarray(draw_scene(scene, random.Random(next(seeds)), resolution), dtype=float)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        if (corners == corners[0]).all():
            yield pixels, np.abs(pixels - corners[0]).max(axis=2) > 20
            count -= 1


def distance_to(colour, pixels):
    """(H, W), to the nearest shade of a colour."""
    flat = pixels.reshape(-1, 1, 3)
    return np.linalg.norm(flat - SHADES[colour][::3], axis=2).min(axis=1).reshape(pixels.shape[:2])


def centre(mask):
    """Mean row and column."""
    return np.argwhere(mask).mean(axis=0)


def spread(mask):
    """The mask and its neighbours, eight of each pixel."""
    wider = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([wider[i : i + height, j : j + width] for i, j in itertools.product(range(3), range(3))], axis=0)


def reached(free, starts):
    """The pixels of a mask that a walk over it from some pixels reaches, by spreading until nothing changes."""
    seen = free & starts
    while True:
        wider = spread(seen) & free
        if (wider == seen).all():
            return seen
        seen = wider


def blobs(mask):
    """How many connected parts a mask has, holes filled; specks of less than five pixels do not count."""
    rim = np.pad(np.zeros_like(mask[2:, 2:]), 1, constant_values=True)
    count, left = 0, ~reached(~mask, rim)
    while left.any():
        first = np.zeros_like(left)
        first[tuple(np.argwhere(left)[0])] = True
        blob = reached(left, first)
        count += blob.sum() >= 5
        left &= ~blob
    return count


# What is held out


def test_a_quarter_is_held_out_evenly():
    kept = [(kind, colour) for kind, colour in COMBINATIONS if held_out(kind, colour)]
    assert (len(KINDS), len(COLOURS), len(COMBINATIONS), len(kept)) == (40, 12, 480, 120)
    assert {sum(k == kind for k, _ in kept) for kind in KINDS} == {3}
    assert {sum(c == colour for _, c in kept) for colour in COLOURS} == {10}


def test_held_out_combinations_are_never_drawn_nor_named_in_training():
    world, rng, seen = DrawnWorld(100, 16, twins=True), random.Random(0), set()
    for index in range(600):
        for pair in world.draw(index, rng):
            combinations = named(pair.caption)
            assert combinations == named(pair.identity) != set()
            seen |= combinations
    assert not any(itertools.starmap(held_out, seen))
    assert len(seen) > 320  # of 360


@pytest.mark.parametrize("kept", [False, True])
def test_scenes_and_their_twins_are_wholly_held_out_or_wholly_trained(kept):
    rng, relations = random.Random(1), set()
    for _ in range(2000):
        scene = sample_scene(rng, kept)
        relations.add(scene.relation)
        for each in [scene, scene.colours_exchanged(), scene.places_exchanged()] if scene.relation else [scene]:
            assert all(held_out(thing.kind, thing.colour) is kept for thing in each.things)
    assert relations == {None, *RELATIONS}


def test_every_held_out_combination_is_asked_for_by_name():
    asked = {question.captions[question.answer] for question in questions("things", 1500, 0, 16)}
    assert len(asked) == 120


# Words


def test_captions_of_a_relation_worked_by_hand():
    core = {
        "a red fish above a blue boat",
        "a red fish over a blue boat",
        "a blue boat below a red fish",
        "a blue boat under a red fish",
    }
    framed = {
        f.format(c) for c in core for f in ("{}", "there is {}", "a drawing of {}", "a picture of {}", "a photo of {}.")
    }
    turned = {
        "there is a red fish, and below it a blue boat",
        "there is a red fish, and under it a blue boat",
        "there is a blue boat, and above it a red fish",
        "there is a blue boat, and over it a red fish",
        "above a blue boat there is a red fish",
        "over a blue boat there is a red fish",
        "below a red fish there is a blue boat",
        "under a red fish there is a blue boat",
    }
    scene, rng = Scene((RED_FISH, BLUE_BOAT), relation="above"), random.Random(0)
    assert {scene.caption(rng) for _ in range(1500)} == framed | turned


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((Thing("apple", "orange"),)), "an orange apple"),
        (Scene((Thing("apple", "orange", "big"),), background="night"), "a big orange apple at night"),
        (Scene((Thing("leaf", "grey"),), 5), "five grey leaves"),
        (Scene((RED_FISH,), 2, background="sea"), "two red fish at sea"),
        (Scene((Thing("heart", "pink"), Thing("cup", "black")), relation="inside"), "a pink heart inside a black cup"),
    ],
)
def test_the_plain_sentence_is_the_identity_and_one_of_the_captions(scene, caption):
    rng = random.Random(0)
    assert scene.identity == caption
    assert caption in {scene.caption(rng) for _ in range(300)}


@pytest.mark.parametrize(("relation", "converse"), [("above", "below"), ("left of", "right of")])
def test_one_meaning_seen_from_either_thing_has_one_identity(relation, converse):
    scene = Scene((RED_FISH, BLUE_BOAT), relation=relation)
    assert scene.identity == Scene((BLUE_BOAT, RED_FISH), relation=converse).identity
    assert scene.identity != scene.places_exchanged().identity


def test_no_caption_has_two_meanings():
    rng, meaning = random.Random(2), {}
    for _ in range(10000):
        scene = sample_scene(rng, False)
        assert meaning.setdefault(scene.caption(rng), scene.identity) == scene.identity
    assert len(meaning) > len(set(meaning.values()))


def test_twins_differ_in_meaning_and_only_in_the_order_of_words():
    def words(caption):
        return sorted("a" if word == "an" else word for word in caption.split())

    draws = [DrawnWorld(1, 16, twins=True).draw(0, random.Random(seed)) for seed in range(200)]
    triples = [draw for draw in draws if len(draw) > 1]
    assert {len(triple) for triple in triples} == {3}
    for original, *twins in triples:
        for twin in twins:
            assert original.identity != twin.identity
            assert original.caption != twin.caption
            assert re.sub("[.,]", "", original.caption) != twin.caption
            assert words(re.sub("[.,]", "", original.caption)) == words(re.sub("[.,]", "", twin.caption))


def test_without_twins_each_draw_is_one_pair():
    assert {len(DrawnWorld(1, 16).draw(0, random.Random(seed))) for seed in range(50)} == {1}


# Pictures


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_as_many_are_seen_as_are_said(count):
    kinds = random.Random(count).sample(list(KINDS), 14)
    for kind in kinds:
        for _, mask in drawn_plainly(Scene((Thing(kind, "red"),), count), 2, 128):
            assert blobs(mask) == count, kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_in_one_piece_and_inside_the_picture(kind):
    for size in SIZES:
        for _, mask in drawn_plainly(Scene((Thing(kind, "turquoise", size),)), 2, 96):
            assert blobs(mask) == 1
            assert not mask[[0, -1]].any()
            assert not mask[:, [0, -1]].any()


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("above", 0, 1), ("below", 0, -1), ("left of", 1, 1), ("right of", 1, -1)]
)
def test_the_first_thing_stands_where_the_relation_says(relation, axis, sign):
    rng = random.Random(relation)
    for _ in range(25):
        kinds = rng.sample(list(KINDS), 2)
        sizes = rng.choice([(None, None), ("small", "big"), ("big", "small")])
        scene = Scene(tuple(map(Thing, kinds, ("red", "blue"), sizes)), relation=relation)
        for pixels, mask in drawn_plainly(scene, 1):
            red, blue = (mask & (distance_to(colour, pixels) < 10) for colour in ("red", "blue"))
            offset = centre(blue) - centre(red)
            assert sign * offset[axis] > abs(offset[1 - axis])


@pytest.mark.parametrize("outer", ROOMY)
def test_what_is_inside_is_surrounded(outer):
    for inner in random.Random(outer).sample([kind for kind in ROOMY if kind != outer], 4):
        scene = Scene((Thing(inner, "red"), Thing(outer, "blue")), relation="inside")
        for pixels, mask in drawn_plainly(scene, 1, 96):
            red, blue = (mask & (distance_to(colour, pixels) < 10) for colour in ("red", "blue"))
            rim = np.pad(np.zeros_like(mask[2:, 2:]), 1, constant_values=True)
            outside = reached(~mask, rim)
            assert red.sum() > 40
            assert blue.sum() > 40
            assert not (spread(spread(outside)) & red).any(), inner


def test_small_and_big_are_clearly_so():
    extent = {}
    for size in SIZES:
        masks = [
            mask
            for kind in ("fish", "key", "circle")
            for _, mask in drawn_plainly(Scene((Thing(kind, "red", size),)), 5)
        ]
        extent[size] = [max(np.ptp(np.argwhere(mask), axis=0)) / 64 for mask in masks]
    assert max(extent["small"]) < 0.4 < 0.8 < min(extent["big"])


def test_shades_of_two_colours_never_meet():
    for (_, one), (_, other) in itertools.combinations(SHADES.items(), 2):
        assert np.linalg.norm(one[:, None] - other[None], axis=2).min() > 45


@pytest.mark.parametrize("colour", COLOURS)
def test_most_of_a_thing_has_the_colour_that_is_said(colour):
    kinds = random.Random(colour).sample(list(KINDS), 12)
    for kind in kinds:
        for pixels, mask in drawn_plainly(Scene((Thing(kind, colour, "big"),)), 1):
            tones, counts = np.unique(pixels[mask], axis=0, return_counts=True)
            body = tones[counts.argmax()]
            nearest = min(SHADES, key=lambda name: np.linalg.norm(SHADES[name] - body, axis=1).min())
            assert nearest == colour, kind


def test_no_two_kinds_have_the_same_silhouette():
    silhouettes = {}
    for name, kind in KINDS.items():
        points = np.array([p for ink, polygon in kind.parts if ink == BODY for p in polygon])
        low, high = points.min(axis=0), points.max(axis=0)
        image = Image.new("1", (64, 64))
        for ink, polygon in kind.parts:
            if ink == BODY:
                placed = (np.array(polygon) - (low + high) / 2) / (high - low).max() * 62 + 32
                ImageDraw.Draw(image).polygon(placed.ravel().tolist(), 1)
        silhouettes[name] = np.asarray(image)
    for (one, a), (other, b) in itertools.combinations(silhouettes.items(), 2):
        assert (a & b).sum() < 0.85 * (a | b).sum(), (one, other)


def test_the_room_of_a_kind_is_inside_its_outline():
    for name in ROOMY:
        image = Image.new("1", (200, 200))
        for ink, polygon in KINDS[name].parts:
            if ink != ROOM:
                ImageDraw.Draw(image).polygon([100 + 90 * v for point in polygon for v in point], 1)
        if name == "ring":
            ImageDraw.floodfill(image, (100, 100), 1)
        rim = np.array(KINDS[name].parts[-1][1]) * 90 + 100
        assert all(image.getpixel(tuple(map(int, point))) for point in rim), name


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_differ_from_each_other_more_than_from_themselves(background):
    def mean(name, seed):
        scene = Scene((Thing("circle", "grey", "small"),), background=name)
        return np.asarray(draw_scene(scene, random.Random(seed), 32), dtype=float).mean(axis=(0, 1))

    centres = {name: np.mean([mean(name, seed) for seed in range(20)], axis=0) for name in BACKGROUNDS}
    for seed in range(20, 40):
        here = mean(background, seed)
        assert min(centres, key=lambda name: np.linalg.norm(centres[name] - here)) == background


# Datasets, questions, folders


def test_a_draw_follows_from_its_generator_alone():
    world = DrawnWorld(10, 32, twins=True)
    copy = pickle.loads(pickle.dumps(world))
    draws = []
    for index in range(30):
        random.seed(index)  # must not matter
        draw = [(p.image.tobytes(), p.caption, p.identity) for p in world.draw(index, random.Random(index))]
        again = [(p.image.tobytes(), p.caption, p.identity) for p in copy.draw(index, random.Random(index))]
        assert draw == again
        draws.append(draw[0][0])
    assert len(set(draws)) == 30
    assert len(world) == 10


def test_pictures_have_the_resolution_asked_for():
    image = draw_scene(Scene((RED_FISH,)), random.Random(0), 50)
    assert (image.mode, image.size) == ("RGB", (50, 50))


@pytest.mark.parametrize(("ability", "choices"), [("things", 480), ("counting", 5), ("places", 2), ("colours", 2)])
def test_questions_ask_about_held_out_combinations(ability, choices):
    asked = list(questions(ability, 60, 3, 16))
    assert {len(set(question.captions)) for question in asked} == {choices}
    assert len({question.answer for question in asked}) >= min(choices, 5)
    for question in asked:
        if ability == "things":
            assert all(itertools.starmap(held_out, named(question.captions[question.answer])))
        else:
            assert all(itertools.starmap(held_out, set().union(*map(named, question.captions))))
    again = list(questions(ability, 60, 3, 16))
    assert [(q.image.tobytes(), q.captions, q.answer) for q in asked] == [
        (q.image.tobytes(), q.captions, q.answer) for q in again
    ]
    assert [q.answer for q in questions(ability, 60, 4, 16)] != [q.answer for q in asked]


def test_the_answer_is_what_the_picture_shows():
    counted = 0
    for question in questions("counting", 40, 0, 128):
        pixels = np.asarray(question.image, dtype=float)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        if (corners == corners[0]).all():
            assert blobs(np.abs(pixels - corners[0]).max(axis=2) > 20) == question.answer + 1
            assert question.captions[question.answer].startswith(NUMBERS[question.answer])
            counted += 1
    assert counted > 20


def test_a_folder_is_read_back(tmp_path):
    write_folder(tmp_path / "new" / "one", 30, seed=5, resolution=24, held_out=True)
    write_folder(tmp_path / "two", 30, seed=5, resolution=24, held_out=True)
    table = (tmp_path / "two" / "captions.csv").read_text(encoding="utf-8")
    assert (tmp_path / "new" / "one" / "captions.csv").read_text(encoding="utf-8") == table
    rows = list(csv.DictReader(table.splitlines()))
    items = read_captions(tmp_path / "two" / "captions.csv")
    assert [(item.captions, item.identity) for item in items] == [((row["caption"],), row["id"]) for row in rows]
    for item, row in zip(items, rows, strict=True):
        assert named(row["caption"]) == named(row["id"]) != set()
        assert all(itertools.starmap(held_out, named(row["caption"])))
        assert item.open().size == (24, 24)
        assert item.open().tobytes() == Image.open(tmp_path / "new" / "one" / row["image"]).tobytes()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="not empty"):
        write_folder(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Thing("dragon", "red"), "expected a kind out of circle"),
        (lambda: Thing("fish", "lilac"), "expected a colour out of red"),
        (lambda: Thing("fish", "red", "huge"), "small, big; got 'huge'"),
        (lambda: Scene((RED_FISH,), 6), "expected a count out of 1, 2, 3, 4, 5; got 6"),
        (lambda: Scene((RED_FISH,), background="desert"), "expected a background"),
        (lambda: Scene((RED_FISH, BLUE_BOAT)), "two things need a relation"),
        (lambda: Scene((RED_FISH,), relation="above"), "expected two things"),
        (lambda: Scene((RED_FISH, BLUE_BOAT), relation="near"), "expected a relation"),
        (lambda: Scene((RED_FISH, Thing("boat", "red")), relation="above"), "two kinds and two colours"),
        (lambda: Scene((RED_FISH, Thing("boat", "blue", "big")), relation="above"), "one small and one big"),
        (lambda: Scene((RED_FISH, Thing("key", "blue")), relation="inside"), "room inside"),
        (lambda: Scene((RED_FISH,)).places_exchanged(), "only two things"),
        (lambda: draw_scene(Scene((RED_FISH,)), random.Random(0), 4), "at least 16 pixels"),
        (lambda: questions("spelling", 1, 0, 16), "things, counting, places, colours; got 'spelling'"),
        (lambda: write_folder("never_made", 0), "at least one picture"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
