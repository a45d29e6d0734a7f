"""What each field of `config.model`, `.cam` and `.input` changes, on the smallest SAM there is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from flax import traverse_util
from sam_cases import TINY
from tiny_sam_mix import (
    arbitrary_variables,
    forward,
    initialise,
    noise_images,
    on_the_slices_grid,
    run,
    segment,
    tiny,
)

from sammix_jax.method import cam as cams
from sammix_jax.method.cam import CamPrompt, cam_prompt, grad_cam_by_gradient
from sammix_jax.method.preprocess import NORMALISATIONS, to_rgb
from sammix_jax.method.sam_mix import sam_mix
from sammix_jax.models.blocks import POLICIES
from sammix_jax.models.classifier import Classifier
from sammix_jax.models.resnet import STAGES
from sammix_jax.systems.sam_mix import SamMixSystem


@pytest.fixture
def images():
    return noise_images()


@pytest.fixture(scope="module")
def variables():
    return arbitrary_variables()


def shapes(config):
    """Path → shape of every parameter of a config's model."""
    size = config.data.size
    like = jax.eval_shape(
        lambda: sam_mix(config).init(jax.random.key(0), jnp.zeros((1, size, size)), segmented=1)
    )
    flat = traverse_util.flatten_dict(like["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.fixture(scope="module")
def embeddings():
    return jax.random.normal(jax.random.key(2), (3, 8, 8, 32))


@pytest.fixture(scope="module")
def noisy_prompt():
    """CAMs of noise, so that their values, their mask and their average all differ."""
    cam = jax.random.uniform(jax.random.key(3), (3, 64, 64))
    boxes = jnp.array([[10.0, 20.0, 50.0, 40.0]] * 3)
    return CamPrompt(cam, cam > 0.7, boxes, jnp.zeros(3, bool))


@pytest.mark.parametrize("soft", [False, True])
def test_add_fuses_the_averaged_mask_with_every_channel(variables, embeddings, noisy_prompt, soft):
    """Scale 1; with `cam.soft` the CAM's values in place of the mask."""
    fields = {"cam.fusion": "add", "cam.soft": soft}
    source = noisy_prompt.cam if soft else noisy_prompt.mask
    grid = source.astype(jnp.float32).reshape(3, 8, 8, 8, 8).mean((2, 4))
    found = segment(fields, variables, embeddings, noisy_prompt).candidates
    expected = segment(fields, variables, embeddings + grid[..., None]).candidates
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, segment(fields, variables, embeddings).candidates, atol=1e-2)


def test_no_fusion_leaves_the_embeddings(variables, embeddings, noisy_prompt):
    fields = {"cam.fusion": "none"}
    with_cam = segment(fields, variables, embeddings, noisy_prompt).candidates
    np.testing.assert_array_equal(with_cam, segment(fields, variables, embeddings).candidates)


def test_concat_starts_as_the_identity_and_learns(variables, embeddings, noisy_prompt):
    fields = {"cam.fusion": "concat"}
    start = jax.jit(lambda: initialise(fields)["params"]["fusion"])()
    assert start["kernel"].shape == (32 + 1, 32)
    variables = variables | {"params": variables["params"] | {"fusion": start}}
    found = segment(fields, variables, embeddings, noisy_prompt).candidates
    plain = segment({"cam.fusion": "none"}, variables, embeddings).candidates
    np.testing.assert_allclose(found, plain, atol=1e-4)

    @jax.jit
    @jax.grad
    def gradient_of(fusion):
        params = variables["params"] | {"fusion": fusion}
        masks = segment(fields, variables | {"params": params}, embeddings, noisy_prompt)
        return (masks.logits**2).mean()

    gradient = gradient_of(start)["kernel"]
    rows = jnp.abs(gradient).max(axis=1)
    assert float(rows.min()) > 1e-6  # of the channels, and of the mask in the last one


def test_without_a_cam_the_learned_projection_stays(variables, embeddings, noisy_prompt):
    """The protocol `none` leaves out the mask, not what now stands before the decoder."""
    fields = {"cam.fusion": "concat"}
    kernel = jax.random.normal(jax.random.key(4), (33, 32)) / 6
    variables = variables | {"params": variables["params"] | {"fusion": {"kernel": kernel}}}
    found = segment(fields, variables, embeddings).candidates
    plain = {"cam.fusion": "none"}
    expected = segment(plain, variables, embeddings @ kernel[:32]).candidates
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with_mask = segment(fields, variables, embeddings, noisy_prompt).candidates
    assert not np.allclose(found, with_mask, atol=1e-2)


def test_mask_choices(variables, embeddings):
    """Of SAM's four tokens, 0 is the single mask and 1 to 3 are the three."""
    choices = {
        f"index {i}": {"model.mask_choice": "index", "model.mask_index": i} for i in range(3)
    }
    choices |= {name: {"model.mask_choice": name} for name in ("single", "argmax_iou")}

    @jax.jit  # one program, which decodes once
    def answers(variables):
        tokens = tiny().apply(
            variables, embeddings, method=lambda m, e: m.sam.decode(e, input_size=(64, 64))
        )
        return tokens, {
            name: tiny(fields).apply(variables, embeddings, None, None, method=on_the_slices_grid)
            for name, fields in choices.items()
        }

    (low_res, scores), masks = answers(variables)
    whole = jax.image.resize(low_res[:, 0], (3, 4, 64, 64), "linear", antialias=False)
    for i in range(3):
        np.testing.assert_allclose(masks[f"index {i}"].logits, whole[:, 1 + i], atol=1e-4)
        np.testing.assert_allclose(masks[f"index {i}"].candidates, whole[:, 1:], atol=1e-4)
    np.testing.assert_allclose(masks["single"].logits, whole[:, 0], atol=1e-4)
    np.testing.assert_allclose(masks["single"].candidates, whole[:, :1], atol=1e-4)
    np.testing.assert_allclose(masks["single"].iou, scores[:, 0, :1], atol=1e-4)
    best = masks["argmax_iou"]
    chosen = 1 + np.argmax(scores[:, 0, 1:], axis=1)
    np.testing.assert_allclose(best.logits, whole[np.arange(3), chosen], atol=1e-4)


def test_the_cams_box_prompts_unless_it_is_switched_off(variables, images):
    embeddings = run((), variables, "encode", images)
    cams_masks = []
    for box, fields in ((True, {}), (False, {"cam.box": False})):
        output = forward(fields, variables, images)
        boxes = output.prompt.box if box else None
        expected = segment(fields, variables, embeddings, output.prompt, boxes)
        np.testing.assert_allclose(output.masks.logits, expected.logits, atol=1e-4)
        cams_masks.append(output.prompt.mask)
    np.testing.assert_array_equal(*cams_masks)


@pytest.mark.parametrize("fields", [{}, {"cam.box": False}])
def test_what_each_protocol_goes_by(variables, images, fields):
    """`cam` by the CAM's box and map, `gt_box` by the true box and that map, `none` by neither."""
    config = small_config()
    config.update_from_flattened_dict(fields)
    system = SamMixSystem(tiny(fields), config)
    truth = jnp.zeros((3, 64, 64), bool).at[:, 20:44, 10:30].set(True)
    predict = jax.jit(lambda v, x: system.predict(v, x, truth, system.protocols, False).logits)
    found = predict(variables, images)
    own = forward(fields, variables, images)
    embeddings = run(fields, variables, "encode", images)
    boxes = jnp.array([[10.0, 20.0, 30.0, 44.0]] * 3)
    expected = {
        "cam": own.masks.logits,
        "gt_box": segment(fields, variables, embeddings, own.prompt, boxes).logits,
        "none": segment(fields, variables, embeddings).logits,
    }
    assert set(found) == set(expected)
    for protocol, logits in expected.items():
        np.testing.assert_allclose(found[protocol], logits, atol=1e-4)
    for one, other in itertools.combinations(expected.values(), 2):
        assert float(jnp.abs(one - other).max()) > 1e-2


def test_given_boxes_prompt_the_first_slices_and_cams_the_rest(variables, images):
    boxes = jnp.array([[3.0, 5.0, 30.0, 20.0], [40.0, 30.0, 60.0, 64.0]])
    own = forward((), variables, images)
    given = forward((), variables, images, boxes)
    np.testing.assert_array_equal(given.prompt.box, [*boxes, own.prompt.box[2]])
    np.testing.assert_array_equal(given.prompt.mask, own.prompt.mask)  # fusion sees the CAM
    change = jnp.abs(given.masks.logits - own.masks.logits).max((1, 2))
    assert float(change[:2].min()) > 1e-3 and float(change[2]) < 1e-4


# ---- The CAM's fields


def classify_and_prompt(model, images):
    return model.prompt(images, model.classify(images)[1])


def prompt_of(fields, variables, images):
    return run(fields, variables, classify_and_prompt, images)


def test_the_gradient_at_the_last_map_is_the_closed_form(variables, images):
    last = STAGES["mini"][-1]
    closed, by_gradient = (prompt_of({"cam.layer": at}, variables, images) for at in ("last", last))
    assert not closed.empty.any()
    np.testing.assert_allclose(by_gradient.cam, closed.cam, atol=1e-5)  # their peak is 1


@pytest.mark.parametrize("layer", ["layer1", "layer3"])
def test_a_cam_is_taken_at_the_layer_named(variables, images, layer):
    """Written out: that stage's map, the gradient of the positive class averaged over it."""
    classifier, rgb = Classifier("mini"), to_rgb(images, small_config().input.normalise)
    part = {name: variables[name]["classifier"] for name in ("params", "batch_stats")}
    features = classifier.apply(part, rgb, layer, method="features_at")
    assert features.shape[1:3] == {"layer1": (32, 32), "layer3": (8, 8)}[layer]

    def score(features):
        return classifier.apply(part, features, layer, method="logits_from")

    cam = jax.jit(lambda f: grad_cam_by_gradient(score, f, 1))(features)
    expected = cam_prompt(cam, (64, 64))
    found = prompt_of({"cam.layer": layer}, variables, images)
    np.testing.assert_allclose(found.cam, expected.cam, atol=1e-4)
    assert not np.allclose(found.cam, prompt_of((), variables, images).cam, atol=0.1)


def test_the_mask_sends_no_gradient_through_an_inner_layers_cam(variables, images):
    """Also where the model starts with such a layer, and in training, whose statistics differ."""
    fields = {"cam.layer": "layer3"}
    at_start = jax.eval_shape(lambda: initialise(fields))
    assert jax.tree.structure(at_start["params"]) == jax.tree.structure(variables["params"])

    def method(model, images):
        class_logits, features = model.classify(images, train=True)
        prompt = model.prompt(images, features)
        return class_logits, prompt.cam.mean() + prompt.box.mean()

    def classes_and_cam(classifier):
        params = variables["params"] | {"classifier": classifier}
        found, _ = tiny(fields).apply(
            variables | {"params": params}, images, method=method, mutable=["batch_stats"]
        )
        return found

    classifier = variables["params"]["classifier"]
    of_cam = jax.jit(jax.grad(lambda c: classes_and_cam(c)[1]))(classifier)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_cam))
    of_class = jax.jit(jax.grad(lambda c: classes_and_cam(c)[0][:, 1].mean()))(classifier)
    assert all(leaf.any() for leaf in jax.tree.leaves(of_class["trunk"]["layer3_1"]))


