"""LoRA on the fused projection: where it starts, what it changes, how it merges."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from sam_cases import TINY, encode, flat, normal, random_params, tiny

from sammix_jax.models.lora import LowRank, add_low_rank, merge_lora
from sammix_jax.models.sam import Sam


def test_lora_starts_as_the_identity():
    model, params, images, _ = tiny()
    pair = LowRank(2, 32).init(jax.random.key(0), jnp.zeros((1, 400)))["params"]
    assert not np.any(pair["b"])
    assert 0.009 < float(jnp.std(pair["a"])) < 0.011

    params = flat(params)
    for path in params:
        if "lora" in path and path.endswith("/b"):
            params[path] = jnp.zeros_like(params[path])
    frozen = {path: leaf for path, leaf in params.items() if "lora" not in path}
    np.testing.assert_array_equal(
        encode(model, traverse_util.unflatten_dict(params, sep="/"), images),
        encode(Sam(TINY), traverse_util.unflatten_dict(frozen, sep="/"), images),
    )


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("q", "k", "v")])
def test_lora_changes_the_named_thirds_alone(targets):
    class Adapted(nn.Module):
        @nn.compact
        def __call__(self, qkv, x):
            return add_low_rank(qkv, x, rank=2, targets=targets, dtype=jnp.float32)

    qkv, x = normal(0, 5, 24), normal(1, 5, 8)
    params = random_params(Adapted(), qkv, x)
    assert set(params) == {f"lora_{target}" for target in targets}
    change = jnp.split(Adapted().apply({"params": params}, qkv, x) - qkv, 3, axis=-1)
    for third, moved in zip("qkv", change, strict=True):
        assert bool(jnp.any(moved)) == (third in targets)


def test_merged_lora_equals_unmerged():
    model, params, images, _ = tiny()
    before = jax.tree.map(np.array, params)
    merged = merge_lora(params)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert not [path for path in flat(merged) if "lora" in path]
    np.testing.assert_allclose(
        encode(Sam(TINY), merged, images), encode(model, params, images), atol=1e-5
    )
