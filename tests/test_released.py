"""The download of the released files, against a server of the test's own that cuts, corrupts, stalls and refuses."""

import errno
import hashlib
import logging
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from clip.checkpoints import released
from clip.checkpoints.released import DownloadError, download

FILE = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(FILE).hexdigest()
PATH = f"/models/{DIGEST}/RN50.pt"


def flipped(data: bytes, at: int = 7) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@dataclass
class Answer:
    """How the server answers one request."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = FILE
    ranges: bool = True
    stop: int | None = None  # bytes of the body, after which the connection ends ...
    hold: threading.Event | None = None  # ... or waits


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        answer = self.server.answers.pop(0) if self.server.answers else Answer()
        status, headers, body = answer.status, answer.headers, answer.body
        if status == 200 and wanted and answer.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start < len(body):
                status, headers = 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}", **headers}
                body = body[start:]
            else:
                status, headers, body = 416, {"Content-Range": f"bytes */{len(body)}"}, b""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: answer.stop])
        if answer.hold:
            self.wfile.flush()
            self.server.holding.set()
            answer.hold.wait(10)
            self.wfile.write(body[answer.stop :])

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Serves FILE under every path, and keeps a list of what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, str | None]] = []
        self.release, self.holding = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}{PATH}"

    @property
    def ranges(self) -> list[str | None]:
        return [wanted for _, wanted in self.requests]

    def handle_error(self, request, client_address):
        pass  # the client went away


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def pauses(monkeypatch, tmp_path):
    """A clean environment, a cache of the test's own, and the list of pauses that were not really made."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "CLIP_BASE_URL"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    pauses = []
    monkeypatch.setattr(released, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "RN50.pt"


@pytest.fixture
def part(tmp_path) -> Path:
    return tmp_path / "RN50.pt.part"


def test_models_are_the_nine_released_files_in_the_original_order():
    expected = [
        ("RN50", "afeb0e10", "b6762", "RN50.pt"),
        ("RN101", "8fa8567b", "ab599", "RN101.pt"),
        ("RN50x4", "7e526bd1", "05fdd", "RN50x4.pt"),
        ("RN50x16", "52378b40", "ec9aa", "RN50x16.pt"),
        ("RN50x64", "be1cfb55", "19d9c", "RN50x64.pt"),
        ("ViT-B/32", "40d36571", "950af", "ViT-B-32.pt"),
        ("ViT-B/16", "5806e77c", "f416f", "ViT-B-16.pt"),
        ("ViT-L/14", "b8cca3fd", "03836", "ViT-L-14.pt"),
        ("ViT-L/14@336px", "3035c92b", "41f02", "ViT-L-14-336px.pt"),
    ]
    actual = []
    for name, url in released.MODELS.items():
        base, digest, file = url.rsplit("/", 2)
        assert base == "https://openaipublic.azureedge.net/clip/models"
        assert re.fullmatch("[0-9a-f]{64}", digest)
        actual.append((name, digest[:8], digest[-5:], file))
    assert actual == expected


# What is in the cache


def test_a_download_leaves_the_exact_file_and_nothing_half_done(server, target, part):
    assert download(server.url) == str(target)
    assert target.read_bytes() == FILE
    assert not part.exists()
    assert server.requests == [(PATH, None)]


def test_a_sound_file_needs_no_network(target):
    target.write_bytes(FILE)
    assert download(f"http://nowhere.invalid{PATH}") == str(target)
    assert download(f"http://nowhere.invalid{PATH}", local_files_only=True) == str(target)


def test_a_file_is_hashed_once_and_again_when_it_changes(server, target, monkeypatch):
    hashed = []
    sha256 = released.sha256_of
    monkeypatch.setattr(released, "sha256_of", lambda path: hashed.append(path) or sha256(path))
    target.write_bytes(FILE)
    for _ in range(3):
        download(server.url)
    assert hashed == [target]

    times = target.stat()
    time.sleep(0.05)  # file times advance with the kernel's clock tick, 1 to 10 ms
    target.write_bytes(flipped(FILE))
    if os.name != "nt":
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, and back-dated
    with pytest.warns(UserWarning, match="another sha256"):
        download(server.url)
    assert target.read_bytes() == FILE


def test_a_cache_that_takes_no_notes_still_works(server, target):
    target.write_bytes(FILE)
    (target.parent / "RN50.pt.verified").mkdir()
    assert download(server.url) == str(target)
    target.write_bytes(flipped(FILE))
    with pytest.warns(UserWarning, match="another sha256"):
        download(server.url)


def test_a_wrong_file_is_replaced_with_a_warning(server, target):
    target.write_bytes(b"not the file")
    with pytest.warns(UserWarning, match=r"RN50\.pt has another sha256 than .* downloading it again"):
        download(server.url)
    assert target.read_bytes() == FILE


def test_a_wrong_file_stays_when_no_better_one_can_be_had(server, target):
    target.write_bytes(b"not the file")
    server.answers = [Answer(404)]
    with pytest.warns(UserWarning, match="another sha256"), pytest.raises(DownloadError, match="answered 404"):
        download(server.url)
    assert target.read_bytes() == b"not the file"


def test_a_folder_in_the_place_of_the_file_is_an_error(server, target):
    target.mkdir()
    with pytest.raises(RuntimeError, match=r"RN50\.pt exists and is not a regular file"):
        download(server.url)
    assert not server.requests


@pytest.mark.parametrize(
    "path", ["/RN50.pt", "/models/RN50.pt", f"/{DIGEST}", f"/{DIGEST[1:]}/RN50.pt", f"/{DIGEST}/", f"/{DIGEST}/..", ""]
)
def test_a_url_without_digest_is_refused_before_anything_is_asked(server, path):
    with pytest.raises(DownloadError, match="<sha256>/<name>"):
        download(server.url.removesuffix(PATH) + path)
    assert not server.requests


def test_a_query_is_no_part_of_the_file_name(server, target):
    assert download(f"{server.url}?signature=a/b") == str(target)


def test_root_wins_over_the_environment_and_that_over_home(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("CLIP_CACHE", "~/environment")
    assert download(server.url, str(tmp_path / "argument")) == str(tmp_path / "argument" / "RN50.pt")
    assert download(server.url, root=tmp_path / "argument") == str(tmp_path / "argument" / "RN50.pt")
    assert download(server.url) == str(tmp_path / "home" / "environment" / "RN50.pt")
    monkeypatch.delenv("CLIP_CACHE")
    assert download(server.url) == str(tmp_path / "home" / ".cache" / "clip" / "RN50.pt")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_mirror_stands_in_for_the_released_urls(server, target, monkeypatch, slash):
    monkeypatch.setattr(released, "BASE_URL", "http://nowhere.invalid/models")
    monkeypatch.setenv("CLIP_BASE_URL", f"http://127.0.0.1:{server.server_port}/mirror{slash}")
    download(f"http://nowhere.invalid/models/{DIGEST}/RN50.pt")
    assert server.requests == [(f"/mirror/{DIGEST}/RN50.pt", None)]


def test_a_mirror_does_not_stand_in_for_other_urls(server, monkeypatch):
    monkeypatch.setenv("CLIP_BASE_URL", "http://nowhere.invalid")
    download(server.url)
    assert server.requests == [(PATH, None)]


# Broken transfers


def test_a_cut_body_is_continued_where_it_ended(server, target, part):
    server.answers = [Answer(stop=100_000), Answer(stop=50_000)]
    download(server.url)
    assert target.read_bytes() == FILE
    first, second, third = server.ranges
    starts = [int(wanted[len("bytes=") : -1]) for wanted in (second, third)]
    assert first is None
    assert 0 < starts[0] <= 100_000  # whole reads only
    assert starts[0] < starts[1] <= starts[0] + 50_000


def test_a_server_that_ignores_the_range_is_read_from_the_start(server, target, part):
    part.write_bytes(FILE[:1000])
    server.answers = [Answer(ranges=False)]
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges == ["bytes=1000-"]


@pytest.mark.parametrize("content_range", ["bytes 999-299999/300000", "bytes 1001-299999/300000", "nonsense"])
def test_an_answer_for_another_range_is_not_appended(server, target, part, content_range):
    part.write_bytes(FILE[:1000])
    server.answers = [Answer(headers={"Content-Range": content_range})]
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges == ["bytes=1000-", None]


def test_a_range_answered_from_byte_0_replaces_the_part(server, target, part):
    part.write_bytes(flipped(FILE[:1000]))
    server.answers = [Answer(206, {"Content-Range": "bytes 0-299999/300000"})]
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges == ["bytes=1000-"]


@pytest.mark.parametrize("extra", [b"", b"x"])
def test_a_part_with_nothing_left_to_ask_for_is_dropped(server, target, part, extra):
    part.write_bytes(flipped(FILE) + extra)
    download(server.url)  # 416, then the whole file
    assert target.read_bytes() == FILE
    assert server.ranges == [f"bytes={300_000 + len(extra)}-", None]


def test_a_whole_part_needs_only_its_name(server, target, part):
    part.write_bytes(FILE)
    download(server.url)
    assert target.read_bytes() == FILE
    assert not server.requests


def test_a_corrupted_part_is_dropped_once(server, target, part):
    part.write_bytes(flipped(FILE[:1000]))
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges == ["bytes=1000-", None]


def test_a_file_that_is_wrong_twice_is_an_error_and_leaves_nothing(server, target, part):
    server.answers = [Answer(body=b"<html>Please log in</html>")] * 3
    with pytest.raises(RuntimeError, match=rf"(?s)26 bytes with sha256 .*, expected {DIGEST}, twice.*login page"):
        download(server.url)
    assert len(server.requests) == 2
    assert not target.exists()
    assert not part.exists()


def test_a_body_of_unknown_length_is_held_against_the_digest(server, target):
    server.answers = [Answer(stop=100_000, headers={"Content-Length": "?"}), Answer(headers={"Content-Length": "?"})]
    download(server.url)
    assert target.read_bytes() == FILE


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_refusal_is_tried_again(server, target, status):
    server.answers = [Answer(status), Answer(status)]
    download(server.url)
    assert target.read_bytes() == FILE
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_lasting_refusal_is_not_tried_again(server, status, pauses):
    server.answers = [Answer(status)]
    with pytest.raises(DownloadError, match=f"answered {status}"):
        download(server.url)
    assert len(server.requests) == 1
    assert not pauses


@pytest.mark.parametrize(("asked", "made"), [("7", 7), ("86400", released.LONGEST_PAUSE)])
def test_the_pause_a_server_asks_for_is_made_within_reason(server, pauses, asked, made):
    server.answers = [Answer(429, {"Retry-After": asked})]
    download(server.url)
    assert pauses == [made]


def test_pauses_double_with_jitter_until_it_gives_up(server, pauses):
    server.answers = [Answer(500)] * 9
    with pytest.raises(DownloadError, match=r"answered 500 .*5 attempts"):
        download(server.url)
    assert len(server.requests) == released.ATTEMPTS == 5
    ratios = [pause / (released.FIRST_PAUSE * 2**k) for k, pause in enumerate(pauses)]
    assert len(ratios) == 4
    assert all(0.5 <= ratio <= 1.5 for ratio in ratios)
    assert len(set(ratios)) == 4


def test_retrying_leaves_the_users_random_numbers_alone(server):
    server.answers = [Answer(500)]
    before = random.getstate()
    download(server.url)
    assert random.getstate() == before


def test_attempts_that_bring_new_bytes_are_not_counted(server, target):
    server.answers = [Answer(stop=70_000)] * 4 + [Answer(500)] * 3
    download(server.url)
    assert target.read_bytes() == FILE
    assert len(server.requests) == 8 > released.ATTEMPTS


def test_attempts_that_bring_the_same_bytes_are_counted(server):
    server.answers = [Answer(ranges=False, stop=100_000)] * 9
    with pytest.raises(DownloadError, match=r"ended after \d+ of 300000 bytes"):
        download(server.url)
    assert len(server.requests) == released.ATTEMPTS


def test_starting_over_grants_all_attempts_again(server, target, part):
    part.write_bytes(flipped(FILE[:200_000]))
    server.answers = [Answer(500)] * 4 + [Answer()] + [Answer(500)] * 4
    download(server.url)
    assert target.read_bytes() == FILE


def test_a_stalled_server_is_noticed(server, target, monkeypatch):
    monkeypatch.setattr(released, "TIMEOUT", 0.2)
    server.answers = [Answer(stop=100_000, hold=server.release)]
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges == [None, f"bytes={released.CHUNK}-"]


def test_any_mix_of_faults_ends_in_the_exact_file_or_in_our_error(server, target, part):
    """Seeded at random: cuts, refusals, ignored ranges, wrong bytes and leftovers, 60 times."""
    rng = random.Random(1)
    faults = [
        lambda: Answer(stop=rng.randrange(300_000)),
        lambda: Answer(ranges=False, stop=rng.randrange(300_000)),
        lambda: Answer(rng.choice([404, 416, 429, 500])),
        lambda: Answer(body=flipped(FILE, rng.randrange(300_000))),
        lambda: Answer(body=FILE[: rng.randrange(1, 300_000)]),
        lambda: Answer(206, {"Content-Range": f"bytes {rng.randrange(300_000)}-299999/300000"}),
    ]
    outcomes = set()
    for _ in range(60):
        target.unlink(missing_ok=True)
        if rng.random() < 0.5:
            part.write_bytes(rng.choice([FILE, flipped(FILE), FILE + FILE])[: rng.randrange(500_000)])
        server.answers = [rng.choice(faults)() for _ in range(rng.randrange(6))]
        try:
            assert Path(download(server.url)).read_bytes() == FILE
            assert not part.exists()
            outcomes.add("file")
        except DownloadError as error:
            outcomes.add("disk" if "cannot read or write" in str(error) else "network")
            assert not target.exists()
    assert outcomes == {"file", "network"}


# What an error says


def assert_says_how_to_do_it_by_hand(error: Exception, url: str, target: Path):
    for fact in (url, DIGEST, str(target)):
        assert fact in str(error)


def test_offline_the_error_says_how_to_do_it_by_hand(target):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}{PATH}"
    with pytest.raises(DownloadError, match="refused") as error:
        download(url)
    assert_says_how_to_do_it_by_hand(error.value, url, target)


def test_with_local_files_only_nothing_is_asked_and_the_error_says_how_to_do_it_by_hand(server, target):
    with pytest.raises(DownloadError, match="not there: local files only") as error:
        download(server.url, local_files_only=True)
    assert_says_how_to_do_it_by_hand(error.value, server.url, target)
    target.write_bytes(b"not the file")
    with pytest.raises(DownloadError, match="another file: local files only"):
        download(server.url, local_files_only=True)
    assert not server.requests


def test_a_path_given_relative_is_named_in_full(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError) as error:
        download(server.url, "here", local_files_only=True)
    assert_says_how_to_do_it_by_hand(error.value, server.url, tmp_path / "here" / "RN50.pt")


def test_a_mirror_without_scheme_is_an_error_of_ours(monkeypatch):
    monkeypatch.setenv("CLIP_BASE_URL", "mirror.invalid/clip")
    with pytest.raises(DownloadError, match="unknown url type"):
        download(released.MODELS["RN50"])


def test_a_full_disk_is_named_and_the_next_call_goes_on(server, target, part, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DownloadError, match=rf"{re.escape(str(target))}: .*{os.strerror(errno.ENOSPC)}") as error:
            download(server.url)
    assert_says_how_to_do_it_by_hand(error.value, server.url, target)
    assert not target.exists()
    download(server.url)
    assert target.read_bytes() == FILE


def test_a_cache_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="cannot read or write"):
        download(server.url, tmp_path / "file" / "cache")


