"""Which scans are drawn to be scored, and how they are read."""

import numpy as np
import pytest

from sammix_jax.config import default_config
from sammix_jax.data import datasets
from sammix_jax.errors import UserError
from sammix_jax.evaluation import scans as scans_module
from sammix_jax.evaluation.scans import draw_scans, read_labelled


@pytest.fixture
def drawn_from(write_scan, ct):
    """Eleven scans of which two have a mask without the organ."""
    for n in range(11):
        mask = np.zeros(ct.shape, np.uint8)
        mask[4:9, 4:9, 2:4] = n not in (3, 7)
        write_scan(f"scans/volume-{n}.nii", ct)
        label = write_scan(f"scans/segmentation-{n}.nii", mask)
    config = default_config()
    config.evaluate.root = str(label.parent)
    config.evaluate.scans = 4
    return datasets.find_scans(label.parent, "liver"), config


def test_a_draw_is_of_scans_that_show_the_organ(drawn_from):
    scans, config = drawn_from
    draws = []
    for seed in range(8):
        config.evaluate.seed = seed
        drawn, faults = draw_scans(scans, config)
        names = [scan.name for scan in drawn]
        assert len(set(names)) == 4 and not faults
        assert names == sorted(names, key=datasets.natural)
        assert draw_scans(scans[::-1], config)[0] == drawn  # whatever the order on disk
        draws.append(tuple(names))
    chosen = {name for names in draws for name in names}
    assert chosen == {f"volume-{n}" for n in range(11)} - {"volume-3", "volume-7"}
    assert len(set(draws)) > 4


def test_a_draw_of_more_than_there_are(drawn_from):
    scans, config = drawn_from
    config.evaluate.scans = 9
    assert len(draw_scans(scans, config)[0]) == 9
    config.evaluate.scans = 10
    with pytest.raises(UserError, match=r"evaluate\.scans=10: only 9 of the 11 labelled scans"):
        draw_scans(scans, config)
    scans[0].label.write_bytes(b"no mask")
    with pytest.raises(UserError, match=r"only 8 of the 11(.|\n)*segmentation-0"):
        draw_scans(scans, config)


def test_a_draw_passes_over_what_cannot_be_read(drawn_from):
    scans, config = drawn_from
    config.evaluate.scans = 9
    scans[0].label.write_bytes(b"no mask")
    config.evaluate.scans = 8
    drawn, faults = draw_scans(scans, config)
    assert "volume-0" not in [scan.name for scan in drawn] and len(drawn) == 8
    assert len(faults) == 1 and "segmentation-0" in faults[0]


def test_a_draw_passes_over_what_another_process_cannot_read(drawn_from, monkeypatch):
    """Or each would score others."""
    scans, config = drawn_from

    def for_all(read, what, for_all=scans_module.hosts.for_all):
        return (None, "elsewhere") if what == scans[0].image else for_all(read, what)

    monkeypatch.setattr(scans_module.hosts, "for_all", for_all)
    config.evaluate.scans = 8
    drawn, faults = draw_scans(scans, config)
    assert "volume-0" not in [scan.name for scan in drawn] and faults == ["elsewhere"]


def test_kept_slices_are_those_of_preparing(drawn_from):
    scans, config = drawn_from
    assert read_labelled(scans[0], config).kept == range(6)
    config.data.slice_range = (0.5, 1.0)
    assert read_labelled(scans[0], config).kept == range(3, 6)
    config.data.slice_range = (0.0, 1.0)
    config.data.central_fraction = 0.5
    assert read_labelled(scans[0], config).kept == range(2, 3)


def test_slices_of_hdf5_are_kept_already(write_hdf5):
    """Files that hold the central slices alone, with image-level labels of their own."""
    (scan,) = datasets.find_scans(write_hdf5("a.h5").parent, "liver")
    config = default_config()
    config.data.central_fraction = 0.3
    known = read_labelled(scan, config)
    assert known.kept == range(6)
    assert (known.organ_pixels > 0).tolist() == [False, False, True, True, True, True]
    assert not known.volume.has_spacing
