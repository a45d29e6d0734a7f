"""SAM in Flax against the official PyTorch model, from the layers up, at random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_cases import normal
from torch_port import build, decode_theirs, encode_theirs, from_torch, official, port, to_torch

from sammix_jax.models.sam import VARIANTS, Sam, SamVariant, postprocess_masks
from sammix_jax.models.sam.image_encoder import Block, ImageEncoder, Neck
from sammix_jax.models.sam.layers import Mlp
from sammix_jax.models.sam.mask_decoder import TokenAttention, TwoWayBlock, Upscale

torch = pytest.importorskip("torch", reason="parity needs torch (requirements/parity.txt)")
try:
    official()
except ImportError:
    pytest.skip("parity needs segment-anything (requirements/parity.txt)", allow_module_level=True)

pytestmark = pytest.mark.torch

SMALL = SamVariant(
    image_size=96,
    patch_size=8,
    embed_dim=64,
    depth=3,
    num_heads=4,
    global_blocks=(1,),
    window_size=5,
    parameters=0,
    prompt_dim=32,
    decoder_mlp_dim=64,
    decoder_heads=4,
)
GRID = (6, 10)  # of a 48 x 80 input; the native grid is 12 x 12
FAINT = 0.02  # scale of inputs so small that a wrong LayerNorm epsilon shows


@pytest.fixture(scope="module")
def small():
    model = build(SMALL, GRID)
    return model, port(model.state_dict())


def apply(module, params, *args, **kwargs):
    return jax.jit(functools.partial(module.apply, **kwargs))({"params": params}, *args)


def close(ours, theirs, relative=1e-5, what=""):
    """Largest difference within `relative` times the largest value."""
    theirs = np.asarray(theirs)
    scale = np.abs(theirs).max()
    error = np.abs(np.asarray(ours) - theirs).max()
    print(f"{what}: max abs error {error:.2e} on values up to {scale:.2f}")
    assert ours.shape == theirs.shape
    assert error <= relative * scale


# Image encoder


def test_every_weight_has_one_place(small):
    _, params = small
    shapes = jax.eval_shape(Sam(SMALL).init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


@pytest.mark.parametrize("index", [0, 1], ids=["window with padding", "global, table resized"])
def test_block(small, index):
    model, params = small
    x = FAINT * normal(index, 2, *GRID, 64)
    theirs = model.image_encoder.blocks[index]
    params = params["image_encoder"][f"block_{index}"]
    sides = {"window_size": 0 if index else 5, "table_side": 12 if index else 5}
    close(apply(Block(4, **sides), params, x), theirs(torch.from_numpy(x)), what="block")
    close(
        apply(Block(4, **sides, query_chunk=7), params, x),
        theirs(torch.from_numpy(x)),
        what="block in chunks",
    )


def test_neck(small):
    model, params = small
    x = FAINT * normal(0, 2, *GRID, 64)
    theirs = from_torch(model.image_encoder.neck(to_torch(x)))
    close(apply(Neck(32), params["image_encoder"]["neck"], x), theirs, what="neck")


def test_patch_embedding(small):
    model, params = small
    images = normal(0, 2, 48, 80, 3)
    _, state = apply(
        ImageEncoder(SMALL),
        params["image_encoder"],
        images,
        capture_intermediates=lambda module, _: module.name == "patch_embed",
    )
    (ours,) = state["intermediates"]["patch_embed"]["__call__"]
    close(ours, model.image_encoder.patch_embed(to_torch(images)), what="patch embedding")


@pytest.mark.parametrize("grid", [(12, 12), GRID, (20, 13)], ids=["native", "smaller", "larger"])
def test_encoder(small, grid):
    """Away from the native grid, the official encoder gets its position embedding resized."""
    model, params = small
    encoder = model.image_encoder
    images = normal(0, 2, grid[0] * 8, grid[1] * 8, 3)
    native = encoder.pos_embed
    if grid != (12, 12):
        resized = torch.nn.functional.interpolate(
            native.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False
        )
        encoder.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1), requires_grad=False)
    try:
        theirs = from_torch(encoder(to_torch(images)))
    finally:
        encoder.pos_embed = native
    ours = apply(ImageEncoder(SMALL), params["image_encoder"], images)
    close(ours, theirs, what=f"encoder on {grid}")


# Prompt encoder


def prompts(seed, p, n, grid, patch):
    """P prompts for one image: points, labels, boxes and masks as arrays (P, ...)."""
    rng = np.random.default_rng(seed)
    h, w = grid[0] * patch, grid[1] * patch
    corners = np.sort(rng.uniform(size=(p, 2, 2)), axis=1) * (w, h)
    return {
        "points": (rng.uniform(size=(p, n, 2)) * (w, h)).astype(np.float32),
        "labels": rng.integers(-1, 2, size=(p, n)),
        "boxes": corners.reshape(p, 4).astype(np.float32),
        "masks": normal(seed, p, 4 * grid[0], 4 * grid[1]),
    }


MIXES = {
    "none": (),
    "points": ("points", "labels"),
    "box": ("boxes",),
    "mask": ("masks",),
    "points and box": ("points", "labels", "boxes"),
    "all": ("points", "labels", "boxes", "masks"),
}


@pytest.mark.parametrize("mix", MIXES)
def test_prompt_encoder(small, mix):
    model, params = small
    given = {name: prompts(1, 3, 4, GRID, 8)[name] for name in MIXES[mix]}

    def encode(sam):
        return sam.prompt_encoder(
            batch_size=1,
            input_size=(48, 80),
            grid_size=GRID,
            **{name: jnp.asarray(value)[None] for name, value in given.items()},
        )

    sparse, dense = apply(Sam(SMALL), params, method=encode)
    their_sparse, their_dense = encode_theirs(model, given)
    assert sparse.shape[1:] == tuple(their_sparse.shape)
    if sparse.size:
        close(sparse[0], their_sparse, what=f"sparse, {mix}")
    close(dense[0], from_torch(their_dense), what=f"dense, {mix}")


def test_dense_position(small):
    model, params = small
    ours = apply(Sam(SMALL), params, method=lambda sam: sam.prompt_encoder.dense_position(GRID))
    close(ours[None], from_torch(model.prompt_encoder.get_dense_pe()), what="dense position")


# Mask decoder


def test_token_attention(small):
    model, params = small
    q, k, v = normal(0, 1, 2, 7, 32), normal(1, 1, 2, 60, 32), normal(2, 1, 2, 60, 32)
    transformer = model.mask_decoder.transformer
    theirs = transformer.final_attn_token_to_image(*(torch.from_numpy(x[0]) for x in (q, k, v)))
    params = params["mask_decoder"]["transformer"]["final_attn_token_to_image"]
    close(apply(TokenAttention(4, 16), params, q, k, v)[0], theirs, what="token attention")


@pytest.mark.parametrize("index", [0, 1])
def test_two_way_block(small, index):
    model, params = small
    tokens, token_pe = FAINT * normal(0, 1, 2, 7, 32), FAINT * normal(1, 1, 2, 7, 32)
    image, image_pe = FAINT * normal(2, 1, 2, 60, 32), normal(3, 60, 32)
    theirs = model.mask_decoder.transformer.layers[index](
        torch.from_numpy(tokens[0]),
        torch.from_numpy(image[0]),
        torch.from_numpy(token_pe[0]),
        torch.from_numpy(image_pe)[None],
    )
    ours = apply(
        TwoWayBlock(4, 64, first=index == 0),
        params["mask_decoder"]["transformer"][f"layer_{index}"],
        tokens,
        image,
        token_pe,
        image_pe,
    )
    close(ours[0][0], theirs[0], what="tokens")
    close(ours[1][0], theirs[1], what="image")


def test_upscaling_and_heads(small):
    model, params = small
    params = params["mask_decoder"]
    x = normal(0, 2, *GRID, 32)
    theirs = from_torch(model.mask_decoder.output_upscaling[0](to_torch(x)))
    close(apply(Upscale(8), params["upscale1"], x), theirs, what="upscaling")

    token = normal(1, 5, 32)
    tensor = torch.from_numpy(token)
    theirs = model.mask_decoder.iou_prediction_head(tensor)
    mlp = Mlp((32, 32, 4), jax.nn.relu)
    close(apply(mlp, params["iou_head"], token), theirs, what="IoU head")
    theirs = model.mask_decoder.output_hypernetworks_mlps[2](tensor)
    mlp = Mlp((32, 32, 4), jax.nn.relu)
    close(apply(mlp, params["hypernetwork_2"], token), theirs, what="hypernetwork")


@pytest.mark.parametrize("mix", MIXES)
def test_decoder_on_two_images(small, mix):
    model, params = small
    embeddings = normal(0, 2, *GRID, 32)
    given = [prompts(seed, 3, 4, GRID, 8) for seed in (1, 2)]
    ours = apply(
        Sam(SMALL),
        params,
        embeddings,
        input_size=(48, 80),
        **{name: np.stack([one[name] for one in given]) for name in MIXES[mix]},
        method=Sam.decode,
    )
    for b in range(2):
        one = {name: given[b][name] for name in MIXES[mix]}
        logits, iou = decode_theirs(model, embeddings[b], one)
        close(ours[0][b], logits, what=f"logits, {mix}")
        close(ours[1][b], iou, what=f"IoU, {mix}")


def test_postprocess():
    model = build(SMALL)
    logits = normal(0, 3, 4, 48, 48)
    for input_size, original in [((96, 70), (33, 24)), ((60, 96), (250, 400))]:
        theirs = model.postprocess_masks(torch.from_numpy(logits), input_size, original).numpy()
        ours = postprocess_masks(jnp.asarray(logits), input_size, original, (96, 96))
        close(ours, theirs, relative=1e-6, what="postprocessing")
        np.testing.assert_array_equal(np.asarray(ours) > 0, theirs > 0)


# The whole model


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "side"), [("vit_b", 1024), ("vit_l", 320), ("vit_h", 320)])
@torch.inference_mode()
def test_whole_model(variant, side):
    """Full width and depth; 320 is small, and yet global attention goes in chunks as at 1024."""
    sizes = dataclasses.replace(VARIANTS[variant], image_size=side)
    model = build(sizes)
    images = normal(0, 1, side, side, 3)
    theirs = from_torch(model.image_encoder(to_torch(images)))
    params = port(model.state_dict())
    del model.image_encoder.blocks  # 2.5 GB of vit_h, copied by now
    ours = np.asarray(apply(Sam(sizes), params, images, method=Sam.encode_image))
    error = np.abs(ours - theirs).max()
    print(
        f"{variant} encoder: max abs error {error:.2e} on values up to {np.abs(theirs).max():.2f}"
    )
    assert ours.shape == theirs.shape
    assert error <= 5e-5

    cropped, original = (side, side * 4 // 5), (320, 256)
    given = prompts(1, 2, 3, (sizes.grid_size,) * 2, 16)
    for mix in ("none", "points", "box", "mask", "all"):
        one = {name: given[name] for name in MIXES[mix]}
        logits, iou = decode_theirs(model, theirs[0], one)
        ours_logits, ours_iou = apply(
            Sam(sizes),
            params,
            ours,
            input_size=(side, side),
            **{name: value[None] for name, value in one.items()},
            method=Sam.decode,
        )
        close(ours_logits[0], logits, what=f"{variant} logits, {mix}")
        close(ours_iou[0], iou, what=f"{variant} IoU, {mix}")

        # The official post-processing of the official logits, to be met by ours of ours.
        theirs_full = model.postprocess_masks(torch.from_numpy(logits), cropped, original)
        ours_full = postprocess_masks(ours_logits, cropped, original, (side, side))
        differing = np.asarray(ours_full[0] > 0) != (theirs_full > 0).numpy()
        print(f"{variant} masks, {mix}: {differing.sum()} of {differing.size} pixels differ")
        # Only logits that rounding can carry over 0 may change sides.
        band = 1e-5 * float(theirs_full.abs().max())
        assert np.abs(theirs_full.numpy()[differing]).max(initial=0) <= band
