"""Scans on disk → slice store: one canonical orientation, one square grid, int16 HU.

Parallel over scans and resumable: a scan is written in a hidden folder and renamed when whole (in
an object store its record is written last), and the manifest comes after all scans. So no
half-written store is ever taken for whole, and a rerun goes on where the last one stopped, also
after a full disk.
"""

import concurrent.futures
import dataclasses
import functools
import json
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from sammix_jax import hosts
from sammix_jax.config_files import differing_fields
from sammix_jax.data import datasets, phantom, volumes
from sammix_jax.data.digests import image_digest, label_digest
from sammix_jax.data.files import read_json, write_json
from sammix_jax.data.geometry import kept_slices
from sammix_jax.data.masks import count_organ_pixels, read_annotation
from sammix_jax.data.paths import Path, absolute, as_path, version
from sammix_jax.data.scan_writer import clear_abandoned, refuse_other_files, write_scan
from sammix_jax.data.sides import organ_side
from sammix_jax.data.slices import (
    HU,
    MANIFEST,
    MASK,
    SCAN,
    VERSION,
    ScanRecord,
    SliceStore,
)
from sammix_jax.data.split_files import SCANS
from sammix_jax.data.store_log import log_store
from sammix_jax.errors import UserError

# Each worker holds a whole scan; more of them wait for the disk and cost gigabytes.
MOST_WORKERS = 8


def prepare(config, workdir) -> SliceStore:
    """Brings the configured scans into the slice store and opens it.

    Args:
      config: the run's config; reads `config.data`.
      workdir: the run's folder; holds the phantom and the store unless the config places them.

    Raises:
      UserError: bad scans or masks, all of them by file; a store of other settings or scans; a full
        disk.
    """
    data = config.data
    root = as_path(data.root) if data.root else _phantom(data, as_path(workdir))
    store = store_folder(config, workdir)
    if store.is_file():
        raise UserError(f"data.store={store}: a file, expected a folder.")
    scans = datasets.find_scans(root, data.organ, tuple(data.label_values), data.ignore_value)
    params = {
        "organ": data.organ,
        "size": data.size,
        "resize": data.resize,
        "central_fraction": data.central_fraction,
        "default_orientation": data.default_orientation,
        # As JSON gives it back.
        "slice_range": [float(end) for end in data.slice_range],
    }
    # Asked for where it is needed, and once: in a bucket each takes two requests.
    fingerprint_of = functools.cache(functools.partial(_fingerprint, params=params))
    begun = (as_path(workdir) / SCANS).exists()
    _refuse_another_store(store, params, scans, fingerprint_of, begun)

    begin = time.monotonic()
    finished = {scan.name: _finished(scan, store, fingerprint_of) for scan in scans}
    missing = [scan for scan in scans if finished[scan.name] is None]
    if missing:
        refuse_other_files(store / "scans" / scan.name for scan in missing)
        # Until all is done again, nobody takes the store for whole.
        (store / MANIFEST).unlink(missing_ok=True)
        clear_abandoned(store)
        workers = data.workers or min(hosts.usable_cores(), MOST_WORKERS)
        finished |= _prepare_scans(missing, store, params, workers)
    records = [finished[scan.name] for scan in scans]
    manifest = {"version": VERSION, "params": params, "scans": [r.to_json() for r in records]}
    # A store that others share may be theirs to write alone.
    if missing or not _holds(store / MANIFEST, manifest):
        write_json(store / MANIFEST, manifest)
    log_store(records, len(missing), time.monotonic() - begin, data.organ, store)
    return SliceStore.open(store)


def store_folder(config, workdir) -> Path:
    """Where the slice store is: `data.store`, or WORKDIR/store."""
    return as_path(config.data.store or as_path(workdir) / "store")


def _phantom(data, workdir: Path) -> Path:
    """The embedded phantom data set, made on first use."""
    made = data.phantom
    if not made.scans:
        raise UserError("data.root is empty: give the folder that holds the scans.")
    # Another phantom is another folder, never a mixture.
    root = workdir / f"phantom-{made.domain}-{made.scans}-{made.unlabelled}-{made.seed}"
    domain = phantom.DOMAINS[made.domain]
    phantom.write_lits(root, made.scans, made.seed, domain, unlabelled=made.unlabelled)
    return root


def _prepare_scans(scans, store: Path, params: dict, workers: int) -> dict:
    """Records by scan name. Every scan is tried; what is wrong with any of them is told at once."""
    records, faults = {}, []
    # Threads: decompression, resizing and writing all release the GIL.
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(scans), desc="prepare", unit="scan", disable=hosts.hides_progress()) as bar,
    ):
        jobs = [pool.submit(_record_or_fault, scan, store, params) for scan in scans]
        try:
            for job in concurrent.futures.as_completed(jobs):
                record, fault = job.result()
                if fault:
                    faults.append(fault)
                else:
                    records[record.name] = record
                bar.update()
        finally:  # whatever ends this: those that have not begun never will
            pool.shutdown(wait=False, cancel_futures=True)
    if faults:
        listed = "\n  ".join(faults[:20])
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(listed if len(faults) == 1 else f"{len(faults)} scans:\n  {listed}{more}")
    return records


def _record_or_fault(scan, store: Path, params: dict) -> tuple[ScanRecord | None, str]:
    """The fault as text: an exception would keep the whole scan in memory."""
    try:
        return _prepare_scan(scan, store, params), ""
    except UserError as error:
        return None, str(error)


