"""An index of pictures: what it finds, what it reads again, and what being killed costs it."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, filled
from PIL import Image

import clip
from clip.model import CLIP, TOWERS, config_of
from clip.optimize import OptimizedCLIP
from clip.preprocess import ImageError, Preprocess, open_image
from clip.tasks import retrieval
from clip.tasks.retrieval import Index, Query, folders_of, model_of, tower_digests

SIZE = TINY["vit"]["image_resolution"]


@pytest.fixture(scope="module")
def model():
    return filled(TINY["vit"])


@pytest.fixture
def embedded(monkeypatch):
    """The number of pictures in each batch that a model, or its optimised copy, embeds."""
    sizes, encode_image = [], CLIP.encode_image

    def counted(self, images):
        sizes.append(len(images))
        return encode_image(self, images)

    monkeypatch.setattr(CLIP, "encode_image", counted)
    return sizes


def one_tower(model, tower):
    """The model without its other tower."""
    alone = TOWERS[tower](config_of(model))
    alone.load_state_dict({name: model.state_dict()[name] for name in alone.state_dict()})
    return alone.eval()


def paint(path, seed):
    """A picture of some colours, another for each seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (5, 6, 3), dtype=torch.uint8, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).resize((60, 50), Image.Resampling.NEAREST).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    """A folder with seven pictures, two of them deeper down."""
    names = ["a.png", "b.jpg", "c.PNG", "d.bmp", "e.webp", "below/f.png", "below/deep/g.gif"]
    for seed, name in enumerate(names):
        paint(tmp_path / "photos" / name, seed)
    return tmp_path / "photos"


def build(photos, model, **options):
    path = photos.parent / "photos.clipindex"
    return Index.build(path, [photos], model, Preprocess(SIZE), "some model", **options)


def vector(model, path):
    """The unit vector of a picture, in the plainest way."""
    with torch.no_grad():
        return F.normalize(model.encode_image(Preprocess(SIZE)(open_image(path))[None]).float(), dim=-1)[0]


def pictures(folder):
    return sorted(str(path) for path in folder.rglob("*.*") if path.is_file())


def paths(index, top=100):
    """All that can be found, copies included."""
    [matches] = index.search("anything", top=top)
    return sorted(path for match in matches for path in (match.path, *match.copies))


# What is found


def test_matches_are_those_of_the_plain_cosines(model, photos):
    index = build(photos, model)
    files = pictures(photos)
    vectors = torch.stack([vector(model, path) for path in files])
    with torch.no_grad():
        text = F.normalize(model.encode_text(clip.tokenize("a dog")).float(), dim=-1)[0]
    other = paint(photos.parent / "other.png", 99)
    queries = {"a dog": text, Path(other): vector(model, other)}
    for matches, query in zip(index.search(*queries, top=5), queries.values(), strict=True):
        cosines, order = (vectors @ query).sort(descending=True)
        assert [match.path for match in matches] == [files[place] for place in order[:5]]
        assert [match.cosine for match in matches] == pytest.approx(cosines[:5].tolist(), abs=1e-3)
        assert [match.rank for match in matches] == [1, 2, 3, 4, 5]


def test_a_picture_finds_itself_by_path_or_opened(model, photos):
    index = build(photos, model)
    for path in pictures(photos):
        for answer in index.search(Path(path), open_image(path), top=1):
            assert answer[0].path == path
            assert answer[0].cosine == pytest.approx(1, abs=1e-3)


def test_a_query_is_the_unit_vector_of_its_weighted_sum(model, photos):
    index = build(photos, model)
    files = pictures(photos)
    first, second, third = (vector(model, path) for path in files[:3])
    total = F.normalize(first + 0.5 * second - 2 * third, dim=0)
    expected = {path: (vector(model, path) @ total).item() for path in files}
    [matches] = index.search(Query([(1, Path(files[0])), (0.5, open_image(files[1])), (-2, Path(files[2]))]))
    assert {match.path: match.cosine for match in matches} == pytest.approx(expected, abs=1e-3)


def test_a_query_reads_as_a_sum():
    query = Query([(1, "a house"), (0.5, "snow"), (-1, Path("people.png")), (-0.25, Image.new("L", (1, 1)))])
    assert str(query) == "a house + 0.5 snow - people.png - 0.25 a picture"
    assert str(Query([(-1, "snow")])) == "- snow"


