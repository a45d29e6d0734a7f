"""Files that must not be converted: the error says what they are, and nothing is written."""

import argparse
import os
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install -r requirements/parity.txt")

from safetensors.torch import save_file

from convert import classifier, sam
from convert.sam_rules import OFFICIAL, sam_shapes
from sammix_jax.errors import UserError

pytestmark = pytest.mark.torch


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def state(variant="mini"):
    keys = OFFICIAL.key_shapes(sam_shapes(variant))
    return {key: torch.zeros(shape) for key, shape in keys.items()}


@pytest.fixture
def refused(tmp_path):
    """`refused(content or path, match)`: saves, expects the error, and no file."""

    def check(content, match, convert=sam.convert, **options):
        path = tmp_path / "given.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, **options)
        for name in ("out.safetensors", "out.pth", "out"):
            if convert is classifier.convert and name != "out.safetensors":
                continue
            with pytest.raises(UserError, match=rf"given\.pth: .*{match}"):
                convert(path, tmp_path / name)
        assert [p.name for p in tmp_path.iterdir()] == ["given.pth"]

    return check


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_code_is_not_run(refused, tmp_path, new):
    content = {"model": {"a": torch.zeros(2)}, "payload": Payload(tmp_path / "pwned")}
    refused(
        content, r"carries code or objects \(posix\.system\)", _use_new_zipfile_serialization=new
    )


def test_plain_pickles_are_not_run(refused, tmp_path):
    refused(pickle.dumps(Payload(tmp_path / "pwned"), protocol=2), r"posix\.system")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_objects_and_programs(refused, tmp_path):
    content = {"model": state(), "args": argparse.Namespace(rank=4)}
    refused(content, r"carries code or objects \(argparse\.Namespace\).*checkpoint\['model'\]")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "given.pth")
    refused((tmp_path / "given.pth").read_bytes(), "a TorchScript program")


