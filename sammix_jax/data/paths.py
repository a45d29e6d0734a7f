"""Paths on this machine and in object stores, such as `gs://BUCKET/…`.

A local path is pathlib's own, one in an object store is `etils.epath`'s. Their methods are the
same; where these mean different things, a function stands here. Object stores know whole objects:
nothing is appended, linked, renamed or mapped into memory, and a folder is what names share.
"""

import functools
import glob
import logging
import os
import pathlib
import re
from collections.abc import Iterator

import fsspec
from etils import epath

from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)

Path = pathlib.Path | epath.Path

# The client of each scheme, and how to get it.
CLIENTS = {"gs": "pip install -r requirements/cloud.txt", "s3": "pip install s3fs"}


def as_path(path) -> Path:
    """What a user wrote, or what this function gave, as a path.

    Raises:
      UserError: a scheme that nobody here reads, a slash too few, or a bucket out of reach.
    """
    # A scheme has two letters at least; a drive has one.
    match = re.match(r"(\w\w+):/", str(path))
    if not match:
        local = pathlib.Path(path)
        # The shell leaves it as it is in --workdir=~/runs.
        return local.expanduser() if local.parts[:1] == ("~",) else local
    remote = re.match(r"(\w+)://([^/]+)", str(path))
    if not remote or remote[1] not in CLIENTS:
        expected = " or ".join(f"{scheme}://BUCKET/…" for scheme in CLIENTS)
        raise UserError(f"{path}: expected a local path, {expected}; mind the two slashes.")
    _reach(*remote.groups())
    return epath.Path(str(path))


def is_remote(path: Path) -> bool:
    """Whether the path lies in an object store: pathlib's paths have no double slash."""
    return "://" in str(path)


def resolved(path: Path) -> Path:
    """Without links and from the root on. Object stores have neither links nor a current folder."""
    return path if is_remote(path) else path.resolve()


def absolute(path: Path) -> Path:
    """From the root on, by the name that it has here: what a link points to may have another."""
    return path if is_remote(path) else pathlib.Path(os.path.abspath(path))


def version(path: Path) -> list:
    """Size and modification time, as JSON has them: another version of a file has others.

    Raises:
      OSError: no such file.
    """
    if is_remote(path):
        files, name = fsspec.core.url_to_fs(str(path))
        return [files.size(name), str(files.modified(name))]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def find_below(folder: Path, names: re.Pattern, above: frozenset = frozenset()) -> Iterator[Path]:
    """What lies at any depth below the folder under one of these names, which are of files.

    Through links too, which data sets are gathered by, but to none of the folders `above`.
    """
    above |= {resolved(folder)}
    try:
        inside = list(folder.iterdir())
    except PermissionError as error:  # such as the lost+found of a disk
        _LOG.warning("%s: cannot be looked into (%s), and is left out.", folder, error)
        return
    for path in inside:
        if names.fullmatch(path.name):
            yield path
        elif path.is_dir() and resolved(path) not in above:
            yield from find_below(path, names, above)


def find_in(folder: Path, pattern: str) -> list[Path]:
    """As `folder.glob`, sorted, which says nothing of what it cannot look into.

    Folders below this one that cannot be looked into are told and left out.

    Raises:
      UserError: this folder is such a one.
    """
    if not is_remote(folder) and folder.is_dir():
        if not _is_open(folder):
            raise UserError(
                f"{folder}: cannot be looked into; you lack the right to read it (chmod u+rx)."
            )
        for below in folder.iterdir() if "/" in pattern else ():
            if below.is_dir() and not _is_open(below):
                _LOG.warning("%s: cannot be looked into, and is left out.", below)
    return sorted(folder.glob(pattern))


def _is_open(folder: pathlib.Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def find_matching(pattern: str) -> list[Path]:
    """The paths that a pattern with wildcards stands for."""
    path = as_path(pattern)
    if is_remote(path):
        return list(path.parent.glob(path.name))
    return [pathlib.Path(found) for found in glob.glob(str(path))]


@functools.cache
def _reach(scheme: str, bucket: str) -> None:
    """Asks once for each bucket, so that no login and no client is told before any work."""
    try:
        files, name = fsspec.core.url_to_fs(f"{scheme}://{bucket}")
        files.exists(name)
    except ImportError as error:
        raise UserError(
            f"{scheme}://{bucket}: needs a client ({error}): {CLIENTS[scheme]}."
        ) from error
    except Exception as error:  # every client has errors of its own
        raise UserError(
            f"{scheme}://{bucket}: cannot be reached ({type(error).__name__}: {error}); check the "
            "bucket's name and your login, such as gcloud auth application-default login."
        ) from error