def _finished(scan: datasets.Scan, store: Path, fingerprint_of: Callable) -> ScanRecord | None:
    """The record of a scan that is whole in the store and unchanged since."""
    path = store / "scans" / scan.name / SCAN
    if not path.exists():
        return None
    fields = read_json(path)
    if fields["fingerprint"] != fingerprint_of(scan):
        return None
    # The data may have been moved as a whole since.
    record = ScanRecord.from_json(fields)
    return dataclasses.replace(record, **_paths(scan), ignore_value=scan.ignore_value)


def _prepare_scan(scan: datasets.Scan, store: Path, params: dict) -> ScanRecord:
    volume = volumes.read_volume(scan.image, params["default_orientation"])
    depth = volume.hu.shape[0]
    mask, organ_pixels, annotated, known_by = None, (), np.ones(depth, bool), ""
    if scan.label:
        mask, annotated = read_annotation(
            scan.label, volume, scan.label_values, scan.known_values, scan.ignore_value
        )
        organ_pixels = count_organ_pixels(scan.label, mask)
        known_by = label_digest(volume.affine, mask, organ_pixels, annotated)
    fraction, slice_range = params["central_fraction"], params["slice_range"]
    kept = range(depth) if volume.already_cut else kept_slices(depth, fraction, slice_range)
    if not kept:
        raise UserError(
            f"{scan.image}: {depth} slices leave none at data.central_fraction={fraction} and "
            f"data.slice_range={tuple(slice_range)}; keep more of them."
        )
    geometry = volume.geometry(params["size"], params["resize"])
    arrays = {HU: np.stack([geometry.image_to_square(volume.hu[z]) for z in kept])}
    side = 0.0
    if mask is not None:
        squares = [geometry.mask_to_square(mask[z]) for z in kept]
        arrays[MASK] = np.stack(squares).astype(np.uint8)
        side = organ_side(arrays[HU], arrays[MASK])
    record = ScanRecord(
        name=scan.name,
        **_paths(scan),
        label_values=scan.label_values,
        fingerprint=_fingerprint(scan, params),
        image_digest=image_digest(volume.hu),
        label_digest=known_by,
        shape=volume.hu.shape,
        spacing=volume.spacing,
        affine=tuple(tuple(row) for row in volume.affine.tolist()),
        axcodes=volume.axcodes,
        oriented=volume.oriented,
        organ_side=side,
        geometry=geometry,
        slices=tuple(kept),
        # Counted before resizing: a small organ must not vanish from the image-level label.
        organ_pixels=() if mask is None else tuple(int(organ_pixels[z]) for z in kept),
        unannotated=tuple(i for i, z in enumerate(kept) if not annotated[z]),
        ignore_value=scan.ignore_value,
    )
    write_scan(store / "scans" / scan.name, arrays, record)
    return record


def _refuse_another_store(
    store: Path,
    params: dict,
    scans: list[datasets.Scan],
    fingerprint_of: Callable,
    begun: bool,
) -> None:
    """A whole store of other settings or other scans serves another run; it is not replaced, and
    could not be by a run that has `begun` on it."""
    if not (store / MANIFEST).exists():
        return
    found = SliceStore.open(store)
    fix = (
        "the workdir was begun on this: bring it back as it was, or give another --workdir."
        if begun
        else "delete the folder or place this run's store elsewhere with --config.data.store=DIR "
        "(and give another --workdir)."
    )
    made, now = ({f"data.{k}": of.get(k) for k in params} for of in (found.params, params))
    if differing := differing_fields(made, now):
        raise UserError(f"{store}: prepared with {', '.join(differing)}; {fix}")
    vanished = sorted(set(found.records) - {scan.name for scan in scans}, key=datasets.natural)
    if vanished:
        raise UserError(
            f"{store}: holds {len(vanished)} scans that the data set lacks, such as {vanished[0]}; "
            f"{fix}"
        )
    for scan in scans:
        record = found.records.get(scan.name)
        if record and record.fingerprint != fingerprint_of(scan):
            _refuse_another_scan(scan, record, f"{store}: {fix}")


def _refuse_another_scan(scan: datasets.Scan, record: ScanRecord, fix: str) -> None:
    """A file that was replaced in its place is prepared anew; another scan of that name is not, nor
    the same one for other labels: the store's other users do not know of it."""
    wanted = {"label values": scan.label_values, "value to ignore": scan.ignore_value}
    made = {"label values": record.label_values, "value to ignore": record.ignore_value}
    if scan.label and record.label and (differing := differing_fields(made, wanted)):
        raise UserError(f"{scan.name} was prepared with {', '.join(differing)} in {fix}")
    if record.image != str(absolute(scan.image)):
        raise UserError(
            f"{scan.image}: {scan.name} was prepared from another file, {record.image}, in {fix}"
        )


def _holds(path: Path, value) -> bool:
    return path.exists() and read_json(path) == json.loads(json.dumps(value))


def _paths(scan: datasets.Scan) -> dict[str, str]:
    label = str(absolute(scan.label)) if scan.label else ""
    return {"image": str(absolute(scan.image)), "label": label}


def _fingerprint(scan: datasets.Scan, params: dict) -> str:
    """Changes with the files, with how they are prepared, and with what a record holds."""
    try:
        files = [version(path) for path in (scan.image, scan.label) if path]
    except OSError as error:
        raise UserError(f"{scan.image}: cannot be read ({error}); a broken link?") from error
    return json.dumps([VERSION, files, scan.label_values, scan.ignore_value, params])
