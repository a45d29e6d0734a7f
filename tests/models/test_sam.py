"""SAM in Flax without PyTorch: parameters, shapes, prompts, compute type, bad arguments."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from sam_cases import TINY, H, W, answer, encode, equations, flat, random_params, tiny

from sammix_jax.models.lora import merge_lora
from sammix_jax.models.sam import (
    VARIANTS,
    Sam,
    count_parameters,
    get_variant,
    postprocess_masks,
)
from sammix_jax.models.sam.prompt_encoder import PromptEncoder

# Parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_pinned(name):
    sizes = VARIANTS[name]
    image = jax.ShapeDtypeStruct((1, sizes.image_size, sizes.image_size, 3), jnp.float32)
    params = jax.eval_shape(Sam(name).init, jax.random.key(0), image)["params"]
    assert sizes.parameters > 0, f"pin the parameter count of {name}"
    assert count_parameters(params) == sizes.parameters
    if name == "vit_b":
        parts = {part: count_parameters({part: leaves}) for part, leaves in params.items()}
        assert parts == {
            "image_encoder": 89_670_912,
            "prompt_encoder": 6_220,
            "mask_decoder": 4_058_340,
        }


def test_paths_are_named_and_independent_of_prompts():
    model, params, images, prompts = tiny()
    paths = set(flat(params))
    assert {
        "image_encoder/patch_embed/kernel",
        "image_encoder/pos_embed",
        "image_encoder/block_1/attn/qkv/kernel",
        "image_encoder/block_1/attn/rel_pos_h",
        "image_encoder/block_1/attn/lora_q/a",
        "image_encoder/block_1/attn/lora_v/b",
        "image_encoder/block_1/mlp/lin1/kernel",
        "image_encoder/neck/conv1/kernel",
        "prompt_encoder/position_encoding/gaussian_matrix",
        "mask_decoder/transformer/layer_0/self_attn/q_proj/kernel",
    } <= paths
    assert not [path for path in paths if re.search(r"[A-Z]\w*_\d", path) or "lora_k" in path]
    with_prompts = jax.eval_shape(
        lambda: model.init(jax.random.key(0), images, **prompts)["params"]
    )
    assert set(flat(with_prompts)) == paths


def test_gaussian_matrix_gets_no_gradient():
    encoder = PromptEncoder(16)
    prompts = {"points": jnp.ones((1, 1, 2, 2)), "labels": jnp.array([[[0, 1]]])}
    sizes = {"batch_size": 1, "input_size": (8, 16), "grid_size": (2, 4)}

    def loss(params):
        sparse, dense = encoder.apply({"params": params}, **sizes, **prompts)
        return jnp.sum(sparse**2) + jnp.sum(dense**2)

    params = random_params(encoder, **sizes, **prompts)
    gradients = flat(jax.jit(jax.grad(loss))(params))
    assert not np.any(gradients["position_encoding/gaussian_matrix"])
    assert np.any(gradients["point_embeddings"])
    assert np.any(gradients["no_mask_embed"])


# Shapes and prompts


@pytest.mark.parametrize(
    "mix",
    [
        (),
        ("boxes",),
        ("masks",),
        ("points", "labels"),
        ("boxes", "masks"),
        ("points", "labels", "boxes"),
        ("points", "labels", "boxes", "masks"),
    ],
    ids=lambda mix: "+".join(mix) or "none",
)
def test_shapes_for_every_mix_of_prompts(mix):
    model, params, images, prompts = tiny()
    given = {name: prompts[name] for name in mix}
    assert jax.eval_shape(encode, model, params, images).shape == (2, 6, 10, 32)
    logits, iou = jax.eval_shape(answer, model, params, images, given)
    p = 3 if mix else 1
    assert logits.shape == (2, p, 4, 24, 40)
    assert iou.shape == (2, p, 4)
    assert logits.dtype == iou.dtype == jnp.float32


def test_images_and_prompts_together_equal_one_by_one():
    model, params, images, prompts = tiny()
    logits, iou = answer(model, params, images, prompts)
    for b in range(2):
        for p in range(3):
            one = {name: prompt[b : b + 1, p : p + 1] for name, prompt in prompts.items()}
            one_logits, one_iou = answer(model, params, images[b : b + 1], one)
            np.testing.assert_allclose(logits[b, p], one_logits[0, 0], atol=2e-5)
            np.testing.assert_allclose(iou[b, p], one_iou[0, 0], atol=2e-5)


def test_labels_may_be_of_any_type():
    """SAM's padding point is -1, which booleans cannot hold."""
    model, params, images, prompts = tiny()
    points = {"points": prompts["points"], "labels": (prompts["labels"] == 1).astype(jnp.int32)}
    expected, _ = answer(model, params, images, points)
    for dtype in (jnp.bool_, jnp.uint8, jnp.float32):
        found, _ = answer(
            model, params, images, points | {"labels": points["labels"].astype(dtype)}
        )
        np.testing.assert_array_equal(found, expected)


