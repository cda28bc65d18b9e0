"""The nine released files: where they are, and how one comes onto this disk whole.

Source: the table of files in openai/CLIP, ``clip/clip.py``. The folder in each URL is the file's sha256, so a URL says
not only where a file is but which bytes it must hold, wherever they are fetched from.

Differs from the original: an interrupted download is continued, a failing one is tried again, two processes do not
write one file, and a file that has been hashed is not hashed again until it changes.

    ~/.cache/clip/
        ViT-B-32.pt             the file: it appears by one rename, after its digest was found right
        ViT-B-32.pt.part        what has come so far; the next call continues it
        ViT-B-32.pt.lock        held by the process that downloads; empty, and left in place
        ViT-B-32.pt.verified    digest, size and times of the file when it was last hashed

Read from the environment: ``CLIP_CACHE`` (the folder), ``CLIP_BASE_URL`` (a mirror of the released files),
``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY``, and for certificates ``SSL_CERT_FILE``, ``SSL_CERT_DIR``,
``REQUESTS_CA_BUNDLE`` and ``CURL_CA_BUNDLE``.
"""

import hashlib
import logging
import os
import random
import re
import ssl
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

if os.name == "nt":
    import msvcrt
else:
    import fcntl

__all__ = ["MODELS", "DownloadError", "download"]

BASE_URL = "https://openaipublic.azureedge.net/clip/models"

