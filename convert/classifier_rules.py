"""Classifiers with ImageNet weights: torchvision's and timm's ResNets, and resnet38d."""

import functools

import jax
import jax.numpy as jnp
from flax import traverse_util

from convert.rules import BATCH_NORM, CONV, Rule, Table
from sammix_jax.models.classifier import Classifier

_MAX_DEPTH = 6  # blocks in the longest stage

# timm keeps torchvision's names for these three.
TORCHVISION = Table(
    name="a ResNet in torchvision's layout",
    marker="layer1.0.conv1.weight",
    rules=(
        Rule("trunk/conv1", "conv1", CONV),
        Rule("trunk/bn1", "bn1", BATCH_NORM),
        *(
            rule
            for i in range(_MAX_DEPTH)
            for rule in (
                Rule(rf"trunk/layer(\d)_{i + 1}/conv(\d)", rf"layer\1.{i}.conv\2", CONV),
                Rule(rf"trunk/layer(\d)_{i + 1}/bn(\d)", rf"layer\1.{i}.bn\2", BATCH_NORM),
                Rule(rf"trunk/layer(\d)_{i + 1}/projection", rf"layer\1.{i}.downsample.0", CONV),
                Rule(
                    rf"trunk/layer(\d)_{i + 1}/projection_bn",
                    rf"layer\1.{i}.downsample.1",
                    BATCH_NORM,
                ),
            )
        ),
    ),
    ignored=(r"fc\..*", r".*\.num_batches_tracked"),
)


def _resnet38_rules():
    yield Rule("trunk/conv1a", "conv1a", CONV)
    yield Rule("trunk/bn", "bn7", BATCH_NORM)
    for i in range(_MAX_DEPTH):
        block = rf"trunk/b(\d)_{i + 1}"
        name = r"b\1" if i == 0 else rf"b\1_{i}"
        for j, branch in enumerate(("2a", "2b1", "2b2"), 1):
            yield Rule(f"{block}/bn{j}", f"{name}.bn_branch{branch}", BATCH_NORM)
            yield Rule(f"{block}/conv{j}", f"{name}.conv_branch{branch}", CONV)
        yield Rule(f"{block}/projection", f"{name}.conv_branch1", CONV)


RESNET38D = Table(
    name="a ResNet-38 in resnet38d's layout",
    marker="b2.conv_branch2a.weight",
    rules=tuple(_resnet38_rules()),
    # Heads of ImageNet and of the weakly supervised literature.
    ignored=(r"(fc|fc8|f8_\d|f9)\..*", r".*\.num_batches_tracked"),
)


@functools.cache
def classifier_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Flat paths and shapes of the trunk: parameters, and the statistics of BatchNorm."""
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(Classifier(arch).init, jax.random.key(0), images)
    leaves = {
        **traverse_util.flatten_dict(variables["params"], sep="/"),
        **traverse_util.flatten_dict(variables["batch_stats"], sep="/"),
    }
    return {p: tuple(leaf.shape) for p, leaf in leaves.items() if p.startswith("trunk/")}


# Each layout, and the architectures that come in it.
CLASSIFIERS = {
    arch: (table, functools.partial(classifier_shapes, arch))
    for table, archs in (
        (TORCHVISION, ("resnet18", "resnet34", "resnet50")),
        (RESNET38D, ("resnet38",)),
    )
    for arch in archs
}
