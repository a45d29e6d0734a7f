"""Every layout of devices takes the same steps."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from layouts import LAYOUTS
from processes import finish, start, start_several
from toy import Toy, toy_state

from sammix_jax.config_rules import check_config
from sammix_jax.errors import UserError
from sammix_jax.sharding import (
    BatchLayout,
    batch_layout,
    divided,
    filled_batch,
    make_mesh,
    place_batch,
    state_sharding,
)
from sammix_jax.systems.sam_mix import SamMixSystem
from sammix_jax.training.optim import make_optimiser
from sammix_jax.training.step import TrainState, make_train_step

# Who asks for the layouts first waits until all of them are compiled and have run.
pytestmark = pytest.mark.timeout(2400)

TOLERANCE = 1e-5

# What a layout changes is what is shared out, not how well a program is optimised.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="session")
def steps_taken(tmp_path_factory):
    """'DEVICES-FSDP-ACCUMULATE' → what ten steps gave: on eight devices of one process, and on
    four devices of two. 'resumed': half on one device, the others from its checkpoint on eight."""
    folder = tmp_path_factory.mktemp("layouts")
    finish(start(["tests/layouts.py", folder / "one.npz"], devices=8, **QUICK), seconds=1500)
    pair = start_several(["tests/layouts.py", folder / "two.npz"], 2, devices=2, **QUICK)
    for process in pair:
        finish(process, seconds=800)
    found = {}
    for name in ("one.npz", "two.npz"):
        for key, value in np.load(folder / name).items():
            layout, leaf = key.split(":", 1)
            found.setdefault(layout, {})[leaf] = value
    return found


def relative(found: dict, expected: dict, part: str) -> float:
    """The norm of the difference of all leaves of a part, over their norm."""
    leaves = [leaf for leaf in expected if leaf.startswith(part)]
    assert len(leaves) > 10
    norm = lambda values: np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in values))  # noqa: E731
    return norm(found[k] - expected[k] for k in leaves) / norm(expected[k] for k in leaves)


@pytest.mark.parametrize(
    "layout",
    ["resumed", *("-".join(map(str, layout)) for some in LAYOUTS.values() for layout in some)],
)
def test_ten_steps_are_the_same_in_every_layout(steps_taken, layout):
    """On 1, 2, 4 (of two processes) and 8 devices; divided along data, fsdp (`mesh.fsdp`,
    `mesh.shard_frozen`) and both; with the gradient in one part and in two (`train.accumulate`)."""
    accumulate = "2" if layout.endswith("2") else "1"
    expected, found = steps_taken[f"1-1-{accumulate}"], steps_taken[layout]
    assert expected["loss"][-1] < 0.9 * expected["loss"][0]  # the steps were no small ones
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=TOLERANCE)
    assert relative(found, expected, "params") < TOLERANCE
    assert relative(found, expected, "stats") < TOLERANCE


def test_weights_in_parts_predict_what_whole_ones_do(steps_taken):
    whole, parts = steps_taken["1-1-1"], steps_taken["8-8-1"]
    kinds = [leaf for leaf in whole if leaf.startswith("predicted")]
    assert len(kinds) == 2
    for kind in kinds:
        scale = np.abs(whole[kind]).max()
        assert np.ptp(whole[kind]) > 100 * TOLERANCE * scale  # more than what is allowed
        np.testing.assert_allclose(parts[kind], whole[kind], rtol=0, atol=TOLERANCE * scale)


def test_parts_of_a_batch_see_their_own_statistics(steps_taken):
    """So that `train.accumulate` is no mere matter of memory where BatchNorm learns."""
    one, two = (steps_taken[f"1-1-{accumulate}"]["loss"] for accumulate in (1, 2))
    assert abs(two[0] / one[0] - 1) > 10 * TOLERANCE


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("unroll", [True, False])
def test_accumulated_gradients_are_those_of_the_whole_batch(config, microbatches, unroll):
    """Though its parts know different numbers of image-level labels; without BatchNorm."""
    config.train.augment = True
    optimiser = make_optimiser(config.train, 10)
    rng = np.random.default_rng(0)
    batch = {
        "hu": rng.normal(0, 100, (8, 16, 16)).astype(np.int16),
        "mask": rng.integers(0, 2, (4, 16, 16)).astype(np.uint8),
        "image_label": np.array([1, 0, 1, 1, -1, -1, 0, -1], np.int32),
    }

    def after(parts: int):
        layout = BatchLayout(4, 4, 1, parts)
        step = jax.jit(
            make_train_step(SamMixSystem(Toy(), config), optimiser, config, layout, unroll)
        )
        rows = {len(batch["hu"]): layout.order, 4: layout.order[layout.order < 4]}
        ordered = {name: array[rows[len(array)]] for name, array in batch.items()}
        return step(toy_state(optimiser), ordered)

    (whole, metrics), (parted, parted_metrics) = after(1), after(microbatches)
    assert metrics["gradient_norm"] > 0
    for a, b in ((whole.trainable, parted.trainable), (metrics, parted_metrics)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), a, b)


def test_every_shard_and_every_part_has_its_quota():
    layout = BatchLayout(8, 16, shards=4, microbatches=2)
    assert sorted(layout.order) == list(range(24))
    rows = layout.order.reshape(4, 2, 3)  # shards, microbatches, slices
    assert (rows[..., :1] < 8).all() and (rows[..., 1:] >= 8).all()
    # A microbatch holds the same slices on any number of shards.
    for part in range(2):
        alone = BatchLayout(8, 16, 1, 2).order.reshape(2, 12)[part]
        assert sorted(rows[:, part].ravel()) == sorted(alone)


def test_parts_are_taken_out_and_joined_again():
    layout = BatchLayout(4, 6, shards=2)
    x = jnp.asarray(layout.order)
    np.testing.assert_array_equal(layout.first(x), [0, 1, 2, 3])
    np.testing.assert_array_equal(layout.rest(x), [4, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(layout.join(layout.first(x), layout.rest(x)), x)
    parts = BatchLayout(4, 8, shards=2, microbatches=2)
    for part, rows in enumerate(parts.split_microbatches(jnp.asarray(parts.order))):
        np.testing.assert_array_equal(parts.microbatch.first(rows), [2 * part, 2 * part + 1])


class Numbers:
    """Batches of slices that hold their own number; keeps the rows it was asked for."""

    def __init__(self):
        self.rows = []

    def __call__(self, step, rows):
        self.rows.append(list(rows))
        hu = np.array([np.full((2, 2), row, np.int16) for row in rows])
        masks = [np.full((2, 2), row, np.uint8) for row in rows if row < 2]
        return {"hu": hu, "mask": np.array(masks), "image_label": np.array(rows, np.int32)}


def test_a_batch_travels_as_it_is_stored():
    """The int16 slice, its byte mask if it is labelled, its label; nothing more."""
    layout, mesh = BatchLayout(2, 4, 1, 2), make_mesh()
    read = Numbers()
    batch = place_batch(read, 0, layout, mesh)
    assert read.rows == [[0, 2, 3, 1, 4, 5]]
    np.testing.assert_array_equal(batch["image_label"], [0, 2, 3, 1, 4, 5])
    np.testing.assert_array_equal(batch["mask"][:, 0, 0], [0, 1])
    sizes = {name: array.nbytes for name, array in batch.items()}
    assert sizes == {"hu": 6 * 4 * 2, "mask": 2 * 4, "image_label": 6 * 4}


def test_several_machines_with_gpus_are_one_mesh(monkeypatch):
    """Each has a `slice_index` of its own; what `fsdp` divides stays within a machine."""
    gpus = [
        types.SimpleNamespace(
            id=i, process_index=i, slice_index=i // 4, platform="gpu", device_kind="NVIDIA H100"
        )
        for i in range(8)
    ]
    monkeypatch.setattr("sammix_jax.sharding.Mesh", lambda arranged, *_, **__: arranged)
    for fsdp in (1, 4):
        arranged = make_mesh(fsdp, gpus)
        assert arranged.shape == (8 // fsdp, fsdp)
        assert all(len({gpu.slice_index for gpu in row}) == 1 for row in arranged)


def test_large_leaves_are_divided_along_their_longest_axis():
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 4})
    spec = lambda *shape: divided(types.SimpleNamespace(shape=shape), mesh).spec  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sammix_jax.sharding.NamedSharding", lambda _, s: types.SimpleNamespace(spec=s)
        )
        assert spec(3, 3, 256, 512) == PartitionSpec(None, None, None, "fsdp")
        assert spec(1024, 250) == PartitionSpec("fsdp")
        assert spec(251, 253) == PartitionSpec()  # nothing to divide
        assert spec(64) == PartitionSpec()  # small


def test_frozen_leaves_are_divided_where_the_config_says_so():
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 2})
    leaf = {"kernel": types.SimpleNamespace(shape=(256, 128))}
    state = TrainState(leaf["kernel"], leaf, leaf, {}, {}, leaf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sammix_jax.sharding.NamedSharding", lambda _, spec: spec)
        whole, parted = (state_sharding(state, mesh, shard_frozen=b) for b in (False, True))
    parts, one = {"kernel": PartitionSpec("fsdp")}, {"kernel": PartitionSpec()}
    assert whole.trainable == parted.trainable == whole.teacher == parts
    assert (whole.frozen, parted.frozen) == (one, parts)


def test_a_batch_of_slices_to_predict_is_filled_up_for_all_devices():
    mesh = types.SimpleNamespace(size=8)
    assert [filled_batch(mesh, size) for size in (1, 8, 9, 32)] == [8, 8, 16, 32]


def test_refusals(config, caplog):
    with pytest.raises(UserError, match=r"mesh\.fsdp=3: does not divide the 1 devices"):
        make_mesh(3)
    with pytest.raises(UserError, match="the 2 devices are of 2 TPU slices, expected one"):
        make_mesh(1, [types.SimpleNamespace(slice_index=i, platform="tpu") for i in (0, 1)])
    config.train.batch_labelled, config.train.batch_unlabelled = 4, 2
    config.train.accumulate = 4
    with pytest.raises(UserError, match=r"train\.accumulate=4: expected a divisor .*unlabelled=2"):
        check_config(config)
    config.train.accumulate = 1
    eight = types.SimpleNamespace(size=8)
    assert batch_layout(config.train, eight).shards == 1
    assert "cannot be divided over 8 devices" in caplog.text
    config.train.batch_labelled, config.train.batch_unlabelled = 8, 16
    assert batch_layout(config.train, eight).shards == 8
