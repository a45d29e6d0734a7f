"""Scans that are scored already, kept so that an evaluation that was cut off goes on."""

import dataclasses
import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from sammix_jax.data.files import local_copy, whole_file
from sammix_jax.data.paths import Path
from sammix_jax.evaluation.results import Example
from sammix_jax.evaluation.scores import Case, Guidance

_LOG = logging.getLogger(__name__)

FOLDER = "so_far"


@dataclasses.dataclass(frozen=True)
class ScoredScan:
    """What is found of one scan.

    Attributes:
      cases: under each protocol, the headline first.
      guidance: what the classifier and its CAM say of it.
      example: a slice of it for the report.
    """

    cases: list[Case]
    guidance: Guidance
    example: Example


class ScoredSoFar:
    """Scored scans in RESULTS/so_far, one file each, for the first process alone.

    A file is named by all that its scores depend on, so that what is found there is right: of other
    settings, another checkpoint, other voxels or another mask there is none.

    Args:
      results: the folder of the results.
      config: the run's.
      step: of the checkpoint that is scored.
    """

    def __init__(self, results: Path, config, step: int | None):
        settings = json.loads(config.to_json())
        settings["evaluate"].pop("batch")  # changes speed alone
        self._folder, self._scored_with = results / FOLDER, [settings, step]

    def load(self, scan: str, digests: Sequence[str]) -> ScoredScan | None:
        """What was found of a scan; None of one that is not scored yet.

        Args:
          scan: its name.
          digests: of its mask and image.
        """
        path = self._path(scan, digests)
        if not path.exists():
            return None
        try:
            with local_copy(path) as local, np.load(local) as file:
                arrays = dict(file)
            told = json.loads(arrays.pop("told").item())
        except (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            _LOG.warning("%s: damaged (%s), so %s is scored again.", path, error, scan)
            return None
        cases = [Case(**case) for case in told["cases"]]
        guidance, example = (
            {field.name: arrays.get(f"{part}.{field.name}") for field in dataclasses.fields(kind)}
            for part, kind in (("guidance", Guidance), ("example", Example))
        )
        example |= {"case": cases[0], "slice": told["slice"]}
        return ScoredScan(cases, Guidance(**guidance), Example(**example))

    def save(self, scored: ScoredScan, digests: Sequence[str]) -> None:
        """Keeps what was found of a scan."""
        parts = (("guidance", scored.guidance), ("example", scored.example))
        arrays = {
            f"{part}.{field}": value
            for part, fields in parts
            for field, value in vars(fields).items()
            if isinstance(value, np.ndarray)
        }
        cases = [dataclasses.asdict(case) for case in scored.cases]
        told = json.dumps({"cases": cases, "slice": scored.example.slice})
        with whole_file(self._path(scored.cases[0].scan, digests)) as partial:
            np.savez_compressed(partial, told=told, **arrays)

    def clear(self) -> None:
        """Takes away the scans of this evaluation, and of others that were cut off here."""
        epath.Path(self._folder).rmtree(missing_ok=True)  # pathlib has none

    def _path(self, scan: str, digests: Sequence[str]) -> Path:
        known = json.dumps([*self._scored_with, scan, *digests], sort_keys=True)
        return self._folder / f"{hashlib.sha256(known.encode()).hexdigest()[:24]}.npz"