# The network's settings


def test_the_proxy_of_the_environment_is_asked(server, target, monkeypatch):
    """The server plays the proxy: a proxy is asked for the whole URL."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    download(f"http://nowhere.invalid{PATH}")
    assert target.read_bytes() == FILE
    assert server.requests == [(f"http://nowhere.invalid{PATH}", None)]


@pytest.fixture
def secure_server(server, tmp_path):
    """The server behind TLS, with a certificate that nobody trusts by default."""
    (tmp_path / "key.pem").write_text(KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_in(tmp_path / "cert.pem"), tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = server.url.replace("http:", "https:")
    return server


def certificate_in(path: Path) -> Path:
    path.write_text(CERTIFICATE)
    return path


def test_an_unknown_certificate_is_refused_at_once_with_the_remedy(secure_server, pauses):
    with pytest.raises(DownloadError, match=r"certificate verify failed.*SSL_CERT_FILE"):
        download(secure_server.url)
    assert not pauses


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_certificate_file_of_the_environment_is_trusted(secure_server, target, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(certificate_in(tmp_path / "ca.pem")))
    download(secure_server.url)
    assert target.read_bytes() == FILE


@pytest.mark.parametrize("variable", ["SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_certificate_folder_of_the_environment_is_trusted(secure_server, target, tmp_path, monkeypatch, variable):
    (tmp_path / "ca").mkdir()
    certificate_in(tmp_path / "ca" / f"{CERTIFICATE_HASH}.0")
    monkeypatch.setenv(variable, str(tmp_path / "ca"))
    download(secure_server.url)
    assert target.read_bytes() == FILE


def test_a_certificate_file_that_cannot_be_read_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    with pytest.raises(DownloadError, match=r"REQUESTS_CA_BUNDLE=.*missing\.pem"):
        download(server.url)


def test_the_bar_counts_bytes_from_where_the_part_ended(server, part, monkeypatch):
    bars = []

    class Bar(released.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(released, "tqdm", Bar)
    part.write_bytes(FILE[:1000])
    download(server.url)
    (bar,) = bars
    assert (bar.initial, bar.n, bar.total) == (1000, len(FILE), len(FILE))
    assert (bar.desc, bar.unit, bar.unit_scale) == ("RN50.pt", "B", True)


# Several processes. Each loads the module alone, by its path, which shows what it needs: tqdm, and nothing of ours.

CHILD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("released", sys.argv[1])
released = importlib.util.module_from_spec(spec)
spec.loader.exec_module(released)
if limit := int(sys.argv[3]):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print(released.download(sys.argv[2]))
assert not {"clip", "torch", "numpy", "requests"} & set(sys.modules)
"""


