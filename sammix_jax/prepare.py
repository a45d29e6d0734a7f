"""Scans on disk → slice store: one canonical orientation, one square grid, int16 HU.

Parallel over scans and resumable: a scan is written in a hidden folder and renamed when whole, the
manifest comes last. So no half-written store is ever taken for whole, and a rerun goes on where the
last one stopped, also after a full disk.
"""

import concurrent.futures
import dataclasses
import logging
import math
import os
import pathlib
import shutil
import time

import numpy as np
from tqdm import tqdm

from sammix_jax.data import datasets, phantom, volumes
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.geometry import slice_geometry
from sammix_jax.data.slices import MANIFEST, VERSION, ScanRecord, SliceStore
from sammix_jax.errors import UserError

_LOG = logging.getLogger(__name__)


def prepare(config, workdir) -> SliceStore:
    """Brings the configured scans into the slice store and opens it.

    Args:
      config: the run's config; reads `config.data`.
      workdir: the run's folder; holds the phantom and the store unless the config places them.

    Raises:
      UserError: any bad scan or mask, by file; the store prepared with other settings; a full disk.
    """
    data = config.data
    root = pathlib.Path(data.root) if data.root else _phantom(data, pathlib.Path(workdir))
    store = pathlib.Path(data.store or pathlib.Path(workdir) / "store")
    scans = datasets.find_scans(root, data.organ, tuple(data.label_values))
    params = {
        "organ": data.organ,
        "size": data.size,
        "resize": data.resize,
        "central_fraction": data.central_fraction,
    }
    _refuse_other_params(store, params)

    begin = time.monotonic()
    records, fresh = _prepare_scans(scans, store, params, workers=data.workers or os.cpu_count())
    write_json(
        store / MANIFEST,
        {
            "version": VERSION,
            "params": params,
            "scans": [record.to_json() for record in records],
        },
    )
    seconds = time.monotonic() - begin
    unlabelled = [r.name for r in records if not r.has_label]
    _LOG.info(
        "prepared %d scans (%d new, %.2f scans/s): %d labelled, %d unlabelled%s → %s",
        len(records),
        fresh,
        fresh / max(seconds, 1e-9),
        len(records) - len(unlabelled),
        len(unlabelled),
        f" ({', '.join(unlabelled[:8])} …)" if unlabelled else "",
        store,
    )
    return SliceStore.open(store)


def central_slices(count: int, fraction: float) -> range:
    """The paper's central slices: `range(ceil(m - fm), floor(m + fm))` with `m = (count - 1) / 2`.

    A fraction of 1 keeps every slice; the authors keep 0.3.
    """
    if fraction >= 1:
        return range(count)
    middle = (count - 1) / 2
    return range(math.ceil(middle - fraction * middle), math.floor(middle + fraction * middle))


def _phantom(data, workdir: pathlib.Path) -> pathlib.Path:
    """The embedded phantom data set, made on first use."""
    if not data.phantom.scans:
        raise UserError("data.root is empty: give the folder that holds the scans.")
    root = workdir / "phantom"
    phantom.write_lits(
        root,
        data.phantom.scans,
        data.phantom.seed,
        phantom.DOMAINS[data.phantom.domain],
        unlabelled=data.phantom.unlabelled,
    )
    return root


def _prepare_scans(scans, store: pathlib.Path, params: dict, workers: int):
    """Records of all scans in order, and how many had to be made."""
    # Threads: decompression, resizing and writing all release the GIL.
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(scans), desc="prepare", unit="scan", disable=None) as bar,
    ):
        jobs = [pool.submit(_prepare_scan, scan, store, params) for scan in scans]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    results = [job.result() for job in jobs]
    return [record for record, _ in results], sum(fresh for _, fresh in results)


def _prepare_scan(scan: datasets.Scan, store: pathlib.Path, params: dict):
    """The scan's record, and whether it had to be made."""
    folder = store / "scans" / scan.name
    fingerprint = _fingerprint(scan)
    if (folder / "scan.json").exists():
        record = ScanRecord.from_json(read_json(folder / "scan.json"))
        if record.fingerprint == fingerprint:
            # The data may have been moved as a whole since.
            return dataclasses.replace(record, **_paths(scan)), False
        shutil.rmtree(folder)

    volume = volumes.read_volume(scan.image)
    depth = volume.hu.shape[0]
    mask = volumes.read_mask(scan.label, volume, scan.label_values) if scan.label else None
    kept = central_slices(depth, params["central_fraction"])
    if not kept:
        raise UserError(
            f"{scan.image}: {depth} slices leave none at data.central_fraction="
            f"{params['central_fraction']}; raise the fraction."
        )
    geometry = slice_geometry(
        volume.hu.shape[1:], volume.spacing[1:], params["size"], params["resize"]
    )
    record = ScanRecord(
        name=scan.name,
        **_paths(scan),
        label_values=scan.label_values,
        fingerprint=fingerprint,
        shape=volume.hu.shape,
        spacing=volume.spacing,
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        axcodes=volume.axcodes,
        geometry=geometry,
        slices=tuple(kept),
        # Counted before resizing: a small organ must not vanish from the image-level label.
        organ_pixels=() if mask is None else tuple(int(mask[z].sum()) for z in kept),
    )
    arrays = {"hu.npy": np.stack([geometry.image_to_square(volume.hu[z]) for z in kept])}
    if mask is not None:
        squares = [geometry.mask_to_square(mask[z]) for z in kept]
        arrays["mask.npy"] = np.stack(squares).astype(np.uint8)
    _write_scan(folder, arrays, record)
    return record, True


def _write_scan(folder: pathlib.Path, arrays: dict, record: ScanRecord) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(partial / name, array)
        write_json(partial / "scan.json", record.to_json())
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder}: could not be written ({error}); make room or place the store elsewhere "
            "with --config.data.store=DIR, then run again: finished scans are kept."
        ) from error


def _refuse_other_params(store: pathlib.Path, params: dict) -> None:
    """Two preparations in one folder would mix; the first settings are pinned before any scan."""
    path = store / "params.json"
    if path.exists():
        found = read_json(path)
        differing = sorted(k for k in params | found if params.get(k) != found.get(k))
        if differing:
            listed = ", ".join(f"data.{k}={found.get(k)} (now {params.get(k)})" for k in differing)
            raise UserError(
                f"{store}: prepared with {listed}; delete the folder or place this run's store "
                "elsewhere with --config.data.store=DIR."
            )
    else:
        write_json(path, params)


def _paths(scan: datasets.Scan) -> dict[str, str]:
    label = str(scan.label.resolve()) if scan.label else ""
    return {"image": str(scan.image.resolve()), "label": label}


def _fingerprint(scan: datasets.Scan) -> str:
    paths = [p for p in (scan.image, scan.label) if p]
    stats = [f"{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in paths]
    return " ".join([*stats, *map(str, scan.label_values)])
