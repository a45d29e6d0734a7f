"""Conversion as data: which array of theirs is which leaf of ours, and how its axes lie.

A table is read both ways. Expanded over the leaves of a model it is a bijection: each leaf has its
keys, each key its leaf, and whatever is left over on either side is an error that names it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from convert.sources import Cast, Stored
from sammix_jax.errors import UserError
from sammix_jax.weights import list_mistakes


class Axes(NamedTuple):
    """Orders of axes: `ours[i]` is their axis that becomes our axis i, and the reverse."""

    ours: tuple[int, ...] | None
    theirs: tuple[int, ...] | None


_SAME = Axes(None, None)

# Leaf here → (leaf there, axes).
LINEAR = {"kernel": ("weight", Axes((1, 0), (1, 0))), "bias": ("bias", _SAME)}  # (D, C) → (C, D)
# (D, C, H, W) → (H, W, C, D)
CONV = {"kernel": ("weight", Axes((2, 3, 1, 0), (3, 2, 0, 1))), "bias": ("bias", _SAME)}
# (C, D, H, W) → (H, W, C, D)
DECONV = {"kernel": ("weight", Axes((2, 3, 0, 1), (2, 3, 0, 1))), "bias": ("bias", _SAME)}
NORM = {"scale": ("weight", _SAME), "bias": ("bias", _SAME)}
BATCH_NORM = NORM | {"mean": ("running_mean", _SAME), "var": ("running_var", _SAME)}
VALUE = {"": ("", _SAME)}  # the rule names the array itself, not a module


class Rule(NamedTuple):
    """One row of a table.

    Attributes:
      ours: regular expression on the path of a module here, or of an array with `VALUE`.
      theirs: its name there, with `\\1` for the expression's groups; several names where one array
        of ours holds theirs one below the other.
      leaves: LINEAR, CONV, ...: the arrays of such a module.
    """

    ours: str
    theirs: str | tuple[str, ...]
    leaves: Mapping[str, tuple[str, Axes]]


class _Entry(NamedTuple):
    keys: tuple[str, ...]
    axes: Axes


class Table(NamedTuple):
    """The rules of one foreign layout.

    Attributes:
      name: how messages call it.
      marker: a key that every file of this layout has, and no other.
      rules: each leaf of a model matches exactly one.
      ignored: regular expressions of keys that have no place here.
      aliases: second names under which a file may repeat an array, or give it instead.
      tables: regular expression of keys whose shapes go by the size of the images.
    """

    name: str
    marker: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}
    tables: str = r"(?!)"  # none

    def expand(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Entry]:
        """The keys of every leaf of a model.

        Args:
          shapes: the model's flat paths and shapes.

        Raises:
          ValueError: the table itself is at fault: a leaf with no rule or two, a key given twice.
        """
        entries, taken = {}, {}
        for path in shapes:
            found = list(self._match(path))
            if len(found) != 1:
                raise ValueError(f"{self.name}: {len(found)} rules match {path}, expected one.")
            entries[path] = found[0]
            for key in found[0].keys:
                if key in taken:
                    raise ValueError(f"{self.name}: {key} is given to {taken[key]} and {path}.")
                taken[key] = path
        return entries

    def _match(self, path: str) -> Iterator[_Entry]:
        for rule in self.rules:
            for leaf, (their_leaf, axes) in rule.leaves.items():
                match = re.fullmatch(f"{rule.ours}/{leaf}" if leaf else rule.ours, path)
                if match:
                    names = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
                    keys = (match.expand(f"{n}.{their_leaf}" if their_leaf else n) for n in names)
                    yield _Entry(tuple(keys), axes)

    def key_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Their keys and shapes for a model of ours."""
        return {
            key: array.shape
            for path, entry in self.expand(shapes).items()
            for key, array in _split(np.broadcast_to(np.float32(0), shapes[path]), entry)
        }

    def mistakes(
        self, shapes: Mapping[str, tuple[int, ...]], source: Mapping[str, Stored]
    ) -> dict[str, list[str]]:
        """How a file differs from a model: keys missing, unexpected, of another shape."""
        expected = self.key_shapes(shapes)
        present = source.keys() | {key for alias, key in self.aliases.items() if alias in source}
        extra = {
            key
            for key in present - expected.keys() - self.aliases.keys()
            if not any(re.fullmatch(pattern, key) for pattern in self.ignored)
        }
        named = {self.aliases.get(key, key): stored for key, stored in source.items()} | source
        return {
            "missing": sorted(expected.keys() - present),
            "unexpected": sorted(extra),
            "of another shape": [
                f"{key} {named[key].shape}, expected {shape}"
                for key, shape in expected.items()
                if key in named and tuple(named[key].shape) != tuple(shape)
            ],
        }

    def to_ours(
        self,
        path,
        shapes: Mapping[str, tuple[int, ...]],
        source: dict[str, Stored],
        cast: Cast,
    ) -> dict[str, np.ndarray]:
        """Brings a file without mistakes into our layout.

        Args:
          path: the file, for errors.
          shapes: the model's flat paths and shapes.
          source: their key → array; emptied on the way, so that no two copies of a model exist.
          cast: applied to every array, with the name of its key or its first one.

        Returns:
          Path → contiguous array.

        Raises:
          UserError: an array and its alias differ, or `cast` refuses one.
        """
        self._resolve_aliases(path, source)
        arrays = {}
        for leaf, entry in _progress(self.expand(shapes)):
            parts = [_transpose(source.pop(key).load(), entry.axes.ours) for key in entry.keys]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            arrays[leaf] = np.ascontiguousarray(cast(entry.keys[0], whole))
        return arrays

    def to_theirs(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of `to_ours`; `arrays` is emptied on the way."""
        entries = self.expand({path: array.shape for path, array in arrays.items()})
        return {
            key: np.ascontiguousarray(array)
            for path, entry in _progress(entries)
            for key, array in _split(arrays.pop(path), entry)
        }

    def _resolve_aliases(self, path, source: dict[str, Stored]) -> None:
        for alias, key in self.aliases.items():
            if alias not in source:
                continue
            stored = source.pop(alias)
            other = source.setdefault(key, stored)
            if not np.array_equal(other.load(), stored.load()):
                raise UserError(
                    f"{path}: {alias} and {key} differ, but {self.name} has one array for both; "
                    "the file is damaged or of another model."
                )


def recognise(
    path,
    source: Mapping[str, Stored],
    table: Table,
    models: Mapping[str, Callable[[], Mapping[str, tuple[int, ...]]]],
) -> str:
    """Finds the model whose keys and shapes a file has, all of them.

    Args:
      path: the file, for the error.
      source: their key → array.
      table: the file's layout.
      models: name → function that gives the model's paths and shapes.

    Raises:
      UserError: none fits; names the closest and what differs.
    """
    closest = None
    for name, shapes in models.items():
        mistakes = table.mistakes(shapes(), source)
        count = sum(map(len, mistakes.values()))
        if not count:
            return name
        if closest is None or count < closest[0]:
            closest = (count, name, mistakes)
    shaped = closest[2]["of another shape"]
    if len(shaped) == closest[0] and all(re.match(table.tables, key) for key in shaped):
        raise UserError(
            f"{path}: {table.name}, a {closest[1]} with tables of positions for images of another "
            f"size: {list_mistakes(closest[2])}. They are kept at the native size here, and "
            "resized as the model runs; give the model that this one was made from."
        )
    raise UserError(
        f"{path}: {table.name}, but none of {', '.join(models)}. Closest is {closest[1]}: "
        f"{list_mistakes(closest[2])}. The file is incomplete, or of a model that is not here."
    )


def _transpose(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return array if axes is None else array.transpose(axes)


def _split(array: np.ndarray, entry: _Entry) -> Iterator[tuple[str, np.ndarray]]:
    parts = [array] if len(entry.keys) == 1 else np.split(array, len(entry.keys))
    for key, part in zip(entry.keys, parts, strict=True):
        yield key, _transpose(part, entry.axes.theirs)


def _progress(entries: Mapping[str, _Entry]) -> Iterator[tuple[str, _Entry]]:
    return tqdm(entries.items(), desc="convert", unit="array", disable=None)