@pytest.fixture
def start():
    """Starts `download(url)` in a process of its own, optionally one that may write no file longer than `limit`."""
    children = []

    def start(url: str, limit: int = 0) -> subprocess.Popen:
        command = [sys.executable, "-c", CHILD, released.__file__, url, str(limit)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_of_two_processes_one_downloads_and_the_other_waits_for_it(server, target, start):
    server.answers = [Answer(stop=100_000, hold=server.release)]
    first = start(server.url)
    assert server.holding.wait(10)
    second = start(server.url)
    assert "waiting for another process that is downloading" in second.stderr.readline()
    server.release.set()
    for child in (first, second):
        assert child.communicate(timeout=10)[0].strip() == str(target)
        assert child.returncode == 0
    assert server.requests == [(PATH, None)]
    assert target.read_bytes() == FILE


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_after_a_kill_the_next_process_goes_on_where_it_ended(server, target, part, start):
    server.answers = [Answer(stop=200_000, hold=server.release)]
    child = start(server.url)
    assert server.holding.wait(10)
    wait_until(lambda: part.exists() and part.stat().st_size == 3 * released.CHUNK)
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges == [None, f"bytes={3 * released.CHUNK}-"]


@pytest.mark.skipif(os.name == "nt", reason="no RLIMIT_FSIZE")
def test_a_write_that_fails_halfway_leaves_a_part_to_go_on_from(server, target, part, start):
    child = start(server.url, limit=100_000)
    _, errors = child.communicate(timeout=10)
    assert child.returncode == 1
    assert f"DownloadError: cannot read or write {target}: [Errno {errno.EFBIG}]" in errors
    assert not target.exists()
    assert FILE.startswith(part.read_bytes())
    download(server.url)
    assert target.read_bytes() == FILE
    assert server.ranges[1] is not None


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_without_file_locks_it_goes_on_and_says_so(server, target, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(released.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        download(server.url)
    assert "cannot be locked" in caplog.text
    assert target.read_bytes() == FILE


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A certificate for 127.0.0.1 that signs itself, made for these tests alone; valid from 2020 to 2120. The hash is how
# OpenSSL looks it up in a folder (openssl x509 -hash).

CERTIFICATE_HASH = "507e3fc3"

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBjzCCATWgAwIBAgIBATAKBggqhkjOPQQDAjAbMRkwFwYDVQQDDBBjbGlwIHRl
c3Qgc2VydmVyMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAbMRkw
FwYDVQQDDBBjbGlwIHRlc3Qgc2VydmVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD
QgAERmcYHxgWO2Rcfm17Z9dDct2sZq72BCyAxgHlT1bMNVFKIuU9VfVjXaw1Rh4s
MFBT9A76thVv8SQeJkFIDth5TKNoMGYwHQYDVR0OBBYEFLDpuQ+3V0PmH8YdbW3J
Xuv52tTDMA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8B
Af8EBAMCAoQwEwYDVR0lBAwwCgYIKwYBBQUHAwEwCgYIKoZIzj0EAwIDSAAwRQIh
ANPN1ZSLdzjiazeP0Pmy7Ln0RJmNoe+xJ5qPxbyy8KgbAiAnE9N2/aq9zBqOpph5
9aSv3sb9vZJaKPqBUWhlqVaZCQ==
-----END CERTIFICATE-----
"""

KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgYtaSDSIlgYZzjwd0
WVMMw9GPounP4TGREW76SognwsehRANCAARGZxgfGBY7ZFx+bXtn10Ny3axmrvYE
LIDGAeVPVsw1UUoi5T1V9WNdrDVGHiwwUFP0Dvq2FW/xJB4mQUgO2HlM
-----END PRIVATE KEY-----
"""
