"""SAM from PyTorch and back: the same bits, strictly loaded, the same masks."""

import re
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest

REASON = "pip install -r requirements/parity.txt"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

from conftest import ROOT, small_config
from torch_port import build, decode_theirs, from_torch, official, to_torch

from convert.hf_folder import _model_config
from convert.hf_rules import HUGGING_FACE
from convert.sam import convert
from convert.sam_rules import OFFICIAL, sam_shapes
from sammix_jax.config_files import claim_workdir, load_config
from sammix_jax.data.files import read_json
from sammix_jax.errors import UserError
from sammix_jax.models.sam.sam import Sam
from sammix_jax.models.sam.variants import get_variant
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.training.checkpoint import Checkpoints
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.start import load_pretrained
from sammix_jax.training.step import make_init
from sammix_jax.training.trained import load_model
from sammix_jax.weights import TRAINED_WITH, read_weights, write_weights

pytestmark = pytest.mark.torch

try:
    official()
except ImportError:
    pytest.skip(REASON, allow_module_level=True)

MINI = get_variant("mini")
BOX = {"boxes": np.array([[20.0, 30.0, 90.0, 100.0]], np.float32)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random official `mini` and what becomes of it: .pth, .safetensors, .pth again, HF."""
    folder = tmp_path_factory.mktemp("sam")
    torch.save(build(MINI).state_dict(), folder / "sam.pth")
    convert(folder / "sam.pth", folder / "sam.safetensors")
    convert(folder / "sam.safetensors", folder / "back.pth")
    convert(folder / "sam.safetensors", folder / "hf")
    return folder


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=(1, 128, 128, 3)).astype(np.float32)


def ours(path, image):
    """Logits (4, h, w) of our model with a weight file."""
    params = flax.traverse_util.unflatten_dict(read_weights(path)[0], sep="/")
    boxes = BOX["boxes"][:, None]
    logits, _ = jax.jit(Sam("mini").apply)({"params": params}, image, boxes=boxes)
    return np.asarray(logits[0, 0])


def theirs(model, image):
    """Logits (4, h, w) of the official model."""
    with torch.no_grad():
        embedding = from_torch(model.image_encoder(to_torch(image)))
        return decode_theirs(model, embedding[0], BOX)[0][0]


def hugging_face(folder, image):
    """Logits (3, h, w), the multi-mask answers, of the model that `transformers` loads."""
    model, report = transformers.SamModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        output = model(to_torch(image), input_boxes=torch.from_numpy(BOX["boxes"][None]))
    return output.pred_masks[0, 0].numpy()


def assert_same_masks(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found > 0, expected > 0)
    assert 0.05 < (expected > 0).mean() < 0.95


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].stride() == value.stride() and found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_official_round_trip_is_bit_equal(files):
    back = torch.load(files / "back.pth", weights_only=True)
    assert_same_state(back, torch.load(files / "sam.pth", weights_only=True))


def test_hugging_face_round_trip_is_bit_equal(files, tmp_path):
    convert(files / "hf", tmp_path / "sam.safetensors")
    convert(tmp_path / "sam.safetensors", tmp_path / "hf")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (files / "hf" / name).read_bytes()
    first, second = (read_weights(f / "sam.safetensors")[0] for f in (files, tmp_path))
    assert all(np.array_equal(first[path], second[path]) for path in first | second)


def test_official_model_gives_our_masks(files, image):
    model = build(MINI)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(torch.load(files / "back.pth", weights_only=True), strict=True)
    assert_same_masks(ours(files / "sam.safetensors", image), theirs(model, image))


def test_transformers_gives_our_masks(files, image):
    expected = ours(files / "sam.safetensors", image)[1:]
    assert_same_masks(hugging_face(files / "hf", image), expected)
    processor = transformers.SamImageProcessorPil.from_pretrained(files / "hf")
    grey = np.full((60, 100, 3), 128, np.uint8)
    pixels = processor(grey, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 128, 128) and not pixels[0, :, 77:].any()
    np.testing.assert_allclose(pixels[0, :, 0, 0], [0.0741, 0.2052, 0.4265], atol=1e-3)


@pytest.fixture(scope="module")
def adapted(files, tmp_path_factory):
    """A workdir whose checkpoint has the file's SAM, and LoRA far from its start."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config()
    config.model.sam, config.model.sam_weights = "mini", str(files / "sam.safetensors")
    claim_workdir(config, folder)
    init = make_init(SamMixSystem.of(config), make_optimiser(config.train, 1), config)
    rng = np.random.default_rng(0)
    random = jax.tree.map(
        lambda leaf: jax.device_put(0.05 * rng.normal(size=leaf.shape).astype(leaf.dtype)),
        jax.eval_shape(init),
    )
    state, _ = load_pretrained(random, config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save_config(config)
        checkpoints.save_frozen(state)
        checkpoints.save_best(state, 1, 0.5)
    return folder


def test_lora_is_merged_into_the_export(files, adapted, tmp_path, image):
    """The checkpoint, LoRA apart, answers as its exports do with LoRA inside."""
    variables = load_model(load_config(adapted), adapted).variables
    params = {"params": variables["params"]["sam"]}
    apply = jax.jit(Sam("mini", lora_rank=8).apply)
    expected = np.asarray(apply(params, image, boxes=BOX["boxes"][:, None])[0][0, 0])

    convert(adapted, tmp_path / "sam.pth")
    convert(tmp_path / "sam.pth", tmp_path / "hf")
    model = build(MINI)
    model.load_state_dict(torch.load(tmp_path / "sam.pth", weights_only=True), strict=True)
    for found in (theirs(model, image), hugging_face(tmp_path / "hf", image)):
        same = expected[-len(found) :]
        np.testing.assert_allclose(found, same, atol=5e-5 * np.abs(same).max())

    start = torch.load(files / "sam.pth", weights_only=True)
    for key, value in model.state_dict().items():
        change = (value - start[key]).numpy()
        if key.endswith("attn.qkv.weight"):
            q, k, v = np.split(change, 3)
            assert np.abs(q).mean() > 1e-3 and not k.any() and np.abs(v).mean() > 1e-3
        else:
            assert not change.any(), key


@pytest.mark.parametrize("variant", ["vit_b", "vit_l", "vit_h"])
def test_keys_are_those_of_the_public_models(variant):
    """Names and shapes, which is all that a strict load asks for."""
    shapes = sam_shapes(variant)
    with torch.device("meta"):
        sam = official().sam_model_registry[variant](None)
        hf = transformers.SamModel(
            transformers.SamConfig.from_dict(_model_config(get_variant(variant)))
        )
    assert OFFICIAL.key_shapes(shapes) == {k: tuple(v.shape) for k, v in sam.state_dict().items()}
    names = {k: tuple(v.shape) for k, v in hf.state_dict().items()}
    for alias, key in HUGGING_FACE.aliases.items():
        assert names.pop(alias) == names[key]
    assert HUGGING_FACE.key_shapes(shapes) == names


def test_lightnings_checkpoints(files, tmp_path):
    state = torch.load(files / "sam.pth", weights_only=True)
    inner = {f"model.{key}": value for key, value in state.items()}
    lightning = {"epoch": 3, "state_dict": inner, "optimizer_states": [], "lr_schedulers": []}
    torch.save(lightning, tmp_path / "last.pth")
    convert(tmp_path / "last.pth", tmp_path / "back.pth")
    assert_same_state(torch.load(tmp_path / "back.pth", weights_only=True), state)


def test_what_stands_around_the_weights_is_taken_off(files, tmp_path):
    """DeepSpeed's wrapper; and one whose name another thing has."""
    state = torch.load(files / "sam.pth", weights_only=True)
    for wrapped in (
        {"module": state, "ds_version": "0.15"},
        {"model": {"name": "vit"}, "state_dict": state},
    ):
        torch.save(wrapped, tmp_path / "given.pth")
        convert(tmp_path / "given.pth", tmp_path / "back.pth")
        assert_same_state(torch.load(tmp_path / "back.pth", weights_only=True), state)


def test_a_folder_in_half_precision_says_how_to_load_it(files, tmp_path):
    _, notes = convert(files / "sam.pth", tmp_path / "half", dtype="float16")
    assert [note.partition(",")[0] for note in notes] == ["stored as float16"]
    assert convert(files / "sam.pth", tmp_path / "whole")[1] == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_in_and_out(files, tmp_path, dtype):
    half = {
        key: value.to(getattr(torch, dtype))
        for key, value in torch.load(files / "sam.pth", weights_only=True).items()
    }
    # As some training scripts save it.
    wrapped = {"epoch": 3, "model": {f"module.{key}": value for key, value in half.items()}}
    torch.save(wrapped, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "half.safetensors")
    convert(tmp_path / "half.safetensors", tmp_path / "back.pth")
    assert_same_state(torch.load(tmp_path / "back.pth", weights_only=True), half)
    convert(tmp_path / "half.safetensors", tmp_path / "full.safetensors", dtype="float32")
    full = read_weights(tmp_path / "full.safetensors")[0]
    found = full["mask_decoder/iou_token"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, half["mask_decoder.iou_token.weight"].float().numpy())


def test_what_is_known_of_the_images_stays_with_the_weights(files, adapted, tmp_path):
    arrays, metadata = read_weights(files / "sam.safetensors")
    assert not set(TRAINED_WITH) & set(metadata)  # an official file says nothing of them
    known = {"normalise": "sam", "image_size": "256"}
    write_weights(tmp_path / "own.safetensors", arrays, metadata | known)
    convert(tmp_path / "own.safetensors", tmp_path / "half.safetensors", dtype="float16")
    found = read_weights(tmp_path / "half.safetensors")[1]
    assert {key: found[key] for key in TRAINED_WITH if key in found} == known
    convert(adapted, tmp_path / "trained.safetensors")
    config, found = load_config(adapted), read_weights(tmp_path / "trained.safetensors")[1]
    assert found["normalise"] == config.input.normalise
    assert found["image_size"] == str(config.model.image_size)
    assert found["mask_choice"] == config.model.mask_choice == "argmax_iou"
    assert found["source"] == f"{adapted.name}, step 0"


def trained_as(files, path, **known):
    """The random SAM as a file that says how its images were."""
    arrays, metadata = read_weights(files / "sam.safetensors")
    write_weights(path, arrays, metadata | known)
    return path


def test_a_hugging_face_folder_takes_images_as_the_run_did(files, tmp_path):
    """At its size and in its range: the same masks from a picture of 0..255."""
    own = trained_as(files, tmp_path / "own.safetensors", normalise="unit", image_size="64")
    _, notes = convert(own, tmp_path / "hf")
    assert [note.split(";")[0] for note in notes] == [
        "trained at image_size=64",
        "trained with normalise=unit",
    ]
    sizes = read_json(tmp_path / "hf" / "preprocessor_config.json")
    assert sizes["pad_size"] == {"height": 64, "width": 64} and sizes["do_pad"]
    assert sizes["mask_size"] == {"longest_edge": 32}  # of the low-res logits
    assert sizes["mask_pad_size"] == {"height": 32, "width": 32}
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    processor = transformers.SamImageProcessorPil.from_pretrained(tmp_path / "hf")
    pixels = processor(picture, return_tensors="np")["pixel_values"]  # (1, 3, 64, 64)
    image = np.moveaxis(pixels, 1, -1)
    np.testing.assert_allclose(image[0], picture / 255, atol=1e-6)
    expected = ours(own, image)
    assert expected.shape == (4, 32, 32)
    assert_same_masks(hugging_face(tmp_path / "hf", image), expected[1:])


def test_a_folder_that_transformers_saved_again_is_held_against_its_processor(files, tmp_path):
    """Which now lies under another name, and knows nothing of this project's metadata."""
    own = trained_as(files, tmp_path / "own.safetensors", normalise="unit")
    convert(own, tmp_path / "hf")
    transformers.SamModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    processor = transformers.SamImageProcessorPil.from_pretrained(tmp_path / "hf")
    transformers.SamProcessor(processor).save_pretrained(tmp_path / "again")
    with pytest.raises(UserError, match=r"again/\w+\.json: do_normalize is false, .*=unit"):
        convert(tmp_path / "again", tmp_path / "back.safetensors")
    convert(tmp_path / "again", tmp_path / "back.safetensors", normalise="unit")
    first, second = (read_weights(path)[0] for path in (own, tmp_path / "back.safetensors"))
    assert all(np.array_equal(first[path], second[path]) for path in first | second)


def test_an_official_files_size_comes_back_if_it_is_told(files, tmp_path):
    own = trained_as(files, tmp_path / "own.safetensors", image_size="64")
    _, (_, size) = convert(own, tmp_path / "sam.pth")
    assert size.endswith("needs --image_size=64.")
    convert(tmp_path / "sam.pth", tmp_path / "back.safetensors", image_size=64)
    assert read_weights(tmp_path / "back.safetensors")[1]["image_size"] == "64"


@pytest.mark.parametrize("output", ["sam.pth", "hf"])
def test_masks_that_have_not_learned_are_told(files, tmp_path, output):
    own = trained_as(files, tmp_path / "own.safetensors", mask_choice="single")
    assert "multimask_output=False" in convert(own, tmp_path / output)[1][-1]
    own = trained_as(files, tmp_path / "own.safetensors", mask_choice="index 2")
    assert "mask_choice=index 2: " in convert(own, tmp_path / f"2{output}")[1][-1]


@pytest.mark.parametrize(("normalise", "stretched"), [("unit", False), ("minmax", True)])
def test_an_official_export_says_what_its_file_cannot(files, tmp_path, normalise, stretched):
    own = trained_as(files, tmp_path / "own.safetensors", normalise=normalise, image_size="64")
    _, (registry, size, scale) = convert(own, tmp_path / "sam.pth")
    assert "registry builds vit_b, vit_l and vit_h, no mini" in registry
    assert "image_size=64" in size and "128 alone" in size
    assert f"normalise={normalise}" in scale and ("Stretch" in scale) == stretched
    # What it advises leads to [0, 1].
    sam = build(MINI)
    for call in re.findall(r"sam\.\w+\.fill_\(\d+\)", scale):
        eval(call)
    picture = torch.arange(3 * 128 * 128).reshape(3, 128, 128) % 256
    assert torch.equal(sam.preprocess(picture), picture / 255)


def test_nothing_is_said_where_the_packages_do_as_the_run_did(files, tmp_path):
    own = trained_as(files, tmp_path / "own.safetensors", normalise="sam", image_size="128")
    assert convert(own, tmp_path / "hf") == ("mini", [])


def run(*arguments):
    command = [sys.executable, "-m", "convert.sam", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(files, tmp_path):
    done = run(f"--input={files / 'sam.pth'}", f"--output={tmp_path / 'back.pth'}")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told[0] == f"{tmp_path / 'back.pth'}: mini" and len(told) == 2
    assert told[1].startswith("note: segment_anything's registry builds vit_b")
    failed = run(f"--input={tmp_path / 'none.pth'}", f"--output={tmp_path / 'x.pth'}")
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path / 'none.pth'}: no such file.\n"


_PEAK = """
import pathlib, resource, sys
import torch
from convert.sam import convert
from convert.sam_rules import sam_shapes
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for variant in ("mini", "vit_b"):
    sam_shapes(variant)
given, output = sys.argv[1:]
before = peak()
convert(given, output)
print((peak() - before) / pathlib.Path(output).stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux counts it")
def test_peak_memory(tmp_path):
    """At most 2.5 times the weights, either way; vit_b, 375 MB."""
    keys = OFFICIAL.key_shapes(sam_shapes("vit_b"))
    torch.save({key: torch.rand(shape) for key, shape in keys.items()}, tmp_path / "sam.pth")
    for given, output in (("sam.pth", "sam.safetensors"), ("sam.safetensors", "back.pth")):
        command = [sys.executable, "-c", _PEAK, tmp_path / given, tmp_path / output]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 2.5
