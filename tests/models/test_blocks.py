"""Blocks gather their own weights, and their backward pass gathers them anew."""

import re
import types
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AbstractMesh, AxisType
from sam_cases import TINY

from sammix_jax import sharding
from sammix_jax.models.blocks import POLICIES, gather_outside_blocks
from sammix_jax.models.classifier import Classifier
from sammix_jax.models.resnet import OUTPUT_STRIDES
from sammix_jax.models.sam.sam import Sam
from sammix_jax.sharding import on_mesh


@pytest.fixture(autouse=True)
def everything_is_divided(monkeypatch):
    monkeypatch.setattr(sharding, "LEAST_DIVIDED", 1)


def mesh(fsdp: int):
    """Of shapes alone: nothing here is compiled."""
    both = (AxisType.Auto, AxisType.Auto)
    return types.SimpleNamespace(abstract_mesh=AbstractMesh((1, fsdp), sharding.AXES, both))


def model_named(name: str, **fields):
    return Sam(TINY, lora_rank=2, **fields) if name == "sam" else Classifier(name, **fields)


def shapes_of(model):
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images), images


def shape_counts(tree) -> Counter:
    return Counter(leaf.shape for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["sam", *OUTPUT_STRIDES])
@pytest.mark.parametrize("fsdp", [1, 2])
def test_each_leaf_is_gathered_once_where_parameters_lie_in_parts(name, fsdp, monkeypatch):
    model = model_named(name)
    variables, images = shapes_of(model)
    gathered, at_the_top = [], []
    monkeypatch.setattr(sharding, "_gather", lambda leaf: gathered.append(leaf) or leaf)

    def run(variables, images):
        variables = gather_outside_blocks(variables)
        at_the_top.extend(gathered)
        return model.apply(variables, images)

    jax.eval_shape(on_mesh(mesh(fsdp), run), variables, images)
    assert shape_counts(gathered) == (shape_counts(variables["params"]) if fsdp > 1 else {})
    assert fsdp == 1 or 0 < len(at_the_top) < len(gathered)


@pytest.mark.parametrize("name", ["sam", "mini"])
@pytest.mark.parametrize("remat", POLICIES)
def test_with_remat_no_gathered_weight_of_a_block_is_kept(name, remat, capsys):
    model = model_named(name, remat=remat)
    variables, images = shapes_of(model)

    def loss(variables, images):
        found = model.apply(gather_outside_blocks(variables), images)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found))

    print_saved_residuals(on_mesh(mesh(2), loss), variables, images)
    gathered = r"^f32\[([\d,]+)\] output of custom_vjp_call from \S*sharding\.py"
    kept = Counter(re.findall(gathered, capsys.readouterr().out, re.MULTILINE))
    outside = Counter(
        ",".join(map(str, leaf.shape))
        for path, leaf in traverse_util.flatten_dict(variables["params"]).items()
        if not {"block_0", "block_1", *(f"layer{i}_1" for i in range(1, 5))}.intersection(path)
    )
    assert kept and (kept <= outside) == (remat != "none")
