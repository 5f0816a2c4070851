"""The Hugging Face Hub's side of a download: what a dataset repository holds, and its bytes onto the disk.

`huggingface_hub` lists, authorises and transfers, and takes up a connection that broke. What it lacks for files of many
gigabytes is here and in `download.py`: since its release 1.x a part that an ended process leaves is thrown away, and
what arrives over HTTP is checked for its size alone.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from httpx2 import HTTPError, InvalidURL, TransportError
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from megatron_bipe.errors import DataError
from megatron_bipe.io import sha256_of

BUSY = (429, 500, 502, 503, 504)  # status of a Hub that may answer the same request later
LIST_TIMEOUT_S = 30.0
GO_ON = "run the same command again: it goes on from what is there"

log = logging.getLogger(__name__)


class HubFile(NamedTuple):
    """A file of a repository, as the Hub states it."""

    path: str  # in the repository, "/" between folders
    size_bytes: int
    checksum: str  # "sha256:" of the content of a large file, "git-sha1:" as git hashes a small one


class Snapshot(NamedTuple):
    """A dataset repository at one commit."""

    repo: str
    commit: str
    licence: str  # as the repository names it; "not stated" if it does not
    files: tuple[HubFile, ...]


def list_snapshot(repo: str, revision: str | None, endpoint: str | None) -> Snapshot:
    """What a dataset repository holds.

    Args:
        repo: OWNER/NAME.
        revision: branch, tag or commit hash; None: the main branch.
        endpoint: of the Hub or a mirror of it; None: as `huggingface_hub` has it.

    Raises:
        DataError: no network, no such repository or revision, no access, or something that is no Hub.
    """
    api = HfApi(endpoint=endpoint)
    try:
        with hub_errors(f"{repo}@{revision}" if revision else repo):
            info = api.dataset_info(repo, revision=revision, timeout=LIST_TIMEOUT_S)
            entries = list(api.list_repo_tree(repo, repo_type="dataset", revision=info.sha, recursive=True))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"The answer for {repo} is not that of a Hugging Face Hub", remedy="Check --endpoint", location=api.endpoint
        ) from error
    licences = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    files = tuple(_hub_file(repo, entry) for entry in entries if isinstance(entry, RepoFile))
    return Snapshot(repo, str(info.sha), ", ".join(licences) or "not stated", files)


def _hub_file(repo: str, entry: RepoFile) -> HubFile:
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"The repository names a file {entry.path!r}, which would lie outside the output folder",
            remedy="Do not use this repository",
            location=repo,
        )
    if entry.lfs is None:
        return HubFile(entry.path, entry.size, f"git-sha1:{entry.blob_id}")
    return HubFile(entry.path, entry.size, f"sha256:{entry.lfs.sha256}")


def is_complete(path: Path, file: HubFile) -> bool:
    """Whether the content on disk is the one that the Hub states; reads all of it."""
    if path.stat().st_size != file.size_bytes:
        return False
    kind, _, stated = file.checksum.partition(":")
    return (sha256_of(path) if kind == "sha256" else git_hash(path.read_bytes())) == stated


def receive(snapshot: Snapshot, file: HubFile, endpoint: str | None, part: Path, bar: Callable[..., Any]) -> None:
    """Append to a part on disk what it lacks; connections that break are taken up again.

    Args:
        snapshot: whose file it is.
        file: to fetch.
        endpoint: as in `list_snapshot`.
        part: may be there from an earlier run.
        bar: called as `tqdm` is for each transfer, with the bytes that are there as `initial`.

    Raises:
        DataError: no access, or a disk that is full.
        TransportError: the network failed; see `may_pass`.
        HfHubHTTPError: the Hub is busy; see `may_pass`.
    """
    # Redirects are followed from here each time: the places behind them are signed, and expire within a long transfer.
    url = hf_hub_url(snapshot.repo, file.path, repo_type="dataset", revision=snapshot.commit, endpoint=endpoint)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with disk_errors(part), part.open("ab") as stream:
        if stream.tell() > file.size_bytes:
            stream.seek(0)
            stream.truncate()
        try:
            with hub_errors(snapshot.repo, leave=may_pass):
                http_get(
                    url,
                    stream,
                    resume_size=stream.tell(),
                    headers=headers,
                    expected_size=file.size_bytes,
                    displayed_filename=file.path,
                    tqdm_class=bar,  # type: ignore[arg-type]
                )
        except OSError as error:
            if error.errno is not None or isinstance(error, HfHubHTTPError):
                raise
            log.warning("%s: another size than the Hub states arrived", file.path)  # the caller looks at what is there


def require_transferable(files: list[HubFile]) -> None:
    """The Hub serves larger files through its own protocol alone, which cannot go on from a part."""
    large = next((file for file in files if file.size_bytes > MAX_HTTP_DOWNLOAD_SIZE), None)
    if large is not None:
        raise DataError(
            f"{large.path} has {large.size_bytes / 1e9:.0f} GB, and the Hub serves at most "
            f"{MAX_HTTP_DOWNLOAD_SIZE / 1e9:.0f} GB over HTTP",
            remedy="Fetch it by `hf download --repo-type dataset --local-dir`, then run this again to check it",
            location=large.path,
        )


class _Reason(NamedTuple):
    kind: type[Exception]
    what: str
    remedy: str
    statuses: tuple[int, ...] = ()  # of HTTP; empty: any


# The first that fits is told; `{error}` is what the exception says.
_REASONS = (
    _Reason(
        GatedRepoError,
        "Access to this repository is granted on request, and has not been granted",
        "Ask for it on the repository's page, log in with `hf auth login`, and run again",
    ),
    _Reason(
        RepositoryNotFoundError,
        "The Hub has no such dataset repository, or it is private",
        "Check the name (OWNER/NAME); for a private one, log in with `hf auth login`",
    ),
    _Reason(RevisionNotFoundError, "The repository has no such revision", "Name a branch, a tag or a commit hash"),
    _Reason(
        HfHubHTTPError,
        "The Hub refuses access: {error}",
        "Log in with `hf auth login`, or check that the token (HF_TOKEN) is valid and may read this repository",
        statuses=(401, 403),
    ),
    _Reason(HfHubHTTPError, "The Hub answered: {error}", f"If it does not say otherwise, {GO_ON}"),
    _Reason(HFValidationError, "This is no repository name: {error}", "Name it as OWNER/NAME"),
    _Reason(OfflineModeIsEnabled, "huggingface_hub is told to stay offline", "Unset HF_HUB_OFFLINE"),
    _Reason(InvalidURL, "The endpoint is no address: {error}", "Give it as https://HOST"),
    _Reason(
        HTTPError,
        "The Hub cannot be reached: {error}",
        f"Check the network, the proxy settings and --endpoint, and {GO_ON}",
    ),
)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    return isinstance(error, TransportError) or _status(error) in BUSY


def _status(error: Exception) -> int:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 0


@contextmanager
def hub_errors(place: str, leave: Callable[[Exception], bool] = lambda _: False) -> Iterator[None]:
    """Turn what `huggingface_hub` raises, but for what is to be left as it is, into the one error that a user reads."""
    try:
        yield
    except (HTTPError, InvalidURL, HFValidationError, OfflineModeIsEnabled) as error:
        if leave(error):
            raise
        fits = (why for why in _REASONS if isinstance(error, why.kind))
        why = next(why for why in fits if not why.statuses or _status(error) in why.statuses)
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(why.what.format(error=said), remedy=why.remedy, location=place) from error


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what the disk refuses into the one error that a user reads."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "The disk is full" if full else f"The disk refuses this: {error.strerror}"
        remedy = "Make room" if full else "Check the place and its permissions"
        raise DataError(what, remedy=f"{remedy}, and {GO_ON}", location=place) from error
