"""Access to the Hugging Face Hub: its token is sent over https only, and no mistyped path is taken for a name there.

The parts of `huggingface_hub` that open connections load slowly, so they are imported only before one is opened.
"""

import difflib
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bipe.errors import DataError

if TYPE_CHECKING:
    from httpx2 import Client, Request

RECEIPT_NAME = "download-receipt.json"  # record of a download in its folder
LFS_START = b"version https://git-lfs.github.com"  # of a pointer of Git LFS, in place of a file's content
LFS_REMEDY = "Run git lfs pull in the repository, or fetch the file itself"
NO_OWNERS = ("", ".", "..", "~")  # first parts of paths, not of names on the Hub

_log = logging.getLogger(__name__)


@functools.cache
def protect_token() -> None:
    """Make `huggingface_hub` in this process send the token over https only; call this before any request."""
    from huggingface_hub import set_client_factory

    set_client_factory(_new_client)


def _new_client() -> "Client":
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks["request"], keep_token_on_https]}
    return client


def keep_token_on_https(request: "Request") -> None:
    """Remove the token from a request that is not encrypted; called also for each redirect."""
    if request.url.scheme != "https" and "Authorization" in request.headers:
        del request.headers["Authorization"]
        _warn(f"{request.url.scheme}://{request.url.netloc.decode()}")


@functools.cache
def _warn(address: str) -> None:
    _log.warning("The Hub's token is not sent to %s, because the connection is not encrypted (https)", address)


def require_no_path(name: str) -> None:
    """Refuse to take a name for one on the Hub if it looks like a mistyped path.

    Raises:
        DataError: the name has several parts, and the first exists on this disk or cannot be on the Hub.
    """
    first, slash, _ = name.partition("/")
    check = f"Check the path{suggest_path(Path(name))}"
    if slash and first in NO_OWNERS:
        raise DataError("There is no such file or folder", remedy=check, location=name)
    if slash and Path(first).exists():
        raise DataError(
            f"There is no such path, but {first!r} exists, so this is not taken for a name on the Hub",
            remedy=f"{check}; for a name on the Hub, run this in another folder",
            location=name,
        )


def suggest_path(path: Path) -> str:
    """Return a text that names a path like this one, or "" if there is none."""
    try:
        others = (other.name for other in path.parent.iterdir() if other.name != path.name)
        near = difflib.get_close_matches(path.name, others, n=1)
    except OSError:
        return ""
    return f": there is {path.parent / near[0]}" if near else ""