def test_transposed_image_gives_transposed_masks():
    """H and W are treated alike: swap both axes of everything and the answer is swapped."""
    model, params, images, prompts = tiny()
    params = flat(params)
    for path, leaf in list(params.items()):
        if path.endswith("rel_pos_h"):
            other = path.replace("rel_pos_h", "rel_pos_w")
            params[path], params[other] = params[other], leaf
        elif path.endswith("pos_embed"):
            params[path] = leaf.swapaxes(1, 2)
        elif path.endswith("gaussian_matrix"):
            params[path] = leaf[::-1]
        elif path.endswith("kernel") and leaf.ndim == 4:
            params[path] = leaf.swapaxes(0, 1)
    swapped = traverse_util.unflatten_dict(params, sep="/")
    swapped_prompts = {
        "points": prompts["points"][..., ::-1],
        "labels": prompts["labels"],
        "boxes": prompts["boxes"].reshape(2, 3, 2, 2)[..., ::-1].reshape(2, 3, 4),
        "masks": prompts["masks"].swapaxes(2, 3),
    }
    logits, iou = answer(model, tiny()[1], images, prompts)
    turned, turned_iou = answer(model, swapped, images.swapaxes(1, 2), swapped_prompts)
    np.testing.assert_allclose(turned.swapaxes(-1, -2), logits, atol=2e-5)
    np.testing.assert_allclose(turned_iou, iou, atol=2e-5)


def test_padding_points_say_nothing_about_their_place():
    model, params, _, prompts = tiny()

    @jax.jit
    def sparse(points):
        return model.apply(
            {"params": params},
            method=lambda sam: sam.prompt_encoder(
                batch_size=2,
                input_size=(H, W),
                grid_size=(6, 10),
                points=points,
                labels=prompts["labels"],
            )[0],
        )

    padding = (prompts["labels"] == -1)[..., None]
    moved = np.where(padding, 33.0, prompts["points"])
    np.testing.assert_array_equal(sparse(prompts["points"]), sparse(moved))
    assert np.any(sparse(prompts["points"]) != sparse(prompts["points"] + 1))


def test_postprocess_crops_before_the_last_resize():
    ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None], (2, 16, 16))
    out = postprocess_masks(ramp, (48, 64), (30, 50), (64, 64))
    assert out.shape == (2, 30, 50)
    assert out.max() < 12  # the bottom quarter was padding
    np.testing.assert_allclose(out[0, :, 0], out[1, :, 49])


# Compute type


def test_bfloat16_reaches_every_product_but_those_of_coordinates_and_of_estimated_ious():
    _, params, _, prompts = tiny()
    model = Sam(TINY, lora_rank=2, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 64, 64, 3))  # the native size: no table is resized
    prompts = {**prompts, "masks": jnp.zeros((2, 3, 32, 32))}
    fresh = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}

    jaxpr = jax.make_jaxpr(answer, static_argnums=0)(model, params, images, prompts)
    products = [
        [var.aval for var in equation.invars]
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert len(products) > 60
    wide = [avals for avals in products if any(aval.dtype == jnp.float32 for aval in avals)]
    gaussian_matrix, *iou_head = (2, 16), (32, 32), (32, 32), (32, 4)
    assert sorted(avals[1].shape for avals in wide if avals[1].shape != gaussian_matrix) == (
        sorted(iou_head)
    )
    assert any(avals[1].shape == gaussian_matrix for avals in wide)


def test_bfloat16_stays_close():
    model, params, images, prompts = tiny()
    exact, _ = answer(model, params, images, prompts)
    close, iou = answer(Sam(TINY, lora_rank=2, dtype=jnp.bfloat16), params, images, prompts)
    assert close.dtype == iou.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((close - exact) ** 2)) / jnp.std(exact))
    assert 0 < error < 0.05


# Bad arguments


def test_bad_arguments_are_named():
    model, params, images, prompts = tiny()
    embeddings = jnp.zeros((2, 6, 10, 32))

    def decode(input_size=(H, W), **prompts):
        jax.eval_shape(
            lambda: model.apply(
                {"params": params}, embeddings, input_size=input_size, **prompts, method=Sam.decode
            )
        )

    with pytest.raises(ValueError, match=r"vit_x.*mini"):
        get_variant("vit_x")
    with pytest.raises(ValueError, match="50 x 80 is not a multiple of the patch size 8"):
        encode(model, params, jnp.zeros((1, 50, 80, 3)))
    with pytest.raises(ValueError, match=r"expected \(B, H, W, 3\)"):
        encode(model, params, jnp.zeros((48, 80, 3)))
    with pytest.raises(ValueError, match=r"\(80, 48\).*\(48, 80\)"):
        decode(input_size=(W, H))
    with pytest.raises(ValueError, match="points without labels"):
        decode(points=prompts["points"])
    with pytest.raises(
        ValueError, match="2 images with 0 prompts each: there is nothing to answer"
    ):
        decode(boxes=jnp.zeros((2, 0, 4)))
    with pytest.raises(ValueError, match=r"boxes have shape \(2, 4\)"):
        decode(boxes=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"masks have shape .*expected \(2, 3, 24, 40\)"):
        decode(boxes=prompts["boxes"], masks=jnp.zeros((2, 3, 40, 24)))
    with pytest.raises(ValueError, match="rank 2 and targets"):
        encode(Sam(TINY, lora_rank=2, lora_targets=("proj",)), params, images)
    with pytest.raises(ValueError, match="no 'qkv'"):
        merge_lora({"attn": {"lora_q": {"a": jnp.zeros((2, 1)), "b": jnp.zeros((1, 2))}}})
    with pytest.raises(ValueError, match="exceeds encoder_size"):
        postprocess_masks(jnp.zeros((16, 16)), (80, 64), (30, 50), (64, 64))


def test_variants_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["mini"].depth = 1
