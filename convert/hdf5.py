"""Writes a slice store in the form of the authors' preprocessed files.

python -m convert.hdf5 --input=STORE --output=DIR

The store must have been prepared under the paper preset (data.resize="paper", data.size=256), whose
arithmetic is the authors'. Each scan that is annotated throughout becomes DIR/NAME.h5
(`sammix_jax/data/hdf5.py` tells its parts), its slices numbered as in the scan. DIR can then be a
data.root or an evaluate.root.
"""

from absl import flags
from tqdm import tqdm

from convert.program import run
from sammix_jax.data import hdf5, paper
from sammix_jax.data.files import whole_file
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.slices import SliceStore
from sammix_jax.errors import UserError


def convert(store, output) -> tuple[int, int]:
    """Converts a store.

    Args:
      store: the folder of a whole slice store.
      output: folder for the files; those of an interrupted conversion are written again.

    Returns:
      How many scans were written, and how many were left out for want of a whole mask: the form
      has no way to say that a part is not annotated.

    Raises:
      UserError: no store, one of another arithmetic or without whole masks, other HDF5 files in the
        output, or no room. Files that are there are whole.
    """
    output = as_path(output)
    h5py = hdf5.import_h5py(output)
    store = SliceStore.open(store)
    _check_arithmetic(store)
    names = [
        n for n, record in store.records.items() if record.has_label and not record.unannotated
    ]
    if not names:
        raise UserError(f"{store.root}: no scan there has a whole mask, which every file needs.")
    _check_output(output, {f"{name}.h5" for name in names})
    for name in tqdm(names, desc="convert", unit="scan", disable=None):
        with whole_file(output / f"{name}.h5") as partial:
            try:
                with h5py.File(partial, "w") as file:
                    _write_scan(file, store, name)
            except RuntimeError as error:  # how HDF5 reports a disk that fills as it closes
                raise OSError(str(error)) from error
    return len(names), len(store.records) - len(names)


def _write_scan(file, store: SliceStore, name: str) -> None:
    for index, slice_id in zip(store.records[name].slices, store.slices(name), strict=True):
        group = file.create_group(hdf5.group_name(index))
        image, mask = paper.scale(store.hu(slice_id)), store.mask(slice_id)
        group.create_dataset(hdf5.IMAGE, data=image, compression="gzip")
        group.create_dataset(hdf5.MASK, data=mask, compression="gzip")
        group.attrs[hdf5.IMAGE_LABEL] = store.image_label(slice_id)


def _check_arithmetic(store: SliceStore) -> None:
    found = {field: store.params[field] for field in ("resize", "size")}
    if found != {"resize": "paper", "size": paper.SIZE}:
        raise UserError(
            f"{store.root}: prepared with data.resize={found['resize']}, "
            f"data.size={found['size']}; expected data.resize=paper, data.size={paper.SIZE}, as "
            "configs/lits.py sets them for --mode=prepare."
        )


def _check_output(output: Path, names: set[str]) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; expected a folder.")
    found = (path.name for path in output.glob("*") if hdf5.is_hdf5(path))
    # Hidden ones are what a killed conversion leaves behind; nobody takes them for scans.
    strangers = sorted(name for name in found if name not in names and not name.startswith("."))
    if strangers:
        raise UserError(
            f"{output}: holds {strangers[:5]}, which would pass for scans of this data set; give a "
            "new folder."
        )


def main(given: flags.FlagValues) -> list[str]:
    written, without = convert(given.input, given.output)
    left_out = f", {without} without a whole mask left out" if without else ""
    return [f"{given.output}: {written} scans{left_out}"]


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "A slice store, such as WORKDIR/store.", required=True)
    flags.DEFINE_string("output", None, "The folder to write into.", required=True)
    run(main)
