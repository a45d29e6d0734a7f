"""Files and folders of weights that may come in, and those that may not. No torch needed."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, small_config
from safetensors.numpy import save_file
from weight_arrays import assert_equal, random_arrays

from convert import classifier, hf_folder, sam
from convert.classifier_rules import TORCHVISION, classifier_shapes
from convert.hf_rules import HUGGING_FACE
from convert.sam_rules import OFFICIAL, sam_shapes
from sammix_jax.config_files import claim_workdir
from sammix_jax.data.files import write_json
from sammix_jax.errors import UserError
from sammix_jax.weights import load_predictor, read_weights, write_weights


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def test_hugging_face_files_need_no_torch(no_torch, tmp_path):
    ours = random_arrays(sam_shapes("mini"))
    save_file(HUGGING_FACE.to_theirs(dict(ours)), tmp_path / "model.safetensors", {"format": "pt"})
    out = tmp_path / "sam.safetensors"
    assert sam.convert(tmp_path, out) == ("mini", [])  # the folder, as downloaded
    found, metadata = read_weights(out)
    assert_equal(found, ours)
    assert (metadata["kind"], metadata["model"]) == ("sam", "mini")
    assert metadata["source"] == "model.safetensors" and len(metadata["sha256"]) == 64

    half = tmp_path / "half.safetensors"
    sam.convert(out, half, dtype="bfloat16")
    assert half.stat().st_size < 0.51 * out.stat().st_size
    assert {str(array.dtype) for array in read_weights(half)[0].values()} == {"bfloat16"}


@pytest.mark.parametrize("prefix", ["module.", "sam.", "net.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("table", [OFFICIAL, HUGGING_FACE], ids=["official", "hf"])
def test_what_all_keys_begin_with_is_taken_off(tmp_path, table, prefix):
    ours = random_arrays(sam_shapes("mini"))
    theirs = {f"{prefix}{key}": array for key, array in table.to_theirs(dict(ours)).items()}
    save_file(theirs, tmp_path / "given.safetensors")
    sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")
    assert_equal(read_weights(tmp_path / "sam.safetensors")[0], ours)


def test_a_key_without_the_others_beginning_is_named(tmp_path):
    theirs = OFFICIAL.to_theirs(random_arrays(sam_shapes("mini")))
    mixed = {f"sam.{key}": array for key, array in theirs.items()} | {"head.bias": np.zeros(2)}
    save_file(mixed, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match=r"mini: 1 unexpected \(head\.bias \(without sam\.\)\)"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")


@pytest.mark.parametrize("twice", [True, False])
def test_two_modules_are_not_taken_for_one(tmp_path, twice):
    """A wrapper beside a copy of its decoder; and a model in two halves."""
    theirs = OFFICIAL.to_theirs(random_arrays(sam_shapes("mini")))
    copied = {key: value for key, value in theirs.items() if key.startswith("mask_decoder.")}
    inside = theirs if twice else {k: v for k, v in theirs.items() if k not in copied}
    save_file(
        {f"sam.{key}": array for key, array in inside.items()} | copied,
        tmp_path / "given.safetensors",
    )
    with pytest.raises(UserError, match=rf"{len(copied)} unexpected \(mask_decoder.*without sam"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")


def test_a_part_that_was_compiled(tmp_path):
    ours = random_arrays(sam_shapes("mini"))
    theirs = {
        key.replace("image_encoder.", "image_encoder._orig_mod."): array
        for key, array in OFFICIAL.to_theirs(dict(ours)).items()
    }
    save_file(theirs, tmp_path / "given.safetensors")
    sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")
    assert_equal(read_weights(tmp_path / "sam.safetensors")[0], ours)


@pytest.mark.parametrize(
    "key", ["blocks.0.attn.qkv.lora_A.default.weight", "a.linear_b_v.weight", "w_b_001"]
)
def test_lora_that_is_not_merged(tmp_path, key):
    theirs = OFFICIAL.to_theirs(random_arrays(sam_shapes("mini"))) | {key: np.ones((2, 2), "f4")}
    save_file(theirs, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match=r"LoRA that is not merged \(.*merge_and_unload"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")


def test_what_is_known_of_the_images_comes_back_from_a_folder(tmp_path):
    metadata = {"kind": "sam", "model": "mini", "source": "", "sha256": ""}
    known = {"normalise": "minmax", "image_size": "128"}
    write_weights(tmp_path / "a.safetensors", random_arrays(sam_shapes("mini")), metadata | known)
    (tmp_path / "sam.v1").mkdir()  # empty, and with what looks like an ending
    sam.convert(tmp_path / "a.safetensors", tmp_path / "sam.v1", "hf")
    sam.convert(tmp_path / "sam.v1", tmp_path / "b.safetensors")
    found = read_weights(tmp_path / "b.safetensors")[1]
    assert {key: found[key] for key in known} == known


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", [], r"config\.json: holds '\[\]', expected a JSON object"),
        ("config.json", {"vision_config": None}, r"vision_config is None, expected an object"),
        (
            "config.json",
            {"mask_decoder_config": {"num_attention_heads": 2}},
            r"mask_decoder_config\.num_attention_heads=2, expected 4",
        ),
        (
            "config.json",
            {"vision_config": {"hidden_act": "relu"}},
            r"vision_config\.hidden_act=relu, expected gelu",
        ),
        ("preprocessor_config.json", None, r"holds 'None', expected a JSON object"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, r"image_mean=.* --normalise=sam"),
        (
            "processor_config.json",
            {"image_processor": {"image_std": [0.5] * 3}},
            r"processor_config\.json: image_std=\[0\.5, 0\.5, 0\.5\], expected SAM's \[0\.229",
        ),
        (
            "processor_config.json",
            {"image_processor": {"do_normalize": False}},
            "do_normalize is false, .*--normalise=unit",
        ),
    ],
)
def test_a_folders_config_that_does_not_go_with_the_model(tmp_path, name, content, match):
    theirs = HUGGING_FACE.to_theirs(random_arrays(sam_shapes("mini")))
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_json(tmp_path / name, content)
    with pytest.raises(UserError, match=match):
        sam.convert(tmp_path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_a_folders_configs_say_is_held_against_the_model(tmp_path):
    """As `save_pretrained` leaves them, which keeps no metadata of ours beside the weights."""
    theirs = HUGGING_FACE.to_theirs(random_arrays(sam_shapes("mini")))
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out.safetensors"

    def write(heads=3, **processor):
        write_json(tmp_path / "config.json", {"vision_config": {"num_attention_heads": heads}})
        write_json(tmp_path / "preprocessor_config.json", processor)

    write(heads=6)
    with pytest.raises(UserError, match=r"config\.json: .*heads=6, expected 3"):
        sam.convert(tmp_path, out)
    write(do_normalize=False)
    with pytest.raises(UserError, match=r"do_normalize is false, .*--normalise=unit"):
        sam.convert(tmp_path / "model.safetensors", out)
    sam.convert(tmp_path, out, normalise="unit")
    assert read_weights(out)[1]["normalise"] == "unit"
    write(do_normalize=True)
    assert sam.convert(tmp_path, out) == ("mini", [])


def test_a_beginning_that_is_called_lora_is_none(tmp_path):
    ours = random_arrays(sam_shapes("mini"))
    theirs = {f"lora_sam.{key}": array for key, array in OFFICIAL.to_theirs(dict(ours)).items()}
    save_file(theirs, tmp_path / "given.safetensors")
    sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")
    assert_equal(read_weights(tmp_path / "sam.safetensors")[0], ours)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"image_size": "big"}, r"given\.safetensors: says image_size=big, expected a multiple"),
        ({"normalise": "imagenet"}, "says normalise=imagenet, expected one of unit, minmax, sam"),
        ({"mask_choice": "best"}, "says mask_choice=best, expected one of argmax_iou, single"),
    ],
)
def test_what_a_foreign_file_says_of_its_images_is_checked(tmp_path, metadata, match):
    theirs = HUGGING_FACE.to_theirs(random_arrays(sam_shapes("mini")))
    save_file(theirs, tmp_path / "given.safetensors", metadata)
    with pytest.raises(UserError, match=match):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")


def test_adapters_between_the_layers_are_another_model(tmp_path):
    key = "image_encoder.blocks.0.Adapter.channel.0.weight"
    theirs = OFFICIAL.to_theirs(random_arrays(sam_shapes("mini"))) | {key: np.ones((2, 2), "f4")}
    save_file(theirs, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match=r"adapters \(.*Adapter\.channel.*another model"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors")


def test_arrays_of_double_length_are_named(tmp_path):
    theirs = OFFICIAL.to_theirs(random_arrays(sam_shapes("mini")))
    key = "mask_decoder.iou_token.weight"
    save_file(theirs | {key: np.float64(theirs[key])}, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match=r"given.*: mask_decoder\.iou_token\.weight: .*float64"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "hf")
    sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors", dtype="float32")


def test_weights_are_no_whole_numbers(tmp_path):
    theirs = OFFICIAL.to_theirs(random_arrays(sam_shapes("mini")))
    quantised = {key: (10 * array).astype(np.int8) for key, array in theirs.items()}
    save_file(quantised, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match="an array of int8 where a model has weights"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "sam.safetensors", dtype="float32")


def test_what_is_given_stays(tmp_path):
    path = tmp_path / "sam.safetensors"
    save_file(OFFICIAL.to_theirs(random_arrays(sam_shapes("mini"))), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="is the input; give another name"):
        sam.convert(path, path, dtype="float16")
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="is the input; give another name"):
        classifier.convert(path, path)
    folder = tmp_path / "hf"
    sam.convert(path, folder)
    with pytest.raises(UserError, match=r"hf/model\.safetensors: is the input; give another"):
        sam.convert(folder, folder / "model.safetensors")
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["hf", "sam.safetensors"])
def test_an_output_below_a_file(tmp_path, name):
    path = tmp_path / "sam.safetensors"
    save_file(OFFICIAL.to_theirs(random_arrays(sam_shapes("mini"))), path)
    with pytest.raises(UserError, match="could not be written"):
        sam.convert(path, path / name)


def test_a_file_that_nobody_may_read(tmp_path, monkeypatch):
    path = tmp_path / "sam.pth"
    path.touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UserError, match=r"sam\.pth: cannot be read \(.*Permission denied"):
        sam.convert(path, tmp_path / "out.safetensors")


def test_folders_that_hold_no_one_file(tmp_path):
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            sam.convert(tmp_path, tmp_path / "sam.safetensors")

    refused("no model.safetensors")
    (tmp_path / "adapter_model.safetensors").touch()
    refused(r"PEFT's adapter_model\.safetensors, which is LoRA alone")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "checkpoints").mkdir()  # as Lightning has, without a config of ours
    refused("no config.json with checkpoints")
    (tmp_path / "model.safetensors.index.json").touch()
    refused(r"a model in several files \(model\.safetensors\.index\.json\)")
    with pytest.raises(UserError, match="a folder, expected a file"):
        classifier.convert(tmp_path, tmp_path / "resnet.safetensors")


def test_a_pretraining_wrote_its_file(tmp_path):
    claim_workdir(small_config(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "sam_tiny.safetensors").touch()
    with pytest.raises(UserError, match=r"which wrote .*sam_tiny\.safetensors: give that"):
        sam.convert(tmp_path, tmp_path / "sam.pth")


def test_the_file_may_not_tell_its_images(tmp_path):
    """As MedSAM's, which has SAM's layout and images of another scale."""
    save_file(
        HUGGING_FACE.to_theirs(random_arrays(sam_shapes("mini"))), tmp_path / "medsam.safetensors"
    )
    out = tmp_path / "out.safetensors"
    sam.convert(tmp_path / "medsam.safetensors", out, normalise="minmax")
    assert read_weights(out)[1]["normalise"] == "minmax"
    with pytest.raises(UserError, match="learned from images normalised by 'minmax'"):
        load_predictor(out)
    with pytest.raises(UserError, match=r"says normalise=minmax, and --normalise=sam"):
        sam.convert(out, tmp_path / "again.safetensors", normalise="sam")


def test_a_folder_that_cannot_be_finished_is_left_empty(tmp_path, monkeypatch):
    save_file(
        HUGGING_FACE.to_theirs(random_arrays(sam_shapes("mini"))), tmp_path / "sam.safetensors"
    )
    save = hf_folder.save_arrays

    def full(path, *_):
        raise UserError(f"{path}: could not be written (full)")

    monkeypatch.setattr(hf_folder, "save_arrays", full)
    with pytest.raises(UserError, match="full"):
        sam.convert(tmp_path / "sam.safetensors", tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == []
    monkeypatch.setattr(hf_folder, "save_arrays", save)
    sam.convert(tmp_path / "sam.safetensors", tmp_path / "hf")
    assert len(list((tmp_path / "hf").iterdir())) == 3


def test_a_converter_leaves_the_accelerator_alone(tmp_path):
    """Another job may hold it; here there is none of that name."""
    save_file(HUGGING_FACE.to_theirs(random_arrays(sam_shapes("mini"))), tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "convert.sam"]
    command += [f"--input={tmp_path / 'a.safetensors'}", f"--output={tmp_path / 'b.safetensors'}"]
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'b.safetensors'}: mini\n"


def test_a_run_whose_decoder_is_no_sams_is_refused(tmp_path):
    config = small_config()
    config.cam.fusion = "concat"
    claim_workdir(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"cam\.fusion=concat, .*expected add or none"):
        sam.convert(tmp_path, tmp_path / "sam.safetensors")


def test_timm_files_need_no_torch(no_torch, tmp_path):
    ours = random_arrays(classifier_shapes("resnet18"))
    theirs = TORCHVISION.to_theirs(dict(ours))
    theirs["fc.weight"] = np.zeros((1000, 512), np.float32)
    theirs["bn1.num_batches_tracked"] = np.array(7)
    save_file(theirs, tmp_path / "model.safetensors")
    assert (
        classifier.convert(tmp_path / "model.safetensors", tmp_path / "c.safetensors") == "resnet18"
    )
    found, metadata = read_weights(tmp_path / "c.safetensors")
    assert_equal(found, ours)
    assert (metadata["kind"], metadata["model"]) == ("classifier", "resnet18")


def test_a_pth_without_torch_says_what_to_install(no_torch, tmp_path):
    (tmp_path / "sam.pth").touch()
    with pytest.raises(UserError, match=r"pip install -r requirements/convert\.txt"):
        sam.convert(tmp_path / "sam.pth", tmp_path / "sam.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["sam.pth"]
