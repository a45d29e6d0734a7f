"""Files that appear whole or not at all."""

import contextlib
import json
import os
import pathlib

from sammix_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path beside `path` that takes its place when the block ends well.

    The temporary name keeps the ending, from which writers take the format.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error}); make room or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path, value) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1))


def read_json(path):
    """The JSON in `path`.

    Raises:
      UserError: it is missing, unreadable or no JSON.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file.")
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}).") from error