def test_parameters_of_mxnet(refused):
    refused((0x112).to_bytes(8, "little") + bytes(64), "parameters of MXNet")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated(refused, tmp_path, share, new):
    path = tmp_path / "given.pth"
    torch.save(state(), path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    refused(whole[: int(share * len(whole))], "truncated or no PyTorch file")


def test_a_flipped_bit_is_found(refused, tmp_path):
    """PyTorch would read it as another number."""
    torch.save(state(), tmp_path / "given.pth")
    whole = bytearray((tmp_path / "given.pth").read_bytes())
    whole[len(whole) // 2] ^= 1
    refused(bytes(whole), r"damaged: .*/data/\d+ is not what its checksum says")


def test_whatever_is_no_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "given.pth"
    for size in rng.integers(1, 60, 150):
        # Of bytes that a pickle has a meaning for, more than of others.
        path.write_bytes(bytes(rng.choice(list(b"(.0123NRabcdegjlopqrstu}])\x80\x85"), size)))
        with pytest.raises(UserError, match=r"given\.pth: "):
            sam.convert(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "odd",
    [
        {7: torch.zeros(2)},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(2, dtype=torch.complex64)},
    ],
    ids=["key", "sparse", "float8", "meta", "complex"],
)
def test_arrays_of_another_kind(refused, odd):
    refused(odd, r"holds [7a] beside or instead of arrays; .* dense tensor of plain numbers")


def test_a_pytorch_that_is_not_safe(refused, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(state(), r"PyTorch 2\.9\.1\+cpu may run code .*expected 2\.10 or newer")


def test_float8_in_safetensors(tmp_path):
    eighth = {key: value.to(torch.float8_e4m3fn) for key, value in state().items()}
    save_file(eighth, tmp_path / "given.safetensors")
    with pytest.raises(UserError, match=r"given\.safetensors: holds .*plain numbers"):
        sam.convert(tmp_path / "given.safetensors", tmp_path / "out.pth", dtype="float32")


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "given.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(UserError, match=r"set_crc32_options\(False\) left without checksums"):
        sam.convert(tmp_path / "given.pth", tmp_path / "out.safetensors")


def test_truncated_safetensors(tmp_path):
    torch.save(state(), tmp_path / "sam.pth")
    path = tmp_path / "sam.safetensors"
    sam.convert(tmp_path / "sam.pth", path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"sam\.safetensors: cannot be read .*truncated"):
        sam.convert(path, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_foreign(refused):
    resnet = {"layer1.0.conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(2)}
    refused(resnet, r"a ResNet in torchvision's layout \(convert\.classifier\); expected a SAM")
    refused({"b2.conv_branch2a.weight": torch.zeros(2)}, "a ResNet-38")
    refused({"image_encoder.trunk.patch_embed.proj.weight": torch.zeros(2)}, "a SAM 2")
    refused({"w": torch.zeros(2)}, r"an unknown model of 1 arrays \(w, \.\.\.\); expected a SAM")
    refused({}, r"an unknown model of 0 arrays")
    refused(state(), r"a SAM in the official layout \(convert\.sam\); expected a ResNet-18",
            convert=classifier.convert)  # fmt: skip


def test_not_a_state_dict(refused):
    refused([torch.zeros(2)], "holds list beside or instead of arrays")
    refused({"a": torch.zeros(2), "epoch": 3}, "holds epoch beside or instead of arrays")


def test_incomplete_or_extended(refused):
    incomplete = state()
    del incomplete["image_encoder.blocks.3.attn.qkv.bias"]
    refused(incomplete, r"1 missing \(image_encoder\.blocks\.3\.attn\.qkv\.bias\)")
    refused(state() | {"extra": torch.zeros(1)}, r"Closest is mini: 1 unexpected \(extra\)")


def test_sizes_of_no_variant(refused):
    odd = state()
    odd["image_encoder.pos_embed"] = torch.zeros(1, 14, 14, 192)
    refused(
        odd,
        r"a mini with tables of positions for images of another size: 1 of another shape "
        r"\(image_encoder\.pos_embed \(1, 14, 14, 192\), expected \(1, 16, 16, 192\)\)",
    )
    odd["mask_decoder.iou_token.weight"] = torch.zeros(1, 64)
    refused(
        odd,
        r"none of mini, vit_b, vit_l, vit_h, tiny\. Closest is mini: 2 of another shape "
        r"\(image_encoder\.pos_embed \(1, 14, 14, 192\), expected \(1, 16, 16, 192\), ",
    )


def test_values_that_are_not_finite(refused, tmp_path):
    bad = state()
    bad["mask_decoder.iou_token.weight"][0, 0] = float("nan")
    refused(bad, r"mask_decoder\.iou_token\.weight: NaN or infinity")
    large = state() | {"mask_decoder.iou_token.weight": torch.full((1, 128), 1e6)}
    torch.save(large, tmp_path / "given.pth")
    told = r"mask_decoder\.iou_token\.weight: values up to 1e\+06, which float16 does not hold"
    with pytest.raises(UserError, match=told):
        sam.convert(tmp_path / "given.pth", tmp_path / "out.safetensors", dtype="float16")


def test_outputs_are_checked_first(tmp_path):
    torch.save(state(), tmp_path / "sam.pth")
    cases = {
        "out.zip": "expected a name ending in .safetensors",
        ".": "exists; a Hugging Face model needs a new folder",
    }
    for name, match in cases.items():
        with pytest.raises(UserError, match=match):
            sam.convert(tmp_path / "sam.pth", tmp_path / name)
    with pytest.raises(UserError, match=r"--format=official expects a name ending in \.pth"):
        sam.convert(tmp_path / "sam.pth", tmp_path / "out.safetensors", "official")
    with pytest.raises(UserError, match=r"no model\.safetensors .* and no config\.json"):
        sam.convert(tmp_path, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="is a folder; expected the name of a file"):
        (tmp_path / "dir.pth").mkdir()
        sam.convert(tmp_path / "sam.pth", tmp_path / "dir.pth")
    with pytest.raises(UserError, match=r"a name that ends in \.safetensors"):
        classifier.convert(tmp_path / "sam.pth", tmp_path / "out.pth")
    with pytest.raises(UserError, match="is a folder; expected the name of a file"):
        (tmp_path / "dir.safetensors").mkdir()
        classifier.convert(tmp_path / "sam.pth", tmp_path / "dir.safetensors")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    torch.save(state(), tmp_path / "sam.pth")
    monkeypatch.setattr(
        torch, "save", lambda value, path: (path.write_bytes(b"x"), _raise(RuntimeError("full")))
    )
    with pytest.raises(UserError, match=r"out\.pth: could not be written \(full\)"):
        sam.convert(tmp_path / "sam.pth", tmp_path / "out.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["sam.pth"]


def _raise(error):
    raise error


def test_an_own_file_that_lies_about_its_model(tmp_path):
    from sammix_jax.weights import write_weights

    arrays = {"image_encoder/patch_embed/kernel": np.zeros((8, 8, 3, 192), np.float32)}
    metadata = {"kind": "sam", "model": "vit_b", "source": "", "sha256": ""}
    write_weights(tmp_path / "sam.safetensors", arrays, metadata)
    with pytest.raises(UserError, match="says that it is sam vit_b, but its arrays are not"):
        sam.convert(tmp_path / "sam.safetensors", tmp_path / "out.pth")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "says that it is sam None"),
        ({"model": "mini", "kind": "classifier"}, "says that it is classifier mini"),
        ({"model": "mini", "image_size": "big"}, "image_size=big"),
    ],
)
def test_own_files_that_say_too_little(tmp_path, fields, match):
    from sammix_jax.weights import write_weights

    arrays = {path: np.zeros(shape, np.float32) for path, shape in sam_shapes("mini").items()}
    write_weights(tmp_path / "sam.safetensors", arrays, {"kind": "sam", **fields})
    with pytest.raises(UserError, match=match):
        sam.convert(tmp_path / "sam.safetensors", tmp_path / "out.pth")
