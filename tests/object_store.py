"""An object store in memory, in the place of Google's.

Faked: `gcsfs`, through which `etils.epath` reads and writes `gs://`. The rest of the way, epath and
fsspec, is real. As in a bucket, objects are written whole, never appended or renamed, and a folder
is there as long as some object's name begins with it.
"""

import datetime
import io
import pathlib
from typing import ClassVar

import fsspec
from etils import epath


class ObjectStore(fsspec.AbstractFileSystem):
    """Objects by name, such as `bucket/scans/volume-0.nii.gz`; one store for all instances.

    Attributes:
      objects: content and time by name.
      fetched: names in the order in which they were opened for reading.
      full: names of objects that may not be written.
    """

    protocol = ("gs", "gcs")
    objects: ClassVar[dict[str, tuple[bytes, datetime.datetime]]] = {}
    fetched: ClassVar[list[str]] = []
    full: ClassVar[set[str]] = set()

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        found = {}
        for name, (content, _time) in self.objects.items():
            if name == path:
                found[name] = {"name": name, "size": len(content), "type": "file"}
            elif name.startswith(f"{path}/"):
                child, *below = name.removeprefix(f"{path}/").split("/")
                kind = "directory" if below else "file"
                size = 0 if below else len(content)
                found[f"{path}/{child}"] = {"name": f"{path}/{child}", "size": size, "type": kind}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def modified(self, path):
        return self.objects[self._strip_protocol(path)][1]

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            if path not in self.objects:
                raise FileNotFoundError(path)
            self.fetched.append(path)
            return io.BytesIO(self.objects[path][0])
        if mode == "wb":
            return _Upload(path)
        raise NotImplementedError(f"{path}: objects are not opened with mode {mode}")

    def _rm(self, path):
        if path not in self.objects:
            raise FileNotFoundError(path)
        del self.objects[path]

    def cp_file(self, *_, **__):
        raise NotImplementedError("renaming is copying and removing: no atomic write")

    def mkdir(self, *_, **__):
        raise NotImplementedError("object stores have no folders to be made")

    makedirs = mkdir


class _Upload(io.BytesIO):
    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def close(self):
        if not self.closed:
            if self._name in ObjectStore.full:
                raise OSError(f"quota exceeded: {self._name}")
            now = datetime.datetime.now(datetime.UTC)
            ObjectStore.objects[self._name] = (self.getvalue(), now)
        super().close()


def install() -> None:
    """Empties the store and puts it in the place of every bucket."""
    for name in ObjectStore.protocol:
        fsspec.register_implementation(name, ObjectStore, clobber=True)
    ObjectStore.objects.clear()
    ObjectStore.fetched.clear()
    ObjectStore.full.clear()


def upload(folder: pathlib.Path, target: str) -> epath.Path:
    """Copies a local folder; returns its place in the store."""
    target = epath.Path(target)
    for path in folder.rglob("*"):
        if path.is_file():
            (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    return target
