"""Scans that are scored already, kept so that an evaluation that was cut off goes on."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from sammix_jax import hosts
from sammix_jax.data.files import local_copy, whole_file
from sammix_jax.data.paths import Path
from sammix_jax.evaluation.results import Example
from sammix_jax.evaluation.scores import Case, Guidance

_LOG = logging.getLogger(__name__)

FOLDER = "so_far"
# Of how scans are predicted and scored: to be raised where that changes, so that no evaluation
# goes on with scores of another kind.
VERSION = 1


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
    settings, another model, other voxels or another mask there is none.

    Args:
      results: the folder of the results.
      config: the run's.
      model: `model_digest` of what is scored.
    """

    def __init__(self, results: Path, config, model: str):
        settings = json.loads(config.to_json())
        settings["evaluate"].pop("batch")  # changes speed alone
        fields = [
            field.name for kind in (Case, Guidance, Example) for field in dataclasses.fields(kind)
        ]
        self._folder, self._scored_with = results / FOLDER, [VERSION, fields, settings, model]

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
                return _unpacked(dict(file))
        except Exception as error:  # whatever NumPy and zipfile make of a damaged file
            _LOG.warning("%s: damaged (%s), so %s is scored again.", path, error, scan)
            return None

    def save(self, scored: ScoredScan, digests: Sequence[str]) -> None:
        """Keeps what was found of a scan."""
        with whole_file(self._path(scored.cases[0].scan, digests)) as partial:
            np.savez_compressed(partial, **_packed(scored))

    def clear(self) -> None:
        """Takes away the scans of this evaluation, and of others that were cut off here."""
        epath.Path(self._folder).rmtree(missing_ok=True)  # pathlib has none

    def _path(self, scan: str, digests: Sequence[str]) -> Path:
        known = json.dumps([*self._scored_with, scan, *digests], sort_keys=True)
        return self._folder / f"{hashlib.sha256(known.encode()).hexdigest()[:24]}.npz"


def model_digest(variables: dict) -> str:
    """Of a model's values, by which it is known however it was made; all processes must ask."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(hosts.to_host(variables)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _packed(scored: ScoredScan) -> dict[str, np.ndarray]:
    """Arrays by name; "told" is JSON of all else, the others' names among it."""
    parts = (("guidance", scored.guidance), ("example", scored.example))
    arrays = {
        f"{part}.{field}": value
        for part, fields in parts
        for field, value in vars(fields).items()
        if isinstance(value, np.ndarray)
    }
    told = {
        "cases": [dataclasses.asdict(case) for case in scored.cases],
        "slice": scored.example.slice,
        "arrays": sorted(arrays),
    }
    return arrays | {"told": np.array(json.dumps(told))}


def _unpacked(arrays: dict[str, np.ndarray]) -> ScoredScan:
    told = json.loads(arrays.pop("told").item())
    if sorted(arrays) != told["arrays"]:
        raise ValueError(f"holds {', '.join(sorted(arrays))}")
    cases = [Case(**case) for case in told["cases"]]
    guidance, example = (
        {field.name: arrays.get(f"{part}.{field.name}") for field in dataclasses.fields(kind)}
        for part, kind in (("guidance", Guidance), ("example", Example))
    )
    example |= {"case": cases[0], "slice": told["slice"]}
    return ScoredScan(cases, Guidance(**guidance), Example(**example))
