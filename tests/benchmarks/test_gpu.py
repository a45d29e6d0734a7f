"""The GPU's tables, by what needs no GPU: operations, rows, and what a failed cell leaves."""

import dataclasses

import jax
import pytest

from benchmarks.speed import gpu
from sammix_jax.flops import count_flops
from sammix_jax.models.sam import VARIANTS
from sammix_jax.models.sam.image_encoder import ImageEncoder


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_operations_are_those_of_the_traced_encoder():
    """At one window an image no token is padding; the trace counts position besides."""
    sizes = VARIANTS["vit_b"]
    side = sizes.window_size * sizes.patch_size
    encoder = ImageEncoder(dataclasses.replace(sizes, image_size=side))
    images = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    params = jax.eval_shape(encoder.init, jax.random.key(0), images)
    counted = count_flops(encoder.apply, params, images)
    assert 1 < counted / gpu.encoder_flops(sizes, side) < 1.02


CELLS = {
    "pytorch": {"time": 0.8, "low": 0.4, "high": 1.6, "peak": 4.0, "device": "NVIDIA H200"},
    "compiled": {"time": 0.2, "low": 0.2, "high": 0.2, "peak": 3.0, "device": "NVIDIA H200"},
    "jax": {"time": 0.1, "low": 0.05, "high": 0.1, "peak": 2.0, "device": "NVIDIA H200"},
}


def test_rows_have_the_columns_of_their_headers(capsys, monkeypatch):
    def measured(form, what, side):
        return CELLS.get(form) if side == 1024 else None

    monkeypatch.setattr(gpu, "measure_apart", measured)
    monkeypatch.setattr("sys.argv", ["gpu", "--sides", "512", "1024", "--step_sides", "1024"])
    gpu.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    header, rule, nothing, encoder, steps, rule_of_steps, step = map(cells, lines)
    assert len(header) == len(rule) == len(nothing) == len(encoder)
    assert len(steps) == len(rule_of_steps) == len(step)
    assert nothing[3:] == ["–"] * 8
    rate = gpu.encoder_flops(VARIANTS["vit_b"], 1024) * 8 / 0.1
    ratios, share = ["8.00", "2.00"], [f"{rate / 1e12:.0f}", f"{rate / 989e12:.0%}"]
    assert encoder[:3] == ["vit_b", "1024", "8"]
    times = ["100.000 (50.000–200.000)", "–", "25.000 (25.000–25.000)", "12.500 (6.250–12.500)"]
    assert encoder[3:] == [*times, *ratios, *share]
    assert step[:2] == ["1024", "4 + 4"]
    times = ["800.0 (400.0–1600.0)", "–", "200.0 (200.0–200.0)", "100.0 (50.0–100.0)"]
    assert step[2:] == [*times, *ratios, "4.0", "–", "3.0", "2.0"]


def test_the_median_of_measures_after_a_warm_up(monkeypatch):
    """A call takes 5 s at first, then 0.1 s, and in the second measure 0.2 s."""
    now, durations = [0.0], iter([5.0, 0.1, 0.1, *[0.1] * 3, *[0.2] * 3, *[0.1] * 9])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(durations)

    found = gpu.timed(call, lambda _: None)
    assert found == pytest.approx({"time": 0.1, "low": 0.1, "high": 0.2})
    assert next(durations, None) is None  # three calls a measure, 0.3 s


def test_a_cell_that_fails_is_told(capfd):
    assert gpu.measure_forms(["jax"], "step", 7) == {}
    assert "jax step 7 failed" in capfd.readouterr().err


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe"])
def test_a_share_of_the_peak_where_it_is_known(device):
    row = gpu.encoder_row("vit_b", 256, {"jax": CELLS["jax"] | {"device": device}})
    assert (cells(row)[-1] == "–") == ("PCIe" in device)
