"""Writes scans into a slice store (`slices.py`), each whole or not at all."""

import pathlib
import shutil
import time
import uuid
from collections.abc import Iterable

import numpy as np

from sammix_jax.data.files import read_json, whole_file, write_json
from sammix_jax.data.paths import Path, is_remote
from sammix_jax.data.slices import ARRAYS, SCAN, ScanRecord
from sammix_jax.errors import UserError

PARTIAL = ".partial"
# No process takes so long over one scan: what is older is of one that was killed.
ABANDONED_SECONDS = 24 * 3600


def write_scan(folder: Path, arrays: dict, record: ScanRecord) -> None:
    """Writes a scan's arrays, by file name, and its record.

    Raises:
      UserError: the folder cannot be written, for example because the disk is full.
    """
    write = _write_objects if is_remote(folder) else _write_folder
    try:
        write(folder, arrays, record)
    except (OSError, UserError) as error:
        raise UserError(
            f"{folder}: could not be written ({error}); make room or place the store elsewhere "
            "with --config.data.store=DIR, then run again: finished scans are kept."
        ) from error


def refuse_other_files(folders: Iterable[Path]) -> None:
    """Refuses to place scans where other files are, which would be lost.

    Args:
      folders: of scans that are to be written; few of them may exist.

    Raises:
      UserError: one holds what no store does, such as the scans themselves.
    """
    for folder in folders:
        if not folder.exists():
            continue
        inside = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        # Hidden files, such as a file manager's, are no loss.
        if others := sorted(n for n in inside - {SCAN, *ARRAYS} if not n.startswith(".")):
            raise UserError(
                f"{folder}: a prepared scan would take the place of {', '.join(others[:5])}, which "
                "no store holds; place the store elsewhere with --config.data.store=DIR, outside "
                "of the data."
            )


def _write_folder(folder: pathlib.Path, arrays: dict, record: ScanRecord) -> None:
    # Two processes may prepare one store: each has a folder of its own until the scan is whole.
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / name, array)
        write_json(partial / SCAN, record.to_json())
        if _same_scan(folder, partial):
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:
            # No folder replaces another that is not empty: here, one that appeared since.
            if not _same_scan(folder, partial):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _same_scan(folder: pathlib.Path, partial: pathlib.Path) -> bool:
    """Whether another process has finished in `folder` what lies in `partial`."""
    path = folder / SCAN
    return path.exists() and read_json(path) == read_json(partial / SCAN)


def _write_objects(folder: Path, arrays: dict, record: ScanRecord) -> None:
    """An object store renames no folders: the record goes first and comes last."""
    (folder / SCAN).unlink(missing_ok=True)
    for name, array in arrays.items():
        with whole_file(folder / name) as partial:
            np.save(partial, array)
    write_json(folder / SCAN, record.to_json())


def clear_abandoned(store: Path) -> None:
    """Removes what killed processes left half-written in a store; an object store has none."""
    if is_remote(store):
        return
    for folder in (store / "scans").glob(f".*{PARTIAL}"):
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