def test_the_plain_cam_is_the_models_where_asked_for(variables, images):
    """A head that speaks against the class everywhere: one method finds a place, one does not."""
    head = variables["params"]["classifier"]["head"]
    against = head | {"kernel": head["kernel"].at[:, 1].set(-1.0)}
    params = variables["params"] | {
        "classifier": variables["params"]["classifier"] | {"head": against}
    }
    grad, plain = (
        prompt_of({"cam.method": method}, variables | {"params": params}, images)
        for method in ("grad_cam", "cam")
    )
    assert grad.empty.all() and not plain.empty.any()
    np.testing.assert_array_equal(grad.box, [[16, 16, 48, 48]] * 3)  # central


@pytest.mark.parametrize(
    ("threshold", "component"), [(0.2, "largest"), (0.7, "all"), (0.7, "largest"), (0.7, "peak")]
)
def test_threshold_and_component_reach_the_cam_mask(variables, images, threshold, component):
    fields = {"cam.threshold": threshold, "cam.component": component}
    found = prompt_of(fields, variables, images)
    expected = cams.connected_component(found.cam >= threshold, found.cam, component)
    np.testing.assert_array_equal(found.mask, expected)


# ---- The model's and the input's fields


def encode_rgb(model, rgb):
    return model.sam.encode_image(rgb)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_both_branches_see_the_normalised_slice(variables, images, normalise):
    fields = {"input.normalise": normalise}
    images = 0.2 + 0.5 * images
    rgb = to_rgb(images, normalise)
    part = {name: variables[name]["classifier"] for name in ("params", "batch_stats")}
    expected, _ = jax.jit(Classifier("mini").apply)(part, rgb)
    found, _ = run(fields, variables, "classify", images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    embeddings = run((), variables, encode_rgb, rgb)
    np.testing.assert_allclose(run(fields, variables, "encode", images), embeddings, atol=1e-4)


@pytest.mark.parametrize(("rank", "targets"), [(0, ("q", "v")), (8, ("q", "v")), (3, ("k",))])
def test_lora_adds_two_factors_to_each_projection_named(config, rank, targets):
    config.model.lora_rank, config.model.lora_targets = rank, targets
    found = {path: shape for path, shape in shapes(config).items() if "lora" in path}
    width, depth = TINY.embed_dim, TINY.depth
    assert len(found) == (depth * len(targets) * 2 if rank else 0)
    for path, shape in found.items():
        assert path.split("/")[-2].removeprefix("lora_") in targets
        assert shape == ((width, rank) if path.endswith("/a") else (rank, width))


def test_sam_and_its_input_size(config):
    """The variant decides on the encoder, the size on its grid and position table."""
    config.model.image_size = 96
    images = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
    for name, width, depth, patch, channels in (
        ("mini", 192, 6, 8, 128),
        ("vit_b", 768, 12, 16, 256),
    ):
        config.model.sam = name
        model = sam_mix(config)
        like = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, segmented=1), images)
        grid = jax.eval_shape(lambda v, x, m=model: m.apply(v, x, method="encode"), like, images)
        assert grid.shape == (2, 96 // patch, 96 // patch, channels)
        encoder = like["params"]["sam"]["image_encoder"]
        blocks = [block for key, block in encoder.items() if key.startswith("block")]
        assert len(blocks) == depth and blocks[0]["attn"]["qkv"]["kernel"].shape[0] == width


@pytest.mark.parametrize(
    ("arch", "stride", "map_shape"),
    [("mini", 8, (8, 8, 256)), ("mini", 16, (4, 4, 256)), ("resnet38", 8, (8, 8, 4096))],
)
def test_the_classifier_and_its_stride(config, arch, stride, map_shape):
    config.model.classifier, config.model.classifier_stride = arch, stride
    model = sam_mix(config)
    images = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
    like = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, segmented=1), images)
    _, features = jax.eval_shape(lambda v, x: model.apply(v, x, method="classify"), like, images)
    assert features.shape == (2, *map_shape)


