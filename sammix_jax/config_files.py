"""The config of a workdir: what of it is pinned, and how it is read again."""

import json
from collections.abc import Iterable

import ml_collections
from flax.traverse_util import flatten_dict

from sammix_jax.config import default_config
from sammix_jax.data.files import read_object, write_json
from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError

# What may differ between the run that made a workdir and a later use of it: where things lie and
# how results are reported, never what was trained or how images are normalised.
FREE_FIELDS = ("data.root", "data.store", "data.workers", "evaluate", "log", "checkpoint", "mesh")

# What tells of the scans alone that are predicted, or scored from another folder.
SCAN_FIELDS = ("data.default_orientation",)

# How a slice becomes the network's input. Kept with the checkpoints, and by them.
PREPROCESSING_FIELDS = (
    "data.organ",
    "data.size",
    "data.resize",
    "input.window",
    "input.scaling",
    "input.normalise",
    "model.image_size",
)


def claim_workdir(config, workdir) -> None:
    """Pins the config to its workdir, once all of it is known to be sound."""
    check_workdir(config, workdir)
    path = as_path(workdir) / "config.json"
    if not path.exists():
        write_json(path, json.loads(config.to_json()))


def check_workdir(config, workdir, other_scans: bool = False) -> None:
    """Checks that the workdir is this config's, or nobody's yet.

    Args:
      other_scans: whether the config is to be used on scans other than the workdir's.

    Raises:
      UserError: the workdir belongs to another config; names the differing fields.
    """
    path = as_path(workdir) / "config.json"
    if not path.exists():
        return
    saved, given = (pinned(json.loads(c.to_json())) for c in (load_config(workdir), config))
    for field in SCAN_FIELDS if other_scans else ():
        saved[field] = given[field]
    if differing := differing_fields(saved, given):
        on = " (--config.model.start_from of this one trains its model on)" * (not other_scans)
        raise UserError(
            f"{path}: this workdir was made with {', '.join(differing)}; give another --workdir"
            f"{on}, or the same settings."
        )


def differing_fields(before: dict, now: dict) -> list[str]:
    """The fields in which two flat dicts differ, each as `field=before (now other)`, by name."""
    return [
        f"{field}={before.get(field)} (now {now.get(field)})"
        for field in sorted(before | now)
        if before.get(field) != now.get(field)
    ]


def pinned(fields: dict) -> dict:
    """What of a config, as JSON has it, one workdir cannot have twice; flat."""
    return {
        field: value for field, value in flatten_dict(fields, sep=".").items() if not is_free(field)
    }


def is_free(field: str, free: Iterable[str] = FREE_FIELDS) -> bool:
    """Whether a field is among those that may differ, or within one of their sections."""
    return any(field == name or field.startswith(f"{name}.") for name in free)


def preprocessing(fields: dict) -> dict:
    """The values of `PREPROCESSING_FIELDS` in a config as JSON has it."""
    flat = flatten_dict(fields, sep=".")
    return {field: flat.get(field) for field in PREPROCESSING_FIELDS}


def load_config(workdir) -> ml_collections.ConfigDict:
    """The config that a workdir was made with.

    Raises:
      UserError: no run there.
    """
    path = as_path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a training run.")
    return read_config(path)


def read_config(path) -> ml_collections.ConfigDict:
    """The config in a JSON file; a field that came since has its default, as the run had.

    Raises:
      UserError: the file cannot be read, or has a field that is not known.
    """
    config = default_config()
    _update(config, read_object(path), path)
    return config


def overlay(config, said) -> None:
    """Sets in `config` what another config has a value for; what that has as None stays as it is.

    Raises:
      KeyError, TypeError: a field that `config` has not, or a value of another type.
    """
    fields = flatten_dict(said.to_dict(), sep=".")
    config.update_from_flattened_dict({k: v for k, v in fields.items() if v is not None})


def _update(config, fields: dict, path, above: str = "") -> None:
    for key, value in fields.items():
        name = f"{above}{key}"
        if key not in config:
            raise UserError(f"{path}: unknown field {name}; it was written by another version.")
        known = config[key]
        is_section = isinstance(known, ml_collections.ConfigDict)
        kind = "a section" if is_section else f"a value such as {known!r}"
        wrong = f"{path}: {name}={value!r}, expected {kind}; bring back the file as it was."
        if is_section != isinstance(value, dict) or (value is None and known is not None):
            raise UserError(wrong)
        if is_section:
            _update(known, value, path, f"{name}.")
            continue
        try:
            config[key] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise UserError(wrong) from error
