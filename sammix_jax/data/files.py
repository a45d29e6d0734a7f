"""Files that appear whole or not at all, here and in object stores."""

import contextlib
import csv
import hashlib
import json
import os
import pathlib
import tempfile
import threading
import uuid
from collections.abc import Iterable

from sammix_jax import hosts
from sammix_jax.data.paths import Path, as_path, is_remote
from sammix_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary local path that takes the place of `path` when the block ends well.

    The temporary name keeps the ending, from which writers take the format. Of the processes of one
    run, which all come here, the first one's file is kept.
    """
    path = as_path(path)
    kept = _uploaded if is_remote(path) else _renamed
    place = kept if hosts.is_first() else _discarded
    try:
        with place(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error}); make room or choose another folder."
        ) from error


@contextlib.contextmanager
def local_copy(path):
    """Yields a local path with the content of `path`, for readers that know no object store.

    A local file is its own copy; a copy of a remote one vanishes with the block.

    Raises:
      UserError: a remote file that is missing or cannot be copied.
    """
    path = as_path(path)
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder) / path.name
        _download(path, local)
        yield local


class LocalCopies:
    """`copies(path)` is a local path with the content of `path`; a local file is its own copy.

    A remote file is copied at its first use. The copies lie in the folder for temporary files and
    vanish with this object.
    """

    def __init__(self):
        self._folder: tempfile.TemporaryDirectory | None = None
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> pathlib.Path:
        if not is_remote(path):
            return path
        with self._lock:  # several threads may want the same file
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="sammix-")
            local = pathlib.Path(self._folder.name, *path.parts[1:])
            if not local.exists():
                _download(path, local)
        return local


def write_json(path, value) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_csv(path, columns: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Writes a table; what is None is an empty field."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def sha256(path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with local_copy(path) as local, open(local, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """The JSON in `path`.

    Raises:
      UserError: it is missing, unreadable or no JSON.
    """
    path = as_path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error


def read_object(path) -> dict:
    """`read_json` of what must be an object, such as a config."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {str(value)[:40]!r}, expected a JSON object, {{...}}.")
    return value


@contextlib.contextmanager
def _renamed(path: pathlib.Path):
    # A process number alone is no name: on a shared disk two containers may have the same.
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _discarded(path: Path):
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder) / path.name


@contextlib.contextmanager
def _uploaded(path: Path):
    with tempfile.TemporaryDirectory() as folder:
        partial = pathlib.Path(folder) / path.name
        yield partial
        with _as_os_errors():
            # In one write: what was written before a fault would be kept as if it were all.
            path.write_bytes(partial.read_bytes())


def _download(path: Path, local: pathlib.Path) -> None:
    try:
        with _renamed(local) as partial, _as_os_errors():
            partial.write_bytes(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: could not be copied to this machine ({error}); is it there, and is there "
            f"room in {tempfile.gettempdir()}? TMPDIR names another folder."
        ) from error


@contextlib.contextmanager
def _as_os_errors():
    """Every client of an object store has errors of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