def test_queries_that_ask_for_nothing_are_refused(model, photos):
    index = build(photos, model)
    with pytest.raises(ValueError, match="cancel each other: snow - snow"):
        index.search(Query([(1, "snow"), (-1, "snow")]))
    with pytest.raises(ValueError, match="cancel"):
        index.search(Query([]))
    with pytest.raises(ValueError, match="finite"):
        index.search(Query([(float("nan"), "snow")]))
    with pytest.raises(ValueError, match="at least one query"):
        index.search()
    with pytest.raises(ValueError, match="at least one match"):
        index.search("snow", top=0)
    with pytest.raises(ImageError, match=r"none\.png: No such file"):
        index.search("snow", Path("none.png"))


def test_all_that_there_is_may_be_less_than_what_was_asked_for(model, photos):
    assert [match.rank for match in build(photos, model).search("a dog", top=50)[0]] == [1, 2, 3, 4, 5, 6, 7]


def test_an_index_of_nothing_finds_nothing(model, tmp_path):
    (tmp_path / "photos").mkdir()
    index = build(tmp_path / "photos", model)
    assert index.search("a dog", "a cat") == [[], []]
    assert len(index) == 0
    with pytest.raises(ValueError, match=r"photos\.clipindex: the index is empty"):
        index.recall("a dog")


def test_recall_is_the_share_of_the_nearest_that_the_backend_finds(model, photos):
    index = build(photos, model)
    assert index.recall("a dog", "a cat", top=50) == 1

    class Forgetful:
        """Finds two of the four nearest of the first query, one of those of the second."""

        def nearest(self, queries, top):
            cosines, places = retrieval.ExactSearch(index._snapshot.vectors).nearest(queries, top)
            places[0, 2:], places[1, 1:] = -1, -1
            return cosines, places

    index._backend = Forgetful()
    assert index.recall("a dog", Path(pictures(photos)[0]), top=4) == 3 / 8
    with pytest.raises(ValueError, match="at least one query"):
        index.recall()


@pytest.mark.parametrize("backend", ["faiss-flat", "faiss-ivf", "faiss-hnsw", "qdrant"])
def test_other_backends_find_the_same_and_notice_changes(model, photos, backend):
    build(photos, model)
    path = photos.parent / "photos.clipindex"
    index = Index.open(path, model, Preprocess(SIZE), backend, server=":memory:")
    exact = Index.open(path, model, Preprocess(SIZE))
    for _ in range(2):
        [found], [expected] = index.search("a dog", top=4), exact.search("a dog", top=4)
        assert [match.path for match in found] == [match.path for match in expected]
        assert [match.cosine for match in found] == pytest.approx([match.cosine for match in expected], abs=1e-3)
        os.remove(expected[0].path)
        exact.update()
    assert not list(path.glob("*-7.faiss"))  # of the state with seven pictures


# What is read and embedded


def test_only_what_is_new_or_changed_is_embedded(model, photos, embedded):
    index = build(photos, model)
    assert sum(embedded) == 7
    index.update()
    assert sum(embedded) == 7
    assert index.changes == retrieval.Changes(0, 0, 7, 0, {})

    new, changed = paint(photos / "new.png", 50), paint(photos / "a.png", 51)
    index = build(photos, model)
    assert sum(embedded) == 9
    assert index.changes == retrieval.Changes(2, 0, 6, 0, {})
    for path in (new, changed):
        assert index.search(Path(path))[0][0].cosine == pytest.approx(1, abs=1e-3)
    assert len(index) == 8


def test_what_is_unchanged_is_not_even_read(model, photos, monkeypatch):
    (photos / "bad.png").write_text("no picture")
    index = build(photos, model)
    monkeypatch.setattr(retrieval, "_look", lambda file: pytest.fail(f"{file} was read"))
    index.update()
    assert index.changes.unchanged == 8


def test_what_is_gone_is_dropped(model, photos):
    index = build(photos, model)
    (photos / "b.jpg").unlink()
    shutil.rmtree(photos / "below")
    index.update()
    assert index.changes.dropped == 3
    assert paths(index) == pictures(photos)
    assert len(index) == 4
    [file] = index._store.path.glob("*.f16")
    assert file.stat().st_size == 4 * 2 * TINY["vit"]["embed_dim"]