MODELS: dict[str, str] = {
    "RN50": f"{BASE_URL}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": f"{BASE_URL}/8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": f"{BASE_URL}/7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": f"{BASE_URL}/52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": f"{BASE_URL}/be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": f"{BASE_URL}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": f"{BASE_URL}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": f"{BASE_URL}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": f"{BASE_URL}/3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}

TIMEOUT = 30.0  # seconds without a byte, after which a server counts as stalled
ATTEMPTS = 5  # in a row that bring nothing new
FIRST_PAUSE = 0.5  # seconds; doubles with every further attempt
LONGEST_PAUSE = 60.0  # seconds, however long the server asks us to stay away
CHUNK = 1 << 16  # bytes

_log = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """A file could not be brought into the cache; the message says why, and how to put it there by hand."""


class _Retry(DownloadError):
    """A failure that may pass; `pause` is how many seconds the server asked for, if it did."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


def download(url: str, root: str | os.PathLike[str] | None = None, *, local_files_only: bool = False) -> str:
    """Path of the file at `url`, from the cache if it is there, and always with the right sha256.

    Parameters
    ----------
    url
        An entry of `MODELS`, or any URL of the form ``.../<sha256>/<name>``. A URL without a digest is refused: nothing
        could tell its file from half of it, or from a login page.
    root
        The cache folder; without it ``CLIP_CACHE`` from the environment, then ``~/.cache/clip``.
    local_files_only
        Do not use the network.

    Returns
    -------
    str
        ``root/<name>``. Its bytes were hashed at least once since they last changed, a file put there by hand included.

    Raises
    ------
    DownloadError
        The file cannot be had, or cannot be stored. A broken transfer leaves ``<name>.part``, which the next call
        continues.
    """
    digest, name = _digest_and_name(url)
    if (mirror := os.environ.get("CLIP_BASE_URL")) and url.startswith(f"{BASE_URL}/"):
        url = mirror.rstrip("/") + url.removeprefix(BASE_URL)
    folder = cache_folder(root)
    target = folder / name
    if target.exists() and not target.is_file():
        raise DownloadError(f"{target} exists and is not a regular file")
    by_hand = f"To put the file there by hand:\n  from    {url}\n  sha256  {digest}\n  to      {target.absolute()}"

    try:
        if _is_verified(target, digest):
            return str(target)
        if local_files_only:
            raise DownloadError(f"{target} is {'another file' if target.exists() else 'not there'}: local files only")
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            if not _is_verified(target, digest):  # else another process brought it while we waited
                if target.exists():
                    warnings.warn(f"{target} has another sha256 than {digest}; downloading it again", stacklevel=2)
                part = folder / f"{name}.part"
                _fetch(url, part, digest)
                os.replace(part, target)
        return str(target)
    except DownloadError as error:
        raise DownloadError(f"{error}\n{by_hand}") from error.__cause__
    except OSError as error:  # the network's errors are DownloadErrors by now, so this one is the disk's
        raise DownloadError(f"cannot read or write {target}: {error}\n{by_hand}") from error


def cache_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """Where the files are kept: `root`, or else ``CLIP_CACHE`` from the environment, or else ``~/.cache/clip``."""
    return Path(root or os.environ.get("CLIP_CACHE") or "~/.cache/clip").expanduser()


def _digest_and_name(url: str) -> tuple[str, str]:
    """``https://host/any/<sha256>/RN50.pt?signature`` -> ``("<sha256>", "RN50.pt")``."""
    *_, digest, name = ["", "", *urlsplit(url).path.split("/")]
    if not re.fullmatch("[0-9a-fA-F]{64}", digest) or not name.strip("."):
        raise DownloadError(
            f"expected a URL that ends in /<sha256>/<name>, 64 hexadecimal digits and a file name, got {url}; "
            "for a file of unknown digest, download it yourself and load it by its path"
        )
    return digest.lower(), name


def _is_verified(target: Path, digest: str) -> bool:
    """Whether `target` is there with this digest.

    Hashing 338 MiB takes 0.2 to 0.6 s, much of what loading takes, so a success is noted beside the file together with
    its size and times, and holds while all of them stay as they are. Writing moves the mtime; copying, renaming and
    back-dating move the ctime, which programs cannot set. (On Windows ctime is the time of creation, so an edit of
    equal length, back-dated on purpose, would pass.)
    """
    if not target.is_file():
        return False
    status = target.stat()
    note = f"{digest} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode()
    note_path = target.with_name(f"{target.name}.verified")
    with suppress(OSError):
        if note_path.read_bytes() == note:
            return True
    if sha256_of(target).hexdigest() != digest:
        return False
    with suppress(OSError):  # in a read-only cache every call hashes
        note_path.write_bytes(note)
    return True


def sha256_of(path: Path) -> "hashlib._Hash":
    """The hash object after reading the whole file."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`. The system frees it when its holder dies, so what was left by a crash never blocks."""
    with open(path, "ab") as file:
        waiting = False
        while True:
            try:
                if os.name == "nt":
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if not waiting:
                    _log.warning("waiting for another process that is downloading %s", path.with_suffix(""))
                waiting = True
                time.sleep(0.2)
            except OSError as error:  # some network file systems; the digest still catches two writers
                _log.warning("%s cannot be locked (%s); going on without", path, error)
                break
        yield


def _fetch(url: str, part: Path, digest: str) -> None:
    """Attempt until `part` holds the file; go on while attempts bring new bytes, start over once on a wrong digest."""
    failures, most, started_over = 0, 0, False
    while True:
        try:
            received = _attempt(url, part, digest)
        except _Retry as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size > most else failures + 1
            most = max(size, most)
            if failures == ATTEMPTS:
                raise DownloadError(f"{error} (gave up after {ATTEMPTS} attempts)") from error.__cause__
            jitter = random.SystemRandom().uniform(0.5, 1.5)  # not the user's generator
            pause = min(error.pause or FIRST_PAUSE * 2 ** (failures - 1) * jitter, LONGEST_PAUSE)
            _log.warning("%s; trying again in %.1f s", error, pause)
            time.sleep(pause)
            continue
        if received == digest:
            return
        wrong = f"{url} sent {part.stat().st_size} bytes with sha256 {received}, expected {digest}"
        part.unlink()
        if started_over:
            raise DownloadError(f"{wrong}, twice; it may be a proxy or login page that answers")
        _log.warning("%s; starting over", wrong)
        failures, most, started_over = 0, 0, True


def _attempt(url: str, part: Path, digest: str) -> str:
    """Continue `part` to its end by one request; return the sha256 of all it holds then."""
    hasher, have = hashlib.sha256(), 0
    if part.exists():
        hasher, have = sha256_of(part), part.stat().st_size
        if hasher.hexdigest() == digest:  # the last attempt ended between the last byte and the rename
            return digest

    with _request(url, have) as response:
        start, total = _extent(response)
        if start == 0:  # a server may ignore the range we ask for
            hasher, have = hashlib.sha256(), 0
        elif start != have:
            part.unlink(missing_ok=True)
            raise _Retry(f"{url} cannot be continued at byte {have} (status {response.status})")

        with (
            open(part, "ab") as file,
            tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024) as bar,
        ):
            file.truncate(have)
            while chunk := _read(response, url):
                file.write(chunk)
                hasher.update(chunk)
                have += len(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise _Retry(f"{url} ended after {have} of {total} bytes")
    return hasher.hexdigest()


def _request(url: str, start: int) -> HTTPResponse | HTTPError:
    """Ask for `url` from byte `start` on; failures come sorted into those that may pass and those that will not."""
    try:
        request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        # A context of its own makes urllib look at the environment's proxies now, not as they were at its first use.
        return urlopen(request, timeout=TIMEOUT, context=_tls_context())
    except HTTPError as error:
        if error.code == 416 and start:  # range not satisfiable: an answer about the part file
            return error
        error.close()
        reason = f"{url} answered {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            wait = error.headers.get("Retry-After", "")
            raise _Retry(reason, float(wait) if wait.isdecimal() else None) from error
        raise DownloadError(reason) from error
    except (OSError, HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise DownloadError(f"{url}: {error}; SSL_CERT_FILE can name the certificate to trust") from error
        raise _Retry(f"{url}: {error}") from error
    except ValueError as error:  # not a URL, such as a mirror without https://
        raise DownloadError(str(error)) from error


def _tls_context() -> ssl.SSLContext:
    """Trust what the system and SSL_CERT_FILE or SSL_CERT_DIR name, and what requests and curl are told to trust."""
    context = ssl.create_default_context()
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if bundle := os.environ.get(variable):
            try:
                cafile, capath = (None, bundle) if os.path.isdir(bundle) else (bundle, None)
                context.load_verify_locations(cafile, capath)
            except OSError as error:
                raise DownloadError(f"{variable}={bundle} cannot be read as certificates: {error}") from error
    return context


def _extent(response: HTTPResponse | HTTPError) -> tuple[int | None, int | None]:
    """First byte of the body, and length of the whole file, as far as the server tells."""
    if response.status in (206, 416):
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start, total = match.groups() if match else ("", "")
    else:
        start, total = "0", response.headers.get("Content-Length", "")
    return int(start) if start.isdecimal() else None, int(total) if total.isdecimal() else None


def _read(response: HTTPResponse, url: str) -> bytes:
    """The next bytes of the body, empty at its end."""
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _Retry(f"{url} broke off: {error}") from error
