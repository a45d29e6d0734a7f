"""Gradients of SAM in Flax, LoRA among them, against PyTorch's autograd on the official model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_cases import flat, normal
from test_sam_parity import GRID, SMALL, prompts  # skips these tests too where torch is absent
from torch_port import build, encode_theirs, port, to_torch

from sammix_jax.models.sam import Sam

torch = pytest.importorskip("torch", reason="parity needs torch (requirements/parity.txt)")

pytestmark = pytest.mark.torch

RANK = 4
TOLERANCE = 1e-4  # of the largest gradient in the leaf
# Between them every parameter of the prompt encoder is used: without a mask its embedding of "no
# mask", and with points alone the padding point.
MIXES = [("points", "labels", "boxes", "masks"), ("points", "labels")]
# Softmax ignores what all keys share: this gradient is 0 but for rounding, and is held to the
# tolerance relative to the largest gradient of the kernel beside it.
SHIFT = "k_proj/bias"


def add_lora(model):
    """Adds q and v terms (x a) b to the output of every fused projection of the official model."""

    def adapt(block):
        c = block.qkv.in_features
        for third in "qv":
            pair = {"a": torch.randn(c, RANK) / c**0.5, "b": 0.3 * torch.randn(RANK, c)}
            block.add_module(f"lora_{third}", torch.nn.ParameterDict(pair))

        def add(_, inputs, qkv):
            (x,) = inputs
            q, v = (x @ pair["a"] @ pair["b"] for pair in (block.lora_q, block.lora_v))
            return qkv + torch.cat([q, torch.zeros_like(x), v], dim=-1)

        block.qkv.register_forward_hook(add)

    for block in model.image_encoder.blocks:
        adapt(block.attn)
    return model


def autograd(model, images, given, weights):
    """Gradients of the weighted sum of all answers of the official model, image by image."""
    encoder, decoder = model.image_encoder, model.mask_decoder
    grid = model.prompt_encoder.image_embedding_size
    position = torch.nn.functional.interpolate(
        encoder.pos_embed.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    total = 0
    for b in range(len(images)):
        image = to_torch(images[b : b + 1])
        embedding = torch.func.functional_call(encoder, {"pos_embed": position}, image)
        for mix, answers in zip(MIXES, weights, strict=True):
            sparse, dense = encode_theirs(model, {name: given[name][b] for name in mix})
            logits, iou = decoder.predict_masks(
                image_embeddings=embedding,
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
            for answer, weight in zip((logits, iou), answers, strict=True):
                total = total + torch.sum(answer * torch.from_numpy(weight[b]))
    total.backward()
    gradients = {name: leaf.grad for name, leaf in model.named_parameters()}
    return float(total.detach()), flat(port(gradients))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def weighted_sum(model, params, images, given, weights):
    """The same sum from the Flax model, all images and prompts in one call for each mix."""
    apply = functools.partial(model.apply, {"params": params})
    embeddings = apply(images, method=Sam.encode_image)
    total = 0
    for mix, answers in zip(MIXES, weights, strict=True):
        prompted = {name: given[name] for name in mix}
        ours = apply(embeddings, input_size=images.shape[1:3], method=Sam.decode, **prompted)
        total += sum(jnp.sum(answer * weight) for answer, weight in zip(ours, answers, strict=True))
    return total


@pytest.fixture(scope="module", params=[GRID, (20, 13)], ids=["whole", "in chunks"])
def gradients(request):
    """Ours and theirs, by leaf; the larger grid makes global attention go in chunks of queries."""
    grid, (b, p) = request.param, (2, 3)
    model = add_lora(build(SMALL, grid)).requires_grad_(True)
    params = port(model.state_dict())
    h, w = grid
    images = normal(0, b, 8 * h, 8 * w, 3)
    each = [prompts(seed, p, 4, grid, 8) for seed in (1, 2)]
    given = {name: np.stack([one[name] for one in each]) for name in each[0]}
    assert set(np.unique(given["labels"])) == {-1, 0, 1}
    weights = [
        (normal(2 * i + 3, b, p, 4, 4 * h, 4 * w), normal(2 * i + 4, b, p, 4))
        for i in range(len(MIXES))
    ]
    their_sum, theirs = autograd(model, images, given, weights)
    our_sum, ours = weighted_sum(Sam(SMALL, lora_rank=RANK), params, images, given, weights)
    print(f"weighted sums {float(our_sum):.6f} and {their_sum:.6f}")
    ours = flat(ours)
    constant = ours.pop("prompt_encoder/position_encoding/gaussian_matrix")
    assert not np.any(constant)
    assert set(ours) == set(theirs)
    return {path: (np.asarray(ours[path]), theirs[path]) for path in ours}


@pytest.mark.parametrize("part", ["LoRA", "image_encoder", "prompt_encoder", "mask_decoder"])
def test_gradients(gradients, part):
    """Every leaf of a part agrees, relative to the leaf's largest gradient."""
    errors, rounding = {}, {}
    for path, (ours, theirs) in gradients.items():
        if part != ("LoRA" if "/lora_" in path else path.split("/")[0]):
            continue
        assert ours.shape == theirs.shape, path
        if path.endswith(SHIFT):
            kernel = np.abs(gradients[path.replace("bias", "kernel")][1]).max()
            rounding[path] = max(np.abs(ours).max(), np.abs(theirs).max()) / kernel
        else:
            assert np.any(theirs), f"{path} gets no gradient"
            errors[path] = np.abs(ours - theirs).max() / np.abs(theirs).max()
    worst = max(errors, key=errors.get)
    print(f"{part}: {len(errors)} leaves, relative error up to {errors[worst]:.2e} ({worst})")
    if rounding:
        print(f"{part}: {len(rounding)} key biases, up to {max(rounding.values()):.2e}")
    errors |= rounding
    assert not {path: error for path, error in errors.items() if not error <= TOLERANCE}
