"""The tables are bijections, for every model; what is left over is named. No torch needed."""

import re

import numpy as np
import pytest
from weight_arrays import assert_equal, random_arrays

from convert.classifier_rules import CLASSIFIERS, RESNET38D, TORCHVISION, classifier_shapes
from convert.hf_rules import HUGGING_FACE
from convert.rules import CONV, Rule, recognise
from convert.sam_rules import OFFICIAL, SAM_MODELS, sam_shapes
from convert.sources import Stored, caster
from sammix_jax.errors import UserError
from sammix_jax.models.sam.variants import VARIANTS

KEEP = caster("", None)


def store(arrays):
    return {key: Stored(array.shape, lambda a=array: a) for key, array in arrays.items()}


@pytest.mark.parametrize("table", [OFFICIAL, HUGGING_FACE], ids=["official", "hf"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_covered(variant, table):
    shapes = sam_shapes(variant)
    keys = table.key_shapes(shapes)  # raises where a leaf has no rule or two, or a key two leaves
    assert len(keys) == len(shapes) + 3  # one array of ours holds the four point embeddings
    gaussian = VARIANTS[variant].prompt_dim
    assert sum(map(np.prod, keys.values())) == VARIANTS[variant].parameters + gaussian
    assert table.marker in keys


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_every_classifier_is_covered(arch):
    table, shapes = CLASSIFIERS[arch]
    keys = table.key_shapes(shapes())
    # torchvision's state dicts have 122, 218 and 320 entries: less the head and the batch counters.
    expected = {"resnet18": 100, "resnet34": 180, "resnet50": 265, "resnet38": 43 + 37 * 4}
    assert table.marker in keys
    assert len(keys) == expected[arch]


@pytest.mark.parametrize("table", [OFFICIAL, HUGGING_FACE], ids=["official", "hf"])
def test_round_trip_is_bit_equal(table):
    shapes = sam_shapes("mini")
    ours = random_arrays(shapes)
    theirs = table.to_theirs(dict(ours))
    assert {k: v.shape for k, v in theirs.items()} == table.key_shapes(shapes)
    source = store(theirs)
    assert_equal(table.to_ours("", shapes, source, KEEP), ours)
    assert not source  # every key was used, and let go


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_classifier_round_trip_is_bit_equal(arch):
    shapes = classifier_shapes(arch)
    ours = random_arrays(shapes)
    assert_equal(
        TORCHVISION.to_ours("", shapes, store(TORCHVISION.to_theirs(dict(ours))), KEEP), ours
    )


def test_known_names():
    keys = RESNET38D.key_shapes(classifier_shapes("resnet38"))
    assert keys["conv1a.weight"] == (64, 3, 3, 3)
    assert keys["b2.conv_branch1.weight"] == (128, 64, 1, 1)
    assert keys["b4_5.bn_branch2b1.running_var"] == (512,)
    assert keys["b5_2.conv_branch2b1.weight"] == (1024, 512, 3, 3)
    assert keys["b6.bn_branch2b2.running_mean"] == (1024,)
    assert keys["b7.conv_branch2b2.weight"] == (4096, 2048, 1, 1)
    assert keys["bn7.bias"] == (4096,)
    assert "b2_1.conv_branch1.weight" not in keys and "b6_1.conv_branch1.weight" not in keys
    keys = TORCHVISION.key_shapes(classifier_shapes("resnet50"))
    assert keys["layer3.5.conv3.weight"] == (1024, 256, 1, 1)
    assert keys["layer1.0.downsample.1.running_var"] == (256,)


def test_differences_are_listed():
    shapes = sam_shapes("mini")
    source = store(OFFICIAL.to_theirs(random_arrays(shapes)))
    del source["mask_decoder.iou_token.weight"]
    source["mask_decoder.hf_token.weight"] = source["mask_decoder.mask_tokens.weight"]
    source["image_encoder.neck.1.bias"] = Stored((3,), lambda: np.zeros(3))
    with pytest.raises(UserError) as error:
        recognise("x.pth", source, OFFICIAL, SAM_MODELS)
    text = str(error.value)
    assert text.startswith("x.pth: a SAM in the official layout, but none of mini, vit_b, vit_l")
    assert "Closest is mini" in text
    assert "1 missing (mask_decoder.iou_token.weight)" in text
    assert "1 unexpected (mask_decoder.hf_token.weight)" in text
    assert "1 of another shape (image_encoder.neck.1.bias (3,), expected (128,))" in text


def test_an_alias_may_repeat_or_replace_but_not_contradict():
    shapes = sam_shapes("mini")
    theirs = HUGGING_FACE.to_theirs(random_arrays(shapes))
    ((alias, key),) = HUGGING_FACE.aliases.items()
    matrix = theirs[key]
    repeated = theirs | {alias: matrix}
    replaced = {k: v for k, v in repeated.items() if k != key}
    for arrays in (repeated, replaced):
        source = store(arrays)
        assert recognise("x", source, HUGGING_FACE, SAM_MODELS) == "mini"
        ours = HUGGING_FACE.to_ours("", shapes, source, KEEP)
        np.testing.assert_array_equal(
            ours["prompt_encoder/position_encoding/gaussian_matrix"], matrix
        )
    with pytest.raises(UserError, match=f"{re.escape(alias)} and .* differ"):
        HUGGING_FACE.to_ours("given", shapes, store(theirs | {alias: matrix + 1}), KEEP)


def test_a_faulty_table_is_caught():
    doubled = OFFICIAL._replace(
        rules=(*OFFICIAL.rules, Rule("image_encoder/patch_embed", "x", CONV))
    )
    with pytest.raises(ValueError, match="2 rules match image_encoder/patch_embed"):
        doubled.expand(sam_shapes("mini"))
    with pytest.raises(ValueError, match="0 rules match head/kernel"):
        OFFICIAL.expand({"head/kernel": (2, 2)})
