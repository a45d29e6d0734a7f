"""Weight files come back as they were written, and fill a model whole or not at all."""

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import small_config
from flax import traverse_util
from safetensors.numpy import save_file
from sam_cases import TINY

from sammix_jax.errors import UserError
from sammix_jax.sharding import make_mesh, replicated
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.start import load_pretrained
from sammix_jax.training.step import make_init
from sammix_jax.weights import fill, load_weights, read_weights, write_weights

METADATA = {"kind": "sam", "model": "mini", "source": "a.pth", "sha256": "0"}


def shape(*sizes, dtype=np.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_arrays_and_metadata_come_back(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    arrays = {
        "a/kernel": values.astype(np.float32).T,  # not contiguous
        "a/bias": values.astype(np.float16),
        "b": values.astype(ml_dtypes.bfloat16),
    }
    path = tmp_path / "new" / "w.safetensors"
    write_weights(path, arrays, METADATA)
    found, metadata = read_weights(path)
    assert metadata == {**METADATA, "format": "sammix_jax", "version": "1"}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"w\.safetensors: no such file"):
        read_weights(path)
    for name, kind in (("sam_vit_b_01ec64.pth", "file of another kind"), ("hf", "folder")):
        other = tmp_path / name
        other.mkdir() if kind == "folder" else other.touch()
        with pytest.raises(UserError, match=rf"{name}: a {kind}, .*python -m convert\.sam"):
            read_weights(other)
    write_weights(path, {"a": np.zeros(9, np.float32)}, METADATA)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"w\.safetensors: cannot be read"):
        read_weights(path)
    save_file({"a": np.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"of another kind .*convert\.sam"):
        read_weights(path)


def test_only_known_types_and_kinds_are_written(tmp_path):
    with pytest.raises(UserError, match="arrays of type float64, int64"):
        write_weights(tmp_path / "w", {"a": np.zeros(2), "b": np.arange(2)}, METADATA)
    with pytest.raises(UserError, match="kind 'unet'"):
        write_weights(tmp_path / "w", {}, METADATA | {"kind": "unet"})
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, {}, METADATA)
    load_weights(path, "sam", "mini")
    with pytest.raises(UserError, match=r"weights of sam mini, but model\.sam is vit_b"):
        load_weights(path, "sam", "vit_b")
    with pytest.raises(UserError, match=r"weights of sam mini, but model\.classifier is resnet18"):
        load_weights(path, "classifier", "resnet18")


def test_weights_of_images_on_another_scale_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, {}, METADATA | {"normalise": "minmax"})
    load_weights(path, "sam", "mini", choices={"normalise": "minmax"})
    with pytest.raises(UserError, match=r"by 'minmax', .* set --config\.input\.normalise=minmax"):
        load_weights(path, "sam", "mini", choices={"normalise": "sam"})


def test_another_choice_among_the_masks_is_told(tmp_path, caplog):
    path, choices = tmp_path / "w.safetensors", {"normalise": "sam", "mask_choice": "argmax_iou"}
    caplog.set_level("WARNING")
    for known, advice in (("single", "mask_choice=single."), ("index 2", "mask_index=2.")):
        write_weights(path, {}, METADATA | {"mask_choice": known})
        load_weights(path, "sam", "mini", choices)
        assert caplog.messages[-1].endswith(advice) and f"mask_choice={known}, " in caplog.text
        caplog.clear()
        load_weights(path, "sam", "mini", choices | {"mask_choice": known})
        assert not caplog.messages


def test_fill_takes_each_key_once_and_leaves_the_rest():
    leaves = {
        "sam/a": shape(2),
        "sam/lora_q/a": shape(4),
        "sample/a": shape(3),
        "sam/b": shape(2, dtype=ml_dtypes.bfloat16),
    }
    weights = {"a": np.array([1, 2], np.float16), "b": np.ones(2, np.float32)}
    filled = fill(leaves, weights, "sam", source="w", may_lack=(r"lora_[qkv]/[ab]",))
    assert filled.keys() == {"sam/a", "sam/b"}
    assert filled["sam/a"].dtype == np.float32 and filled["sam/b"].dtype == ml_dtypes.bfloat16
    assert filled["sam/a"].tolist() == [1, 2]


def test_fill_lists_every_mistake():
    leaves = {"sam/a": shape(2), "sam/b": shape(2), "sam/c": shape(2)}
    with pytest.raises(UserError) as error:
        fill(leaves, {"a": np.zeros(2), "b": np.zeros(3), "d": np.zeros(1)}, "sam", source="w.st")
    text = str(error.value)
    assert text.startswith("w.st: does not fit the model below 'sam'")
    assert "1 without a value (c)" in text
    assert "1 without a place (d)" in text
    assert "1 of another shape (b (3,), expected (2,))" in text


@pytest.fixture(scope="module")
def start():
    """A config and its jitted initial state, on the mesh."""
    config = small_config()
    init = make_init(SamMixSystem.of(config), make_optimiser(config.train, 1), config)
    sharding = replicated(make_mesh())
    return config, jax.jit(init, out_shardings=sharding)()


def flat(state):
    return state.trainable | state.frozen | traverse_util.flatten_dict(state.batch_stats, sep="/")


def write_random(state, path, kind, model, keep=()):
    """Weights for the part of a state below `kind`, less the leaves that `keep` names."""
    rng = np.random.default_rng(0)
    arrays = {
        name.removeprefix(f"{kind}/"): rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in flat(state).items()
        if name.startswith(f"{kind}/") and not any(part in name for part in keep)
    }
    write_weights(path, arrays, METADATA | {"kind": kind, "model": model})
    return arrays


def test_training_starts_from_both_files(start, tmp_path):
    config, before = start
    config = config.copy_and_resolve_references()
    config.model.sam_weights = str(tmp_path / "sam.safetensors")
    config.model.classifier_weights = str(tmp_path / "classifier.safetensors")
    sam = write_random(before, config.model.sam_weights, "sam", "tiny", ("lora_",))
    classifier = write_random(
        before, config.model.classifier_weights, "classifier", "mini", ("/head/",)
    )
    given = {f"sam/{k}": v for k, v in sam.items()}
    given |= {f"classifier/{k}": v for k, v in classifier.items()}

    before = before.replace(teacher=before.trainable)
    after, _ = load_pretrained(before, config)
    for name, leaf in after.trainable.items():  # the teacher begins where the model does
        np.testing.assert_array_equal(after.teacher[name], leaf)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    first, now = flat(before), flat(after)
    untouched = {name for name in now if "lora_" in name or "/head/" in name}
    assert untouched == now.keys() - given.keys() and len(untouched) == TINY.depth * 4 + 2
    for name, leaf in now.items():
        expected = first[name] if name in untouched else given[name]
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.sharding == first[name].sharding and leaf.dtype == first[name].dtype


def test_without_files_nothing_changes(start):
    config, state = start
    after, step = load_pretrained(state, config)
    assert step is None
    assert all(leaf is flat(state)[name] for name, leaf in flat(after).items())


def test_a_missing_leaf_stops_the_start(start, tmp_path):
    config, state = start
    config = config.copy_and_resolve_references()
    config.model.sam_weights = str(tmp_path / "sam.safetensors")
    write_random(state, config.model.sam_weights, "sam", "tiny", ("lora_", "iou_token"))
    with pytest.raises(UserError, match=r"1 without a value \(mask_decoder/iou_token\)"):
        load_pretrained(state, config)
