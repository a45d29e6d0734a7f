"""What a run will take is told before it."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from sammix_jax import plan, sweep
from sammix_jax.errors import UserError
from sammix_jax.flops import count_flops
from sammix_jax.models.blocks import POLICIES
from sammix_jax.plan import GIB, StepPlan, Target, count_collectives, find_target
from sammix_jax.presets import apply_preset
from sammix_jax.sharding import make_mesh

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no compiler for TPUs here; make test-tpu has one",
)


def test_products_and_convolutions_are_counted():
    a, b = jnp.ones((3, 5)), jnp.ones((5, 7))
    assert count_flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7
    batched = functools.partial(jnp.einsum, "bmd,bnd->bmn")
    assert count_flops(batched, jnp.ones((2, 3, 5)), jnp.ones((2, 4, 5))) == 2 * 2 * 3 * 4 * 5
    images, kernel = jnp.ones((2, 8, 6, 4)), jnp.ones((3, 3, 4, 5))

    def convolve(x, k, groups=1):
        return jax.lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    forward = 2 * (2 * 4 * 3 * 5) * (3 * 3 * 4)
    assert count_flops(convolve, images, kernel) == forward
    # Backward, the same products once more, and none with the zeros between.
    back = jax.linear_transpose(lambda x: convolve(x, kernel), images)
    assert count_flops(back, jnp.ones((2, 4, 3, 5))) == forward
    grouped = functools.partial(convolve, groups=2)
    assert count_flops(grouped, images, kernel[:, :, :2, :4]) == 2 * (2 * 4 * 3 * 4) * (3 * 3 * 2)


def test_loops_count_as_often_as_they_run():
    a = jnp.ones((4, 4))
    once = 2 * 4**3
    assert count_flops(lambda a: jax.lax.map(lambda x: x @ a, jnp.ones((6, 4, 4))), a) == 6 * once
    assert count_flops(jax.jit(lambda a: jax.lax.fori_loop(0, 5, lambda _, x: x @ a, a)), a) == (
        5 * once
    )
    assert count_flops(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a), a) == (
        2 * once
    )


def test_a_recomputed_product_counts_again():
    loss = lambda a, wrap: jnp.sum(jnp.sin(wrap(lambda a: jnp.sin(a @ a) @ a)(a)))  # noqa: E731
    a = jnp.ones((4, 4))
    wraps = (lambda f: f, jax.checkpoint)
    plain, again = (count_flops(jax.grad(functools.partial(loss, wrap=w)), a) for w in wraps)
    assert plain < again <= plain + 2 * 2 * 4**3


def test_collectives_are_told_apart():
    text = """
      %a = f32[4] all-reduce(%x), replica_groups={}
      %b = (f32[4], f32[4]) all-gather-start(%x)
      %c = f32[4] all-gather-done(%b)
      %all-reduce.7 = f32[] fusion(%a), calls=%all-reduce-scatter
      %d = f32[2] reduce-scatter(%x)
    """
    assert count_collectives(text) == {"all-reduce": 1, "all-gather": 1, "reduce-scatter": 1}


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        ("v9z:2x4", "expected cpu, gpu, tpu, or a chip"),
        ("v5e", "as in v5e:2x4"),
        ("gpu", "no such device at hand"),
    ],
)
def test_refusals(topology, told):
    with pytest.raises(UserError, match=told):
        find_target(topology)


def check(plans: list[StepPlan], target: Target, config) -> None:
    train, predict = plans
    assert (train.name, predict.name) == ("train", "predict")
    assert train.slices == config.train.batch_labelled + config.train.batch_unlabelled
    trained = train.parts["trained parameters"]
    # Adam has two moments of every parameter, and counters.
    assert 2 * trained <= train.parts["optimiser"] <= 2 * trained + 64
    assert predict.parts["trained parameters"] == trained and "optimiser" not in predict.parts
    assert train.total >= sum(train.parts.values()) > 3 * trained
    assert train.flops > 2 * predict.flops * train.slices / predict.slices > 0
    table = plan.plan_table(plans, target)
    assert "activations" in table and "fits" in table and "TFLOP" in table


def test_the_real_steps_are_planned_for_the_devices_at_hand(config):
    target = find_target("cpu")
    assert target.memory > GIB and target.devices == jax.devices("cpu")
    plans = plan.plan(config, target)
    check(plans, target, config)
    assert not plans[0].collectives
    small = Target("small", target.devices, plans[0].total - 1)
    assert "DOES NOT FIT" in plan.plan_table(plans, small)


@needs_libtpu
def test_the_step_compiles_for_a_tpu_without_one(config):
    config.train.batch_labelled = config.train.batch_unlabelled = 4
    config.mesh.fsdp = 2
    target = find_target("v5e:2x2")
    assert len(target.devices) == 4 and target.memory == 15.75 * GIB
    assert {device.platform for device in target.devices} == {"tpu"}
    plans = plan.plan(config, target)
    check(plans, target, config)
    # Gradients and statistics are summed; parameters that lie in parts are gathered.
    assert plans[0].collectives["all-reduce"] > 0
    assert all(found.collectives["all-gather"] > 0 for found in plans)
    with pytest.raises(UserError, match=r"v5e:3x5: cannot be compiled for"):
        find_target("v5e:3x5")


@needs_libtpu
def test_slices_of_tpus_of_every_size():
    """A chip of v4 is one device, of the memory of both its cores."""
    v4 = find_target("v4:2x2x1")
    assert (len(v4.devices), v4.memory) == (4, 30.75 * GIB)
    for topology, count in {"v5e:1x1": 1, "v6e:2x1": 2, "v5p:1x1x1": 1, "v5e:2x4": 8}.items():
        assert len(find_target(topology).devices) == count


@needs_libtpu
@pytest.mark.parametrize("fsdp", [1, 2, 8, 16])
def test_a_mesh_of_tpus_may_divide_their_torus(fsdp):
    mesh = make_mesh(fsdp, find_target("v6e:4x4").devices)
    assert dict(mesh.shape) == {"data": 16 // fsdp, "fsdp": fsdp}
    assert len(set(mesh.devices.flat)) == 16


def test_what_an_exhausted_compiler_says_is_taken():
    told = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    assert plan.exhausted_bytes(told + "temporaries (26.25G) exceeds available HBM (15.75G).") == (
        26.25 * GIB
    )
    assert plan.exhausted_bytes("RESOURCE_EXHAUSTED: no more") == math.inf


@pytest.mark.parametrize("gives_up", [False, True])
@pytest.mark.parametrize("memory", [1000, 1700, 2049, 9990, 50_000])
def test_the_sweep_finds_the_largest_batch(config, monkeypatch, memory, gives_up, caplog):
    """Where memory is 900 bytes and 90 a slice, a little more for large batches; also by a compiler
    that does not say how much is too much."""
    config.train.batch_labelled, config.train.batch_unlabelled = 2, 6  # 1 to 3
    target = Target("fake", [None] * 2, memory)

    def planned(config, _):
        labelled, unlabelled = config.train.batch_labelled, config.train.batch_unlabelled
        assert unlabelled == 3 * labelled and labelled % 2 == 0
        slices = labelled + unlabelled
        total = 900 + 90 * slices + slices**2 // 50
        told = math.inf if gives_up and total > memory else total
        return StepPlan("train", slices, {}, told, 0, {})

    monkeypatch.setattr(sweep, "plan_train", planned)
    caplog.set_level("INFO")
    found = list(sweep.sweep(config, target))
    assert {(o["model.dtype"], o["model.remat"]) for o, _ in found} == {
        (dtype, remat) for dtype in ("float32", "bfloat16") for remat in POLICIES
    }
    assert len(found) == 12  # attention in chunks and whole
    assert caplog.messages[0].startswith("8 slices take ")  # each compilation is told
    fitting = [n for n in range(8, 800, 8) if 900 + 90 * n + n**2 // 50 <= memory]
    for options, best in found:
        slices = options["train.batch_labelled"] + options["train.batch_unlabelled"]
        line = sweep.sweep_line(options, best)
        if fitting:
            assert best.slices == slices == max(fitting)
            assert f"{options['train.batch_labelled']}+" in line
        else:
            assert best is None and "does not fit" in line
    assert (config.train.batch_labelled, config.train.batch_unlabelled) == (2, 6)


def test_a_larger_batch_that_takes_less_foretells_nothing(config, monkeypatch):
    config.train.batch_labelled = config.train.batch_unlabelled = 1
    tried = []

    def planned(config, _):
        tried.append(config.train.batch_labelled)
        total = {1: 318, 2: 313}.get(tried[-1], 300 + 10 * tried[-1])
        return StepPlan("train", 2 * tried[-1], {}, total, 0, {})

    monkeypatch.setattr(sweep, "plan_train", planned)
    _, best = next(sweep.sweep(config, Target("fake", [None], 1575)))
    assert best.slices == 2 * 127 and max(tried) < 1000


def test_the_sweep_tries_what_the_system_knows(config, monkeypatch):
    config.model.system = "unet"
    monkeypatch.setattr(sweep, "plan_train", lambda *_: StepPlan("train", 8, {}, 2000, 0, {}))
    tried = [options for options, _ in sweep.sweep(config, Target("fake", [None], 1000))]
    assert [o["model.dtype"] for o in tried] == ["float32", "bfloat16"]
    assert {o["model.remat"] for o in tried} == {"none"}


def test_the_sweep_leaves_out_what_no_run_may_have(config, monkeypatch, caplog):
    """Inputs in a twentieth of [0, 1], as the authors have them, bfloat16 would round away."""
    apply_preset(config, "paper")
    config.input.normalise, config.train.augment = "unit", False
    monkeypatch.setattr(sweep, "plan_train", lambda *_: StepPlan("train", 8, {}, 2000, 0, {}))
    caplog.set_level("INFO")
    tried = [options for options, _ in sweep.sweep(config, Target("fake", [None], 1000))]
    assert {o["model.dtype"] for o in tried} == {"float32"}
    assert "left out: config: input.normalise='unit': expected minmax" in caplog.text


def test_operations_are_counted_without_a_gpus_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with plan._no_fused_kernels():
        assert jax.config.jax_default_device == jax.local_devices(backend="cpu")[0]

    def unknown(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", unknown)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="set JAX_PLATFORMS=cuda,cpu or unset it"):
        plan._no_fused_kernels()