def test_the_index_holds_what_is_below_the_folders_given_last(model, photos):
    index = build(photos, model)
    index.update([photos / "below", photos / "below" / "deep"])
    assert paths(index) == pictures(photos / "below")
    index.update()
    assert len(index) == 2


def test_equal_contents_are_embedded_once_and_found_once(model, photos, embedded):
    for name in ("copy.png", "below/copy.png", "z.png"):
        shutil.copy(photos / "a.png", photos / name)
    index = build(photos, model, batch_size=2)
    assert sum(embedded) == 7
    assert index.changes == retrieval.Changes(7, 3, 0, 0, {})
    match, *others = index.search(Path(photos / "a.png"), top=10)[0]
    names = ["a.png", "below/copy.png", "copy.png", "z.png"]
    assert [match.path, *match.copies] == [str(photos / name) for name in names]
    assert len(others) == 6

    (photos / "a.png").unlink()
    index.update()
    assert index.search(Path(photos / "z.png"))[0][0].path == str(photos / "below/copy.png")


def test_what_was_moved_is_not_embedded_again(model, photos, embedded):
    index = build(photos, model)
    (photos / "below").rename(photos / "elsewhere")
    index.update()
    assert sum(embedded) == 7
    assert index.changes == retrieval.Changes(0, 2, 5, 2, {})
    assert paths(index) == pictures(photos)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_pictures_that_exchange_or_pass_on_their_names_are_all_still_found(model, tmp_path, batch_size):
    folder = tmp_path / "photos"
    for number in range(6):
        paint(folder / f"{number}.png", number)
    index = build(folder, model, batch_size=batch_size)
    for number in reversed(range(6)):  # 0 -> 1, 1 -> 2, ...
        (folder / f"{number}.png").rename(folder / f"{number + 1}.png")
    paint(folder / "0.png", 6)
    (folder / "5.png").rename(folder / "spare")
    (folder / "6.png").rename(folder / "5.png")
    (folder / "spare").rename(folder / "6.png")
    for _ in range(2):
        index.update(batch_size=batch_size)
        assert len(index) == 7
        assert paths(index) == pictures(folder)
        for path in pictures(folder):
            [[match]] = index.search(Path(path), top=1)
            assert match.path == path


def test_bad_files_are_listed_and_do_no_harm(model, photos):
    whole = (photos / "a.png").read_bytes()
    (photos / "torn.png").write_bytes(whole[:200])
    (photos / "torn copy.png").write_bytes(whole[:200])
    (photos / "below" / "text.jpg").write_text("no picture")
    (photos / "notes.txt").write_text("not looked at")
    for _ in range(2):  # remembered
        index = build(photos, model, batch_size=3)
        assert sorted(index.changes.errors) == [
            str(photos / n) for n in ("below/text.jpg", "torn copy.png", "torn.png")
        ]
        assert index.changes.errors[str(photos / "below/text.jpg")].startswith("empty, or not in a picture format")
        assert len(index) == 7
    (photos / "torn.png").write_bytes(whole)
    (photos / "torn copy.png").unlink()
    index.update()
    assert list(index.changes.errors) == [str(photos / "below/text.jpg")]
    assert str(photos / "torn.png") in paths(index)


def test_a_file_that_cannot_be_read_just_now_is_tried_again(model, photos, monkeypatch):
    look = retrieval._look
    refused = retrieval.Seen(None, None, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(
            retrieval,
            "_look",
            lambda file: retrieval.Seen(file, None, refused.error) if file.path.endswith("a.png") else look(file),
        )
        index = build(photos, model)
    assert index.changes.errors == {str(photos / "a.png"): "Permission denied"}
    index.update()
    assert index.changes == retrieval.Changes(1, 0, 6, 0, {})


def test_what_lies_in_a_folder_that_cannot_be_read_is_kept(model, photos, monkeypatch):
    index = build(photos, model)
    scandir = os.scandir

    def refuse(path):
        if path == str(photos / "below"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    index.update()
    assert index.changes.errors == {str(photos / "below"): "Permission denied"}
    assert index.changes.dropped == 0
    assert len(index) == 7


def test_a_folder_that_is_not_there_drops_nothing(model, photos):
    index = build(photos, model)
    photos.rename(photos.parent / "unplugged")
    with pytest.raises(NotADirectoryError, match="there is no such folder"):
        index.update()
    assert len(index) == 7


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "at least one folder"),
        (["photos", "nowhere"], NotADirectoryError, "nowhere: there is no such folder"),
        (["photos/a.png"], NotADirectoryError, r"a\.png: there is no such folder"),
    ],
)
def test_folders_are_looked_for_before_anything_is_made(model, photos, names, error, message):
    path, folders = photos.parent / "new.clipindex", [photos.parent / name for name in names]
    for call in (folders_of, lambda *about: Index.build(*about, model, Preprocess(SIZE), "some model")):
        with pytest.raises(error, match=message):
            call(path, folders)
        assert not path.exists()


