"""The slice store: every slice of every scan as int16 HU on one square grid, with a manifest.

Layout, below the store's root:
    manifest.json        what was prepared, and how; written last, so a store that has it is whole
    scans/NAME/scan.json what is known of one scan; written last in its folder
    scans/NAME/hu.npy    (D, size, size) int16
    scans/NAME/mask.npy  (D, size, size) uint8, 1 inside the organ; only for labelled scans
"""

import dataclasses
import functools

import numpy as np

from sammix_jax.data.files import LocalCopies, read_json
from sammix_jax.data.geometry import SliceGeometry
from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError

MANIFEST, SCAN = "manifest.json", "scan.json"
HU, MASK = ARRAYS = "hu.npy", "mask.npy"
VERSION = 4


@dataclasses.dataclass(frozen=True)
class ScanRecord:
    """One prepared scan.

    Attributes:
      name, image, label, label_values, ignore_value: as in `datasets.Scan`; paths as strings, label
        "" if none.
      fingerprint: size and modification time of the files, by which a changed scan is noticed.
      image_digest, label_digest: by what they are known again (`digests.py`); "" of no label.
      shape, spacing: (D, H, W) of the canonical volume; mm.
      affine: (4, 4) of the file, row by row.
      axcodes, oriented: the file's orientation, and whether the file itself tells it.
      organ_side: how far to the patient's left of the body's centre the organ's lies, as a part of
        the slice's width; 0 without a mask.
      geometry: from the volume's slices to the store's.
      slices: index of each stored slice in the canonical volume.
      organ_pixels: organ pixels of each stored slice before resizing; empty if there is no label.
      unannotated: positions of the stored slices of which a part, or all, is not annotated.
    """

    name: str
    image: str
    label: str
    label_values: tuple[int, ...]
    fingerprint: str
    image_digest: str
    label_digest: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    axcodes: str
    geometry: SliceGeometry
    slices: tuple[int, ...]
    organ_pixels: tuple[int, ...]
    oriented: bool = True
    organ_side: float = 0.0
    unannotated: tuple[int, ...] = ()
    ignore_value: int | None = None

    @property
    def has_label(self) -> bool:
        return bool(self.label)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "ScanRecord":
        fields = {k: _tuples(v) for k, v in fields.items() if k != "geometry"} | {
            "geometry": SliceGeometry(**{k: _tuples(v) for k, v in fields["geometry"].items()})
        }
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class SliceId:
    """A stored slice: the scan's name and the position in its stored slices."""

    scan: str
    position: int


class SliceStore:
    """Read access to a prepared store; arrays are memory-mapped, a remote store's from copies."""

    def __init__(self, root, params: dict, records: list[ScanRecord]):
        self.root = as_path(root)
        self.params = params
        self.records = {record.name: record for record in records}
        self._copies = LocalCopies()
        # Each mapped array holds a file descriptor, of which a process commonly has 1024.
        self._array = functools.lru_cache(maxsize=256)(self._load)

    @classmethod
    def open(cls, root) -> "SliceStore":
        """Opens a whole store.

        Raises:
          UserError: no manifest there, or one of another version.
        """
        path = as_path(root) / MANIFEST
        if not path.exists():
            raise UserError(f"{path}: no such file; run --mode=prepare first.")
        manifest = read_json(path)
        if not isinstance(manifest, dict) or "version" not in manifest:
            raise UserError(
                f"{path}: no manifest of a slice store; place the store elsewhere with "
                "--config.data.store=DIR."
            )
        if manifest["version"] != VERSION:
            raise UserError(
                f"{path}: a store of version {manifest['version']}, this code reads {VERSION}; "
                "delete the folder and prepare again."
            )
        return cls(root, manifest["params"], [ScanRecord.from_json(s) for s in manifest["scans"]])

    def slices(self, scan: str) -> list[SliceId]:
        return [SliceId(scan, i) for i in range(len(self.records[scan].slices))]

    def image_label(self, slice_id: SliceId) -> int:
        """1 where the slice shows the organ, 0 where it does not, -1 where nobody knows."""
        record = self.records[slice_id.scan]
        if record.has_label and record.organ_pixels[slice_id.position] > 0:
            return 1
        return 0 if self.has_mask(slice_id) else -1

    def has_mask(self, slice_id: SliceId) -> bool:
        """Whether every pixel of the slice is annotated."""
        record = self.records[slice_id.scan]
        return record.has_label and slice_id.position not in record.unannotated

    def hu(self, slice_id: SliceId) -> np.ndarray:
        """(size, size) int16 HU."""
        return self._array(slice_id.scan, HU)[slice_id.position]

    def mask(self, slice_id: SliceId) -> np.ndarray:
        """(size, size) uint8, 1 inside the organ; only for slices with `has_mask`."""
        return self._array(slice_id.scan, MASK)[slice_id.position]

    def _load(self, scan: str, name: str) -> np.ndarray:
        path = self.root / "scans" / scan / name
        local = self._copies(path)
        try:
            return np.load(local, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); delete {self.root} and prepare again."
            ) from error


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
