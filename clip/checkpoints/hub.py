"""Models of the Hugging Face hub: which files of a repository are needed, and how they come into the hub's own cache.

    "hf-hub:OWNER/NAME", "hf-hub:OWNER/NAME@REVISION"      a branch, a tag or a commit; "main" if none is named
      │  what does the repository hold at that revision?
      │  one form of its weights, by the order in which a folder is read (files.py), and the JSON beside it
      │  what of it is not in the cache is fetched
    ~/.cache/huggingface/hub/models--OWNER--NAME/snapshots/COMMIT/      a folder, read as any other

The package huggingface_hub does the fetching, so its settings hold: ``HF_HOME`` and ``HF_HUB_CACHE`` (the folder),
``HF_TOKEN`` or ``hf auth login`` (who asks), ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` (a mirror). It is optional:
``pip install clip-from-scratch[hub]``.
"""

import logging
import os
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from .files import FOLDER_WEIGHTS, INDEX
from .huggingface import CONFIG, PREPROCESSORS
from .open_clip import CONFIG as OPEN_CLIP_CONFIG
from .released import DownloadError

__all__ = ["PREFIX", "fetch"]

PREFIX = "hf-hub:"
BESIDE = (OPEN_CLIP_CONFIG, CONFIG, *PREPROCESSORS)
TIMEOUT = 10.0  # seconds until the cache has to do

_log = logging.getLogger(__name__)


def fetch(name: str, root: str | os.PathLike[str] | None = None, *, local_files_only: bool = False) -> Path:
    """Bring what is needed of a repository into the cache.

    Parameters
    ----------
    name : str
        "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION".
    root : path, optional
        The cache folder; otherwise that of huggingface_hub.
    local_files_only : bool
        Do not use the network: what the cache holds of this revision is taken as it is.

    Returns
    -------
    Path
        The folder of the commit. If the hub cannot be reached, that of the revision as it was when it last could.

    Raises
    ------
    ValueError
        If it is no such name.
    ImportError
        If huggingface_hub is not installed.
    DownloadError
        If there is no such repository or revision, it is not for everybody, it holds no weights that are known here, or
        it can neither be reached nor is in the cache.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f'expected "{PREFIX}OWNER/NAME" or "{PREFIX}OWNER/NAME@REVISION", got {name!r}')
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download
    except ImportError as error:
        raise ImportError(f"{name} needs huggingface_hub: pip install clip-from-scratch[hub]") from error
    revision = revision or constants.DEFAULT_REVISION
    if local_files_only or constants.HF_HUB_OFFLINE:
        return _in_cache(name, repository, revision, root, "and is not looked for elsewhere: local files only")
    try:
        about = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
        first, *others = _needed(name, {file.rfilename for file in about.siblings or ()})
        # Asked by the revision, the cache notes which commit it is; the others must be of the same.
        folder = Path(hf_hub_download(repository, first, revision=revision, cache_dir=root)).parent
        for file in others:
            hf_hub_download(repository, file, revision=folder.name, cache_dir=root)
        return folder
    except DownloadError:
        raise
    except Exception as error:  # most are those of an HTTP library, and huggingface_hub has had three
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and 400 <= status < 500 and status != 429:
            raise DownloadError(f"{name}: {_refusal(error, status, repository, revision)}") from error
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
        folder = _in_cache(name, repository, revision, root, f"and cannot be had ({reason})")
        _log.warning("%s cannot be had (%s); going on with what the cache has, %s", name, reason, folder)
        return folder


def _needed(name: str, files: Collection[str]) -> list[str]:
    """The files to fetch, of those that a repository holds; last the one that tells a whole copy from a begun one."""
    weights = next((each for each in FOLDER_WEIGHTS if each in files), None)
    if weights is None:
        raise DownloadError(
            f"{name}: the repository holds none of {', '.join(FOLDER_WEIGHTS)}; if its weights have another name, "
            "download that file and load it by its path"
        )
    needed = [file for file in BESIDE if file in files]
    if weights.endswith(INDEX):
        stem, ending = weights.removesuffix(INDEX).split(".")
        needed += sorted(file for file in files if fnmatch(file, f"{stem}-*.{ending}"))
    return [*needed, weights]


def _in_cache(name: str, repository: str, revision: str, root: str | os.PathLike[str] | None, otherwise: str) -> Path:
    """The folder of a revision in the cache, if weights are in it."""
    from huggingface_hub import try_to_load_from_cache

    for weights in FOLDER_WEIGHTS:
        found = try_to_load_from_cache(repository, weights, cache_dir=root, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    raise DownloadError(f"{name} is not in the cache, {otherwise}; load it once with a connection")


def _refusal(error: Exception, status: int, repository: str, revision: str) -> str:
    """Why the hub does not give a file, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{repository}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision!r}; {page}/tree/main lists its branches and tags"
    if isinstance(error, GatedRepoError) or status == 403:
        return f"the repository is not open to everybody; ask for access at {page}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {page}, or it is private; mind the spelling, and if it is private {log_in}"
    if status == 401:
        return f"the hub does not accept the token it was given; {log_in}"
    return f"the hub answered {status} for {page}"
