"""Whatever changes of a scan or of its mask changes what it is known by."""

import numpy as np

from sammix_jax.data.digests import image_digest, label_digest


def test_a_single_voxel_tells_two_images_apart(ct):
    hu = ct.transpose(2, 1, 0)  # a view, as canonical orientation gives it
    known = image_digest(hu)
    assert known == image_digest(hu.copy()) and len(known) == 16
    for place in ((0, 0, 0), (5, 15, 19)):
        other = hu.copy()
        other[place] += 1
        assert image_digest(other) != known
    assert image_digest(hu.reshape(6, 20, 16)) != known


def test_whatever_a_mask_says_tells_it_apart():
    mask = np.zeros((4, 6, 6), bool)
    mask[1:3, 1:3, 1:5] = True
    annotated = np.ones(4, bool)

    def known(affine=None, mask=mask, pixels=None, annotated=annotated):
        affine = np.eye(4) if affine is None else affine
        pixels = mask.sum((1, 2)) if pixels is None else pixels
        return label_digest(affine, mask, pixels, annotated)

    moved = np.eye(4)
    moved[0, 3] = 0.5
    others = [
        known(affine=moved),
        known(mask=mask[:, ::-1]),  # as many pixels in each slice
        known(pixels=np.array([1, 8, 8, 0])),
        known(annotated=np.array([True, True, True, False])),
    ]
    assert len({known(), *others}) == 5
    assert known() == known(mask=mask.copy())
