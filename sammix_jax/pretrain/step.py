"""One step of promptable pretraining: draw scenes, prompt, correct, learn.

The training algorithm of Segment Anything (Kirillov et al. 2023, arXiv 2304.02643, appendix A): an
image is encoded once and prompted for several shapes, half of them with a box and half with a
point; each round adds a point where the answer is wrong and gives the answer back as a mask prompt.
The loss is focal and Dice, 20 to 1, of the best of three masks, and the error of the estimated IoU.

Where it differs: fewer rounds (`pretrain.rounds`, where SAM has eleven, two of them with the mask
alone); boxes and single points are asked in halves rather than by chance; the mask of an
unambiguous prompt learns beside the three; and the embeddings have a loss of their own.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from sammix_jax.method.losses import dice_costs, focal_costs, mask_iou
from sammix_jax.method.preprocess import to_rgb
from sammix_jax.models.blocks import gather_outside_blocks
from sammix_jax.models.sam.mask_decoder import MULTIMASK, SINGLE_MASK
from sammix_jax.models.sam.sam import Sam
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.pretrain.prompts import corrections, jittered_boxes, random_points
from sammix_jax.pretrain.scenes import Scenes, draw_scenes, mean_of
from sammix_jax.sharding import along_batch, on_mesh, replicated
from sammix_jax.training.optim import merge_params
from sammix_jax.training.step import TrainState, apply_gradients, new_state

FOCAL, DICE, IOU, AFFINITY = 20.0, 1.0, 1.0, 1.0  # weights of the loss
SHARPNESS = 5.0  # of the cosine between two embeddings, as a logit
LOOK = 2.0  # how sharply the decoder looks at a prompt's place to begin with
FIRST_PROMPTS = ("box", "point")
# Shares of the image that a prompted shape may take.
SMALLEST, LARGEST = 0.004, 0.7


def make_init(sam: Sam, optimiser: optax.GradientTransformation, config):
    """Returns `init() -> TrainState`, to be jitted or evaluated abstractly.

    SAM's parameters lie below `sam/`, as in the systems that it is pretrained for.
    """

    def init() -> TrainState:
        side = config.model.image_size
        key = jax.random.key(config.seed)
        params = sam.init(key, jnp.zeros((1, side, side, 3)))["params"]
        params = prepare_to_look(params, jax.random.fold_in(key, 1))
        return new_state({"params": {"sam": params}}, optimiser, config)

    return init


def prepare_to_look(params: dict, key: jax.Array) -> dict:
    """Gives random weights two things that hasten the beginning.

    Queries and keys that are projected alike are alike where a prompt and a cell have one place: so
    the decoder looks at what a point shows from the first step, where else it must first find out
    that equal codes are equal places. And a patch of one grey is a vector times that grey, of which
    the first LayerNorm keeps the sign; with a bias of the same size it keeps the grey as an angle.
    After 150 steps the IoU from a point was 0.276 with both, 0.215 with the first and 0.000 with
    neither; after 450 it was 0.317, 0.305 and 0.275.

    Args:
      params: of a `Sam`, nested.
      key: of the bias.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    bias = "image_encoder/patch_embed/bias"
    flat[bias] = jax.random.normal(key, flat[bias].shape)
    for path in list(flat):
        if re.fullmatch(r"mask_decoder/.*attn_\w+/k_proj/kernel", path):  # between tokens and image
            query = path.replace("k_proj", "q_proj")
            flat[query] = flat[path] = LOOK * flat[query]
    return traverse_util.unflatten_dict(flat, sep="/")


def make_pretrain_step(sam: Sam, optimiser, config, mesh: Mesh, side: int):
    """Returns `step(state, numbers) -> (state, metrics)`, to be jitted.

    `numbers` (B,) int32 are the images' places in the batch; with the seed and the state's step
    they say which scenes are drawn, of `side` x `side` pixels. Metrics are as those of
    `training.step.make_train_step`.
    """
    settings = config.pretrain
    rows = along_batch(mesh, settings.images)

    def loss_fn(trainable, frozen, scenes: Scenes, keys: jax.Array):
        variables = gather_outside_blocks({"params": merge_params(trainable, frozen)["sam"]})
        return promptable_loss(sam, variables, scenes, keys, settings, config.input.normalise)

    def step(state: TrainState, numbers: jax.Array) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        keys = jax.lax.with_sharding_constraint(keys, rows)
        scene_keys, prompt_keys = jax.vmap(jax.random.split)(keys).T
        scenes = draw_scenes(scene_keys, side)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            state.trainable, state.frozen, scenes, prompt_keys
        )
        state, norms = apply_gradients(state, grads, optimiser)
        return state, metrics | norms

    return step


