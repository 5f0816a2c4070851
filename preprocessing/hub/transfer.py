"""Access to the Hugging Face Hub: list the files of a dataset repository, and fetch their bytes to disk.

`huggingface_hub` lists, authorizes, transfers, and resumes broken connections. This package adds what files of many
gigabytes need (decision 0010): the library discards the partial file of an earlier process, and checks only the size
of what arrives over HTTP.
"""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

from megatron_bipe.data.hub import protect_token
from megatron_bipe.errors import DataError
from megatron_bipe.io import check_inner_name, sha256_of

BUSY = (429, 500, 502, 503, 504)  # HTTP status codes after which the same request may succeed later
LIST_TIMEOUT_S = 30.0
RESUME_HINT = "run the same command again: it resumes from the files that are there"

log = logging.getLogger(__name__)


class HubFile(NamedTuple):
    """File of a repository, as the Hub reports it."""

    path: str  # within the repository, with "/"
    size_bytes: int
    checksum: str  # "sha256:" and the content's hash for a large file, "git-sha1:" and git's hash for a small one


class Snapshot(NamedTuple):
    """Dataset repository at one commit."""

    repo: str
    commit: str
    licence: str  # as the repository states it, or "not stated"
    files: tuple[HubFile, ...]


def list_snapshot(repo: str, revision: str | None, endpoint: str | None) -> Snapshot:
    """List the files of a dataset repository.

    Args:
        repo: OWNER/NAME.
        revision: branch, tag or commit hash; None: the main branch.
        endpoint: URL of the Hub or a mirror; None: the default of `huggingface_hub`.

    Raises:
        DataError: no network, an unknown repository or revision, no access, or an endpoint that is not a Hub.
    """
    protect_token()
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
    try:
        check_inner_name(entry.path)
    except ValueError as error:
        raise DataError(
            f"The repository lists a file that would be outside the output folder: {error}",
            remedy="Do not use this repository",
            location=repo,
        ) from error
    if entry.lfs is None:
        return HubFile(entry.path, entry.size, f"git-sha1:{entry.blob_id}")
    return HubFile(entry.path, entry.size, f"sha256:{entry.lfs.sha256}")


def is_complete(path: Path, file: HubFile) -> bool:
    """Read a file, and return True if its content is the one that the Hub reports."""
    kind, _, stated = file.checksum.partition(":")
    with disk_errors(path):
        if path.stat().st_size != file.size_bytes:
            return False
        return (sha256_of(path) if kind == "sha256" else git_hash(path.read_bytes())) == stated


def receive(snapshot: Snapshot, file: HubFile, endpoint: str | None, part: Path, bar: Callable[..., Any]) -> None:
    """Append the missing bytes to a partial file, which may not exist yet, and resume connections that break.

    `bar` is called like `tqdm` for each transfer, with the size of `part` as `initial`.

    Raises:
        DataError: no access, or a full disk.
        TransportError: the network failed; see `may_pass`.
        HfHubHTTPError: the Hub is busy; see `may_pass`.
    """
    # Redirects are followed again each time: their targets are signed URLs, which expire during a long transfer.
    url = hf_hub_url(snapshot.repo, file.path, repo_type="dataset", revision=snapshot.commit, endpoint=endpoint)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with disk_errors(part), part.open("ab") as stream:
        if stream.tell() > file.size_bytes:
            stream.seek(0)
            stream.truncate()
        try:
            with hub_errors(snapshot.repo, leave=is_transient):
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
            log.warning("%s: the received size is not what the Hub reports", file.path)  # the caller checks the content


def require_transferable(files: list[HubFile]) -> None:
    """Refuse files that the Hub serves only through its own protocol, which cannot resume a partial file."""
    large = next((file for file in files if file.size_bytes > MAX_HTTP_DOWNLOAD_SIZE), None)
    if large is not None:
        raise DataError(
            f"{large.path} has {large.size_bytes / 1e9:.0f} GB, and the Hub serves at most "
            f"{MAX_HTTP_DOWNLOAD_SIZE / 1e9:.0f} GB over HTTP",
            remedy="Fetch it with `hf download --repo-type dataset --local-dir`, then run this again to check it",
            location=large.path,
        )


def is_transient(error: Exception) -> bool:
    """Return True if the same request may succeed later."""
    is_busy = isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY
    return is_busy or isinstance(error, TransportError)


@contextmanager
def hub_errors(location: str, leave: Callable[[Exception], bool] = lambda _: False) -> Iterator[None]:
    """Turn exceptions of `huggingface_hub` into `DataError`, except those for which `leave` returns True."""
    try:
        yield
    except (HTTPError, InvalidURL, HFValidationError, OfflineModeIsEnabled) as error:
        if leave(error):
            raise
        what, remedy = _explain(error)
        raise DataError(what, remedy=remedy, location=location) from error


def _explain(error: Exception) -> tuple[str, str]:
    """Return what went wrong and its remedy."""
    text = " ".join(str(error).split()) or type(error).__name__
    match error:
        case GatedRepoError():
            what = "Access to this repository is granted on request, and has not been granted"
            return what, "Ask for it on the repository's page, log in with `hf auth login`, and run again"
        case RepositoryNotFoundError():
            what = "The Hub has no such dataset repository, or it is private"
            return what, "Check the name (OWNER/NAME); for a private one, log in with `hf auth login`"
        case RevisionNotFoundError():
            return "The repository has no such revision", "Name a branch, a tag or a commit hash"
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            remedy = (
                "Log in with `hf auth login`, or check that the token (HF_TOKEN) is valid and may read this repository"
            )
            return f"The Hub refuses access: {text}", remedy
        case HfHubHTTPError():
            return f"The Hub answered: {text}", f"Unless it says otherwise, {RESUME_HINT}"
        case HFValidationError():
            return f"This is not a repository name: {text}", "Name it as OWNER/NAME"
        case OfflineModeIsEnabled():
            return "huggingface_hub is in offline mode", "Unset HF_HUB_OFFLINE"
        case InvalidURL():
            return f"The endpoint is not a URL: {text}", "Give it as https://HOST"
    remedy = f"Check the network, the proxy settings and --endpoint, and {RESUME_HINT}"
    return f"The Hub cannot be reached: {text}", remedy


@contextmanager
def disk_errors(location: Path) -> Iterator[None]:
    """Turn failures of the disk into `DataError`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        message = "The disk is full" if full else f"The disk operation failed: {error.strerror}"
        remedy = "Free disk space" if full else "Check the path and its permissions"
        raise DataError(message, remedy=f"{remedy}, and {RESUME_HINT}", location=location) from error
