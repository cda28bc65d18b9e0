"""Ways to find the nearest vectors, held against all cosines in float64."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clip.tasks import search_backends
from clip.tasks.search_backends import ExactSearch, FaissSearch, QdrantSearch, overlap

WIDTH = 24


def unit(*size, seed=0):
    return F.normalize(torch.randn(*size, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def groups(count, seed=0):
    """Vectors that lie in twenty groups, as embeddings do."""
    generator = torch.Generator().manual_seed(seed)
    centers = unit(20, seed=99)[torch.randint(20, (count,), generator=generator)]
    return F.normalize(centers + 0.7 * unit(count, seed=seed), dim=-1)


def true_nearest(queries, vectors, top):
    return (queries.double() @ vectors.double().T).topk(top)


@pytest.fixture
def vectors():
    return groups(1000).half()


@pytest.fixture
def queries():
    return groups(50, seed=1)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 50])
@pytest.mark.parametrize("top", [1, 7, 9])
def test_exact_search_finds_the_nearest_however_the_vectors_fall_into_chunks(monkeypatch, count, top):
    monkeypatch.setattr(search_backends, "CHUNK", 7)
    monkeypatch.setattr(search_backends, "QUERIES", 2)
    vectors, queries = unit(count).half(), unit(5, seed=1)
    cosines, places = ExactSearch(vectors).nearest(queries, top)
    expected = true_nearest(queries, vectors, min(top, count))
    assert torch.equal(places, expected.indices)
    torch.testing.assert_close(cosines, expected.values.float(), atol=1e-6, rtol=0)


def test_exact_search_looks_at_one_chunk_at_a_time(monkeypatch, vectors, queries):
    class Watched:
        """Vectors that cannot be had whole."""

        shape, device, taken = vectors.shape, vectors.device, []

        def __len__(self):
            return len(vectors)

        def __getitem__(self, part):
            self.taken.append(len(vectors[part]))
            return vectors[part]

    monkeypatch.setattr(search_backends, "CHUNK", 64)
    _, places = ExactSearch(Watched()).nearest(queries, 5)
    assert torch.equal(places, true_nearest(queries, vectors, 5).indices)
    assert max(Watched.taken) == 64
    assert sum(Watched.taken) == 1000


def test_faiss_flat_answers_as_exact_search(vectors, queries):
    cosines, places = FaissSearch(vectors, "flat").nearest(queries, 9)
    expected, expected_places = ExactSearch(vectors).nearest(queries, 9)
    assert torch.equal(places, expected_places)
    torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_faiss_finds_most_of_the_nearest_and_their_cosines(vectors, queries, kind):
    cosines, places = FaissSearch(vectors, kind).nearest(queries, 9)
    assert overlap(places, ExactSearch(vectors).nearest(queries, 9)[1]) > 0.7
    of_places = torch.einsum("qe,qke->qk", queries, vectors.float()[places])
    torch.testing.assert_close(cosines, of_places, atol=1e-6, rtol=0)
    assert (cosines.diff(dim=1) <= 0).all()


def test_a_search_that_finds_fewer_says_so(vectors, queries):
    search = FaissSearch(vectors, "ivf")
    search._index.nprobe = 1  # of 25 cells
    _, places = search.nearest(queries, 1000)
    assert places.shape == (50, 1000)
    assert (places[:, 0] >= 0).all()
    assert (places[:, -1] == -1).all()


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_faiss_builds_once_and_then_reads_its_file(tmp_path, monkeypatch, vectors, queries, kind):
    first = FaissSearch(vectors, kind, tmp_path / "kept.faiss").nearest(queries, 9)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.faiss"]
    monkeypatch.setattr(search_backends, "_faiss_index", None)
    second = FaissSearch(vectors, kind, tmp_path / "kept.faiss").nearest(queries, 9)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_faiss_takes_a_few_vectors_too_without_a_word(kind, capfd):
    vectors = unit(3).half()
    _, places = FaissSearch(vectors, kind).nearest(vectors.float(), 9)
    assert places[:, 0].tolist() == [0, 1, 2]
    assert places.shape == (3, 3)
    FaissSearch(unit(79), kind)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("failing", ["folder", "disk", "name"])
def test_faiss_searches_all_the_same_where_its_file_cannot_be_kept(tmp_path, monkeypatch, vectors, queries, failing):
    import faiss

    def full(index, file):
        Path(file).write_bytes(b"the beginning")
        raise RuntimeError("No space left on device")

    def refused(*paths):
        raise PermissionError("Permission denied")

    if failing == "disk":
        monkeypatch.setattr(faiss, "write_index", full)
    elif failing == "name":
        monkeypatch.setattr(Path, "replace", refused)
    folder = tmp_path / "none" if failing == "folder" else tmp_path
    _, places = FaissSearch(vectors, "flat", folder / "kept.faiss").nearest(queries, 9)
    assert torch.equal(places, ExactSearch(vectors).nearest(queries, 9)[1])
    assert not list(tmp_path.iterdir())


def test_qdrant_answers_as_exact_search(vectors, queries):
    cosines, places = QdrantSearch(vectors, ":memory:", "photos-1").nearest(queries, 9)
    expected, expected_places = ExactSearch(vectors).nearest(queries, 9)
    assert torch.equal(places, expected_places)
    torch.testing.assert_close(cosines, expected, atol=1e-4, rtol=0)


@pytest.fixture
def sent(monkeypatch):
    """The numbers of vectors that Qdrant is sent, at most twenty at once."""
    from qdrant_client import QdrantClient

    monkeypatch.setattr(search_backends, "QDRANT_BATCH", 20)

    sizes, upsert = [], QdrantClient.upsert

    def counted(self, name, points, wait):
        sizes.append(len(points.ids))
        return upsert(self, name, points, wait=wait)

    monkeypatch.setattr(QdrantClient, "upsert", counted)
    return sizes


def at(folder, vectors, name):
    """The place in which the last vector is found, and all collections, by a Qdrant of its own."""
    search = QdrantSearch(vectors, str(folder), name)
    place = search.nearest(vectors[-1:].float(), 1)[1].item()
    names = sorted(collection.name for collection in search._client.get_collections().collections)
    search._client.close()
    return place, names


def test_qdrant_gets_the_vectors_once_and_each_index_has_one_collection(tmp_path, sent, vectors):
    assert at(tmp_path, vectors[:50], "photos-1") == (49, ["photos-1"])
    assert sent == [20, 20, 10]
    assert at(tmp_path, vectors[:50], "photos-1") == (49, ["photos-1"])
    assert len(sent) == 3
    assert at(tmp_path, vectors[:10], "drawings-1") == (9, ["drawings-1", "photos-1"])
    assert at(tmp_path, vectors[:20], "photos-2") == (19, ["drawings-1", "photos-2"])


@pytest.mark.usefixtures("sent")
def test_what_a_stopped_process_did_not_send_is_sent_later(tmp_path, monkeypatch, vectors):
    from qdrant_client import QdrantClient

    upsert = QdrantClient.upsert

    def stopped(self, name, points, wait):
        if points.ids[0] > 0:
            raise ConnectionError("gone")
        upsert(self, name, points, wait=wait)

    with monkeypatch.context() as patch:
        patch.setattr(QdrantClient, "upsert", stopped)
        with pytest.raises(OSError, match=f"Qdrant at {tmp_path}: gone"):
            QdrantSearch(vectors[:50], str(tmp_path), "photos-1")
    assert at(tmp_path, vectors[:50], "photos-1") == (49, ["photos-1"])


def test_a_server_that_does_not_answer_is_named():
    with pytest.raises(OSError, match=r"Qdrant at http://127\.0\.0\.1:9: "):
        QdrantSearch(unit(3), "http://127.0.0.1:9", "photos-1")


@pytest.mark.parametrize(
    ("module", "search"),
    [
        ("faiss", lambda: FaissSearch(unit(3), "flat")),
        ("qdrant_client", lambda: QdrantSearch(unit(3), ":memory:", "photos-1")),
    ],
)
def test_without_its_package_a_backend_names_the_extra(monkeypatch, module, search):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install clip-from-scratch\[search\]"):
        search()


def test_a_kind_that_faiss_is_not_asked_for_is_refused():
    with pytest.raises(ValueError, match="'ivfpq'"):
        FaissSearch(unit(3), "ivfpq")


def test_overlap_by_hand():
    exact = torch.tensor([[4, 2, 7], [1, 3, 5]])
    assert overlap(exact.flip(1), exact) == 1
    assert overlap(torch.tensor([[2, 0, 9], [5, 3, -1]]), exact) == pytest.approx(3 / 6)