def test_the_folders_of_an_index_are_those_given_or_those_of_last_time(model, photos):
    build(photos, model)
    path, below = photos.parent / "photos.clipindex", photos / "below"
    assert folders_of(path) == [str(photos)]
    assert folders_of(path, [below, below]) == [str(below)]


def test_a_vector_that_is_no_number_is_an_error_of_its_picture(model, photos, monkeypatch):
    encode_image, third = CLIP.encode_image, torch.tensor([2])
    monkeypatch.setattr(CLIP, "encode_image", lambda *of: encode_image(*of).index_fill(0, third, torch.nan))
    index = build(photos, model)
    assert index.changes.errors == {sorted(pictures(photos))[2]: "the model's answer is no number"}
    assert len(index) == 6


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_names_may_be_no_text(model, photos):
    os.rename(photos / "a.png", os.fsencode(photos) + b"/caf\xe9.png")
    index = build(photos, model)
    index.update()
    assert index.changes.unchanged == 7
    assert os.fsencode(photos) + b"/caf\xe9.png" in [os.fsencode(path) for path in paths(index)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_links_that_lead_nowhere_and_pipes_are_no_pictures(model, photos):
    (photos / "dangling.png").symlink_to(photos / "nothing.png")
    os.mkfifo(photos / "pipe.png")
    index = build(photos, model)
    assert index.changes == retrieval.Changes(7, 0, 0, 0, {})


# Whose index it is


@pytest.mark.parametrize("name", ["vit", "rn"])
def test_a_digest_is_of_the_weights_of_one_tower_not_of_the_copy(tmp_path, name):
    model = filled(TINY[name])
    digests = tower_digests(model)
    clip.save(model, tmp_path / "model.safetensors")
    for dtype in (torch.float16, torch.float32):
        for tower in (None, "image", "text"):
            loaded, _ = clip.load(tmp_path / "model.safetensors", "cpu", dtype=dtype, tower=tower)
            assert tower_digests(loaded) == {tower: digests[tower]} if tower else digests
    with torch.no_grad():
        model.logit_scale.add_(1)
        assert tower_digests(model) == digests
        model.ln_final.bias[3] += 1
    assert tower_digests(model)["image"] == digests["image"]
    assert tower_digests(model)["text"] != digests["text"]


@pytest.mark.requires_cuda
def test_the_digest_is_the_same_on_a_gpu(model):
    assert tower_digests(filled(TINY["vit"]).cuda()) == tower_digests(model)


def test_an_index_refuses_another_model(model, photos):
    build(photos, model)
    path, other = photos.parent / "photos.clipindex", filled(TINY["vit"], salt="other")
    assert model_of(path) == "some model"
    message = f"made by 'some model', whose text tower has the weights {tower_digests(model)['text'][:12]}, and these"
    with pytest.raises(ValueError, match=message):
        Index.open(path, other, Preprocess(SIZE))
    with pytest.raises(ValueError, match=message):
        Index.build(path, [photos], other, Preprocess(SIZE), "other model")
    for tower in TOWERS:
        with pytest.raises(ValueError, match=f"whose {tower} tower has the weights"):
            Index.open(path, one_tower(other, tower), Preprocess(SIZE))


def test_an_index_that_holds_nothing_takes_another_model(model, photos, monkeypatch):
    path, one, other = photos.parent / "photos.clipindex", photos.parent / "one", filled(TINY["vit"], salt="other")
    paint(one / "a.png", 50)
    with monkeypatch.context() as patch:
        encode_image = CLIP.encode_image
        patch.setattr(CLIP, "encode_image", lambda *of: encode_image(*of) * torch.nan)
        first = build(one, model)
    assert len(first) == 0
    second = Index.build(path, [one], other, Preprocess(SIZE), "other model")
    assert second.changes == retrieval.Changes(1, 0, 0, 0, {})  # what the first could not embed, this one can
    assert model_of(path) == "other model"

    message = "was made by 'other model'"
    with pytest.raises(ValueError, match=message):
        first.update([photos])  # it was opened while the index was its model's
    Index.build(path, [photos], other, Preprocess(SIZE), "other model")
    for refused in (lambda: build(photos, model), lambda: first.search("a dog"), lambda: first.recall("a dog")):
        with pytest.raises(ValueError, match=message):
            refused()
    assert check(path, by_digest(other, [photos])) == 7


def test_one_tower_will_do_for_what_it_embeds(model, photos):
    path = photos.parent / "photos.clipindex"
    whole = build(photos, model)
    text, image = (Index.open(path, one_tower(model, tower), Preprocess(SIZE)) for tower in ("text", "image"))
    picture = Path(pictures(photos)[0])
    assert text.search("a dog") == whole.search("a dog")
    assert image.search(picture) == whole.search(picture)
    with pytest.raises(RuntimeError, match="cannot embed texts"):
        image.search("a dog")
    with pytest.raises(RuntimeError, match="cannot embed pictures"):
        text.search(picture)

    paint(photos / "new.png", 50)
    with pytest.raises(RuntimeError, match="cannot embed pictures"):
        text.update()
    image.update()
    assert image.changes.embedded == 1


@pytest.mark.parametrize("tower", TOWERS)
def test_one_tower_makes_no_index(model, photos, tower):
    with pytest.raises(ValueError, match="expected a CLIP with both towers"):
        build(photos, one_tower(model, tower))
    assert not (photos.parent / "photos.clipindex").exists()


def test_an_index_optimises_by_itself_what_embeds_many(model, photos, monkeypatch):
    kinds, encode_image = [], CLIP.encode_image
    monkeypatch.setattr(
        CLIP, "encode_image", lambda self, images: (kinds.append(type(self)), encode_image(self, images))[1]
    )
    index = build(photos, model)
    index.search(Path(pictures(photos)[0]))
    assert kinds == [OptimizedCLIP, CLIP]
    monkeypatch.setattr(retrieval, "optimized_copy", None)
    index.update()  # nothing is new
    for call in (build, lambda photos, model: Index.open(photos.parent / "photos.clipindex", model, Preprocess(SIZE))):
        with pytest.raises(ValueError, match="expected the model as it was loaded, got an optimised copy"):
            call(photos, clip.optimize(model))


def test_what_is_no_index_is_left_alone(model, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = pictures(tmp_path)
    for path in (photos, tmp_path / "file"):
        with pytest.raises(ValueError, match="there is something else"):
            Index.build(path, [photos], model, Preprocess(SIZE), "some model")
    with pytest.raises(ValueError, match="there is no index"):
        Index.open(tmp_path / "none", model, Preprocess(SIZE))
    assert model_of(tmp_path / "none") is None
    assert pictures(tmp_path) == before


def test_an_unknown_backend_and_a_damaged_index_say_so(model, photos):
    index = build(photos, model)
    path = photos.parent / "photos.clipindex"
    with pytest.raises(ValueError, match=r"faiss-hnsw.*got 'hnsw'"):
        Index.open(path, model, Preprocess(SIZE), "hnsw")
    (path / "vectors-0.f16").write_bytes(b"")
    with pytest.raises(OSError, match="the index is damaged"):
        index.search("a dog")
    (path / "index.sqlite").write_text("this is no database, but long enough to be taken for one" * 99)
    with pytest.raises(OSError, match=r"index\.sqlite: file is not a database"):
        Index.open(path, model, Preprocess(SIZE))


# Several processes, and killed ones


def check(path, expected):
    """The database is sound, and each content's vector is the one of `expected`, a dict by digest."""
    file = sqlite3.connect(path / "index.sqlite")
    assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    without = "SELECT COUNT(*) FROM files WHERE digest IS NOT NULL AND digest NOT IN (SELECT digest FROM contents)"
    assert file.execute(without).fetchone() == (0,)
    contents = file.execute("SELECT digest FROM contents ORDER BY row").fetchall()
    file.close()
    snapshot = retrieval.VectorStore(path).snapshot()
    vectors = snapshot.vectors if snapshot else []
    for (digest,), stored in zip(contents, vectors, strict=True):
        torch.testing.assert_close(stored.float(), expected[digest], atol=1e-3, rtol=0)
    return len(contents)


def by_digest(model, folders):
    return {
        retrieval._look(retrieval.File(path, 0, 0)).digest: vector(model, path)
        for folder in folders
        for path in pictures(folder)
    }


def test_a_search_sees_what_another_process_has_done(model, photos):
    index = build(photos, model)
    assert len(paths(index)) == 7
    (photos / "a.png").unlink()
    paint(photos / "new.png", 50)
    build(photos, model)
    assert paths(index) == pictures(photos)


def test_two_that_build_the_same_index_do_not_disturb_each_other(photos):
    for seed in range(100, 120):
        paint(photos / f"{seed}.png", seed)
    models = [filled(TINY["vit"]) for _ in range(2)]
    build(photos, models[0]).update([photos / "below"])
    threads = [threading.Thread(target=build, args=(photos, model), kwargs={"batch_size": 4}) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert check(photos.parent / "photos.clipindex", by_digest(models[0], [photos])) == 27
    assert paths(build(photos, models[0])) == pictures(photos)


KILLED = """
import os, shutil, signal, sys
import torch
from conftest import TINY, filled
from clip.model import CLIP
from clip.preprocess import Preprocess
from clip.tasks import vector_store
from clip.tasks.retrieval import Index

torch.set_num_threads(1)  # a fork has no other threads
folder, moments = sys.argv[1], int(sys.argv[2])
model = filled(TINY["vit"])
encode_image = CLIP.encode_image


def run(place, last):
    '''Build, change the pictures, update; killed before the line `last` of vector_store.'''
    lines, log = 0, open(f"{place}/log", "a")

    def logged(self, images):
        features = encode_image(self, images)
        log.write(f"{len(images)}\\n")
        log.flush()
        return features

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != vector_store.__file__:
            return None
        if event == "line":
            if lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
            lines += 1
        return trace

    CLIP.encode_image = logged
    sys.settrace(trace)
    out = (f"{place}/photos.clipindex", [f"{place}/photos"], model, Preprocess(48), "some model")
    Index.build(*out, batch_size=2)
    os.rename(f"{place}/photos", f"{place}/before")
    os.rename(f"{place}/after", f"{place}/photos")
    Index.build(*out, batch_size=2)
    sys.settrace(None)
    with open(f"{folder}/lines", "w") as file:
        file.write(str(lines))


def child(*arguments):
    process = os.fork()
    if not process:
        run(*arguments)
        os._exit(0)
    return os.waitpid(process, 0)[1]


assert child(f"{folder}/whole", -1) == 0
with open(f"{folder}/lines") as file:
    total = int(file.read())
for moment in range(moments):
    status = child(f"{folder}/{moment}", (moment * total + total // 2) // moments)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""
MOMENTS = 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_killed_at_any_moment_it_goes_on_and_loses_one_batch(model, embedded, photos, tmp_path):
    places = [tmp_path / name for name in ("whole", *map(str, range(MOMENTS)))]
    for place in places:
        shutil.copytree(photos, place / "photos")
        shutil.copytree(photos, place / "after")
        for name in ("a.png", "below/f.png"):
            (place / "after" / name).unlink()
        (place / "after" / "c.PNG").rename(place / "after" / "moved.png")
        for seed, name in enumerate(("d.bmp", "new.png", "below/new.png"), 50):  # one changed, two new
            paint(place / "after" / name, seed)
    command = [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path), str(MOMENTS)]
    code = f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parent / 'golden'}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([code, os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, env=environment, check=True, timeout=120)

    expected = by_digest(model, [photos, tmp_path / "whole" / "photos"])
    stages = set()
    for place in places:
        path, is_second = place / "photos.clipindex", (place / "before").exists()
        if retrieval.VectorStore(path).exists():
            stages.add((is_second, check(path, expected)))
        before = sum(map(int, (place / "log").read_text().split()))
        embedded.clear()
        index = Index.build(path, [place / "photos"], model, Preprocess(SIZE), "some model", batch_size=2)
        assert before + sum(embedded) <= (10 if is_second else 7) + 2
        assert check(path, expected) == 7
        assert paths(index) == pictures(place / "photos")
        assert len(list(path.iterdir())) == 2  # nothing is left lying about
    assert len(stages) > 3