def jit_pretrain_step(sam: Sam, optimiser, config, mesh: Mesh, side: int, sharding):
    """The step as a run takes it: the state stays where it lies, the old one is given up."""
    step = make_pretrain_step(sam, optimiser, config, mesh, side)
    placed = (sharding, replicated(mesh))
    return jax.jit(on_mesh(mesh, step), out_shardings=placed, donate_argnums=0)


def promptable_loss(
    sam: Sam, variables: dict, scenes: Scenes, keys: jax.Array, settings, normalisation: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch.

    Args:
      sam, variables: the model.
      scenes: B of them.
      keys: (B,) random keys, from which shapes and prompts are drawn.
      settings: `config.pretrain`.
      normalisation: `config.input.normalise`.

    Returns:
      The loss, and its parts by name with the mean IoU after the first and the last round; scalars.
    """
    size = scenes.images.shape[-1]
    bound = sam.bind(variables)
    embeddings = bound.encode_image(to_rgb(scenes.images, normalisation))
    decode = functools.partial(bound.decode, embeddings, input_size=(size, size))
    choose_key, *prompt_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys).T
    # Low-res logits are four times as fine as the tokens.
    cell = get_variant(sam.variant).patch_size // 4
    truth, shown = choose_shapes(choose_key, scenes.masks, settings.prompts, cell)
    half = settings.prompts // 2
    losses, metrics = [], {}
    for first, group_keys, group in zip(
        FIRST_PROMPTS, prompt_keys, (slice(0, half), slice(half, None)), strict=True
    ):
        found = _rounds(decode, group_keys, truth[:, group], shown[:, group], first, size, settings)
        losses += [loss for loss, _ in found]
        metrics[f"iou_{first}"] = found[0][1]
        metrics[f"iou_{first}_corrected"] = found[-1][1]
    affinity = affinity_loss(embeddings, scenes)
    loss = sum(losses) / len(losses) + AFFINITY * affinity
    return loss, {"loss": loss, "affinity_loss": affinity, **metrics}


def affinity_loss(embeddings: jax.Array, scenes: Scenes) -> jax.Array:
    """Cells of one shape should be alike, and cells of two unlike.

    Segment Anything begins from an encoder that masked autoencoding has taught to see. A new one
    learns nothing from prompts as long as the decoder does no better than to fill its boxes, and
    that is long; this teaches it from every cell at once.

    Args:
      embeddings: (B, h, w, C).
      scenes: B of them.

    Returns:
      () float32: cross-entropy of whether two cells of an image have one owner, by the cosine of
      their embeddings; pairs that have and pairs that have not count alike. A cell of a part and
      one of its whole are neither.
    """
    b, h, w, c = embeddings.shape
    cell = scenes.owners.shape[1] // h
    centres = slice(cell // 2, None, cell)
    owners = scenes.owners[:, centres, centres].reshape(b, h * w)  # (B, h, w) → (B, hw)
    masks = scenes.masks[:, :, centres, centres].reshape(b, -1, h * w)  # (B, K, h, w) → (B, K, hw)
    masks = masks.astype(jnp.float32)
    places = embeddings.astype(jnp.float32).reshape(b, h * w, c)
    places = places - places.mean(axis=1, keepdims=True)
    # Below the root, as a norm has no gradient where all cells are alike.
    squares = jnp.square(places).sum(axis=-1, keepdims=True)
    places = places / jnp.sqrt(jnp.maximum(squares, 1e-12))
    logits = SHARPNESS * jnp.einsum("bpc,bqc->bpq", places, places)
    same = owners[:, :, None] == owners[:, None, :]
    unlike = jnp.einsum("bkp,bkq->bpq", masks, masks) == 0
    unlike = unlike & ~same  # two cells of the background
    costs = jax.nn.softplus(logits) - logits * same
    return 0.5 * (mean_of(costs, same) + mean_of(costs, unlike))


def choose_shapes(
    keys: jax.Array, masks: jax.Array, count: int, cell: int
) -> tuple[jax.Array, jax.Array]:
    """Draws the shapes to be prompted, among those that are neither specks nor all of the image.

    One that is twice as long and wide is drawn twice as often: there is more to learn from it.

    Args:
      keys: (B,) random keys.
      masks: (B, K, S, S) bool.
      count: P.
      cell: c, pixels on a side of a cell of the decoder's answer.

    Returns:
      Their masks on the grid of the decoder's answer, (B, P, S / c, S / c) bool, and which of them
      are there, (B, P) bool, as a scene may have fewer. In no order.
    """
    b, k, size, _ = masks.shape
    side = size // cell
    cells = masks.reshape(b, k, side, cell, side, cell)  # (B, K, S, S) → (B, K, s, c, s, c)
    coarse = cells.mean(axis=(3, 5)) >= 0.5
    share = coarse.mean(axis=(2, 3))
    sound = (share > SMALLEST) & (share < LARGEST)
    # Gumbel noise on log weights draws without replacement.
    draws = jax.vmap(lambda key: jax.random.gumbel(key, (k,)))(keys)
    draws += jnp.where(sound, 0.5 * jnp.log(jnp.maximum(share, SMALLEST)), -1e6)
    order = jnp.argsort(-draws, axis=1)[:, :count]  # (B, P)
    # The larger ones come first, and those that are not there last; one half gets boxes.
    order = jax.vmap(lambda key, row: jax.random.permutation(jax.random.fold_in(key, 1), row))(
        keys, order
    )
    chosen = jnp.take_along_axis(coarse, order[:, :, None, None], axis=1)
    return chosen, jnp.take_along_axis(sound, order, axis=1)


def _rounds(decode, keys, truth, shown, first: str, size: int, settings) -> list:
    """The loss and mean IoU of each round of prompts that begin with `first`."""
    keys = jax.vmap(lambda key: jax.random.split(key, settings.rounds + 1))(keys)  # (B, R + 1)
    weights = shown.astype(jnp.float32)
    safe = truth | ~truth.any(axis=(-2, -1), keepdims=True)  # a point needs somewhere to lie
    prompt = {}
    if first == "box":
        side = truth.shape[-1]
        boxes = jittered_boxes(keys[:, 0], truth) * (size / side)
        prompt["boxes"] = jnp.clip(boxes, 0, size)
    else:
        prompt["points"] = random_points(keys[:, 0], safe, size)[:, :, None]  # (B, P, 1, xy)
        prompt["labels"] = jnp.ones(prompt["points"].shape[:3], jnp.int32)
    found = []
    for number in range(settings.rounds):
        logits, predicted_iou = decode(**prompt)  # (B, P, 4, s, s), (B, P, 4)
        # A lone point may mean several things; the answer for one meaning learns from the others.
        alone = first == "point" and number == 0
        loss, best, iou = _round_loss(logits, predicted_iou, truth, weights, single=not alone)
        found.append((loss, iou))
        answer = jax.lax.stop_gradient(best)
        point, label = corrections(keys[:, number + 1], answer > 0, safe, size)
        point, label = point[:, :, None], label[:, :, None]
        if "points" in prompt:
            point = jnp.concatenate([prompt["points"], point], axis=2)
            label = jnp.concatenate([prompt["labels"], label], axis=2)
        prompt |= {"points": point, "labels": label, "masks": answer}
    return found


def _round_loss(logits, predicted_iou, truth, weights, single: bool):
    """The loss of one answer, the mask of the highest estimate (B, P, s, s), and its mean IoU."""
    target = jnp.broadcast_to(truth[:, :, None], logits.shape)  # (B, P, 4, s, s)
    costs = FOCAL * focal_costs(logits, target) + DICE * dice_costs(logits, target)  # (B, P, 4)
    of_three = costs[..., MULTIMASK]
    # Taken by its place: a minimum's gradient divides by the number of its equals, and that is zero
    # where XLA computes the costs twice and rounds them two ways.
    least = jnp.argmin(of_three, axis=-1, keepdims=True)
    cost = jnp.take_along_axis(of_three, least, axis=-1)[..., 0]
    if single:
        cost += costs[..., SINGLE_MASK][..., 0]
    iou = mask_iou(logits > 0, target)
    asked = slice(SINGLE_MASK.start if single else MULTIMASK.start, MULTIMASK.stop)
    cost += IOU * jnp.square(predicted_iou - iou)[..., asked].mean(-1)
    best = MULTIMASK.start + jnp.argmax(predicted_iou[..., MULTIMASK], axis=-1)[..., None]
    mask = jnp.take_along_axis(logits, best[..., None, None], axis=2)[:, :, 0]
    of_best = jnp.take_along_axis(iou, best, axis=2)[..., 0]
    return mean_of(cost, weights), mask, mean_of(of_best, weights)