def test_bfloat16_computes_and_float32_is_kept(config, images):
    """Embeddings and feature maps are computed in `model.dtype`; losses and parameters are not."""
    for dtype in ("float32", "bfloat16"):
        config.model.dtype = dtype
        model = sam_mix(config)
        like = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), images, segmented=1))
        assert {leaf.dtype for leaf in jax.tree.leaves(like)} == {jnp.dtype("float32")}
        encoded = jax.eval_shape(lambda v, m=model: m.apply(v, images, method="encode"), like)
        _, features = jax.eval_shape(lambda v, m=model: m.apply(v, images, method="classify"), like)
        assert encoded.dtype == features.dtype == jnp.dtype(dtype)
        output = jax.eval_shape(lambda v, m=model: m.apply(v, images, segmented=2), like)
        assert output.class_logits.dtype == output.masks.logits.dtype == jnp.float32


def test_remat_computes_more_and_changes_nothing(variables, images):
    """The same gradient of the embeddings, from a program that recomputes the encoder's blocks."""

    def gradient(remat):
        @jax.grad
        def of(params):
            encode = functools.partial(tiny({"model.remat": remat}).apply, method="encode")
            return (encode(variables | {"params": params}, images[:1]) ** 2).mean()

        return of

    params = variables["params"]
    programs = {name: str(jax.make_jaxpr(gradient(name))(params)) for name in POLICIES}
    again = [name for name, text in programs.items() if "remat" in text or "checkpoint" in text]
    assert again == ["dots", "blocks"]
    products = {name: text.count("dot_general") for name, text in programs.items()}
    assert products["none"] < products["dots"] < products["blocks"]
    plain, again = (jax.jit(gradient(name))(params)["sam"] for name in ("none", "blocks"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max() + 1))


def test_queries_attend_in_chunks(variables, images):
    """By a loop over `model.query_chunk` queries, or all at once."""
    for chunk, loops in ((16, True), (128, False)):
        encode = functools.partial(tiny({"model.query_chunk": chunk}).apply, method="encode")
        assert ("scan" in str(jax.make_jaxpr(encode)(variables, images))) == loops
