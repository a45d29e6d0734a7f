"""Reads other projects' weight files, without ever running code that one may carry."""

import functools
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sammix_jax.data.files import local_copy
from sammix_jax.data.paths import Path, as_path, resolved
from sammix_jax.errors import UserError
from sammix_jax.weights import DTYPES

# A key that gives a layout away → what the file is.
_SIGNS = {
    "image_encoder.patch_embed.proj.weight": "a SAM in the official layout (convert.sam)",
    "vision_encoder.patch_embed.projection.weight": "a Hugging Face SamModel (convert.sam)",
    "image_encoder/patch_embed/kernel": "a SAM of this project (convert.sam)",
    "layer1.0.conv1.weight": "a ResNet in torchvision's layout (convert.classifier)",
    "b2.conv_branch2a.weight": "a ResNet-38 in resnet38d's layout (convert.classifier)",
    "trunk/conv1/kernel": "a classifier of this project, which needs no conversion",
    "trunk/conv1a/kernel": "a classifier of this project, which needs no conversion",
    "image_encoder.trunk.patch_embed.proj.weight": "a SAM 2, which is another model",
    "image_encoder.patch_embed.seq.0.c.weight": "a MobileSAM, which is another model",
}
# Names under which training scripts keep the weights beside an optimiser's state.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_COMPILED = "_orig_mod."  # which torch.compile puts before what it compiled
# Keys of what is not merged into a SAM, or cannot be: PEFT's LoRA and SAMed's, SAM-Med2D's layers.
_UNMERGED = re.compile(r"\b(lora_\w+|base_layer|linear_[ab]_[qv]|w_[ab]_\d{3})\b")
_ADAPTER = re.compile(r"\bAdapter\.")
# Types of numbers in .safetensors that NumPy holds.
_NUMBERS = re.compile(r"BOOL|[IU](8|16|32|64)|F(16|32|64)|BF16")
# What weights_only promises PyTorch keeps from here on: before, a file could corrupt memory
# (CVE-2026-24747) or run code (CVE-2025-32434, before 2.6).
_SAFE_TORCH = (2, 10)
# How MXNet's files of parameters begin; ResNet-38's first publisher has them.
_MXNET = (0x112).to_bytes(8, "little")


class Stored(NamedTuple):
    """An array in a file: its shape, and how to get it."""

    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


def read_tensors(path) -> dict[str, Stored]:
    """The arrays of a `.safetensors` (no torch needed) or of a PyTorch file.

    A wrapper such as {'model': ...} is taken off, and what a training script put before the keys of
    a known layout, such as `module.` or `model.`. A key without it is of something else, and is
    named so that it fits nowhere.

    Raises:
      UserError: a file that is missing, damaged, carries code, holds other things than arrays, or
        LoRA beside the weights.
    """
    path = as_path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a file, such as the model.safetensors in it.")
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from error
    stored = _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)
    plain = {key.replace(_COMPILED, ""): value for key, value in stored.items()}
    stored = plain if len(plain) == len(stored) else stored
    prefix = _prefix(stored)
    stored = {
        key.removeprefix(prefix) if key.startswith(prefix) else f"{key} (without {prefix})": value
        for key, value in stored.items()
    }
    if unmerged := next(filter(_UNMERGED.search, stored), None):
        raise UserError(
            f"{path}: holds LoRA that is not merged ({unmerged}), expected a SAM's own arrays; "
            "merge it into the model's projections (PEFT: merge_and_unload) and save that."
        )
    if adapter := next(filter(_ADAPTER.search, stored), None):
        raise UserError(
            f"{path}: holds adapters ({adapter}), expected a SAM's own arrays; with these layers, "
            "as SAM-Med2D has them, it is another model."
        )
    return stored


def read_metadata(path) -> dict[str, str]:
    """What a `.safetensors` says of itself; {} of other files."""
    if as_path(path).suffix != ".safetensors":
        return {}
    with local_copy(path) as local, safe_open(local, framework="np") as file:
        return file.metadata() or {}


def _prefix(keys: Collection[str]) -> str:
    """What stands before a key of `_SIGNS`, "" where nothing does."""
    if any(sign in keys for sign in _SIGNS):
        return ""
    prefixes = (k.removesuffix(sign) for sign in _SIGNS for k in keys if k.endswith(f".{sign}"))
    return next(prefixes, "")


def refuse_input(source: Path, output: Path) -> None:
    """Raises a UserError where the output is the input, so that the original stays."""
    if resolved(source) == resolved(output):
        raise UserError(f"{output}: is the input; give another name, so that the original stays.")


def foreign(path, source: Mapping[str, Stored], expected: str) -> UserError:
    """The error for a file of another kind, which says which."""
    known = [what for sign, what in _SIGNS.items() if sign in source]
    keys = ", ".join(list(source)[:4]) or "none"
    found = known[0] if known else f"an unknown model of {len(source)} arrays ({keys}, ...)"
    return UserError(f"{path}: {found}; expected {expected}.")


Cast = Callable[[str, np.ndarray], np.ndarray]


def caster(path, dtype: str | None) -> Cast:
    """Returns a function of an array's name and the array, to `dtype`; None keeps each one's type.

    The function raises a UserError, which names the array, where it is not of floating point, a
    finite value does not fit, or a value is not finite.
    """

    def cast(name: str, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise UserError(
                f"{path}: {name}: an array of {array.dtype} where a model has weights, expected "
                "floating point; of a quantised model take the original."
            )
        if dtype is None and str(array.dtype) not in DTYPES:
            raise UserError(
                f"{path}: {name}: an array of {array.dtype}, expected {', '.join(DTYPES)}; "
                "choose --dtype=float32."
            )
        if not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name}: NaN or infinity among the values; take a sound copy, or a "
                "checkpoint from before the training diverged."
            )
        # ml_dtypes gives NumPy its bfloat16.
        with np.errstate(over="ignore"):  # told below, with the array's name
            result = array if dtype is None else array.astype(dtype, copy=False)
        if not np.isfinite(result).all():
            raise UserError(
                f"{path}: {name}: values up to {np.abs(array).max():.3g}, which {dtype} does not "
                "hold; choose --dtype=float32."
            )
        return result

    return cast


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        with local_copy(path) as local:
            file = safe_open(local, framework="np")  # stays open when the copy is gone
        found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        odd = [key for key, part in found.items() if not _NUMBERS.fullmatch(part.get_dtype())]
        if odd:
            raise _odd(path, odd)
        return {
            key: Stored(tuple(part.get_shape()), functools.partial(file.get_tensor, key))
            for key, part in found.items()
        }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as .safetensors ({error}); it is truncated or of another "
            "kind: fetch it again."
        ) from error


def _pytorch(path: Path) -> dict[str, Stored]:
    torch = import_torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd files, which the errors below name
            with local_copy(path) as local:
                _check_sums(path, local)
                content = torch.load(local, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damage shows as any of Python's errors
        raise _refuse(path, str(error) or type(error).__name__) from error
    if isinstance(content, dict):
        inner = [content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)]
        content = min(inner, key=lambda inside: len(_not_arrays(inside)), default=content)
    if odd := _not_arrays(content):
        raise _odd(path, odd)
    return {
        key: Stored(tuple(value.shape), functools.partial(_to_numpy, value))
        for key, value in content.items()
    }


def _check_sums(path: Path, local) -> None:
    """Holds what PyTorch's zip files contain against their checksums, which PyTorch does not."""
    if not zipfile.is_zipfile(local):
        return
    with zipfile.ZipFile(local) as file:
        if damaged := file.testzip():
            raise UserError(
                f"{path}: damaged: {damaged} is not what its checksum says; fetch the file again. "
                "One that torch.serialization.set_crc32_options(False) left without checksums has "
                "to be saved with them."
            )


def _not_arrays(content) -> list:
    """What a state dict would not have."""
    if not isinstance(content, dict):
        return [type(content).__name__]
    return [key for key, v in content.items() if not (isinstance(key, str) and _is_array(v))]


def _odd(path: Path, odd: list) -> UserError:
    return UserError(
        f"{path}: holds {', '.join(map(str, odd[:8]))} beside or instead of arrays; expected a "
        "state dict, name → dense tensor of plain numbers: save that alone."
    )


def _is_array(value) -> bool:
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"  # and not a shape without values
        and not (value.is_complex() or value.is_quantized or "float8" in str(value.dtype))
    )


def _refuse(path: Path, error: str) -> UserError:
    with path.open("rb") as file:
        if file.read(len(_MXNET)) == _MXNET:
            return UserError(
                f"{path}: parameters of MXNet, expected a PyTorch file (docs/weights.md lists the "
                "names of its arrays); read it with MXNet, as the public ports of ResNet-38 do, "
                "and save its state dict with torch.save."
            )
    code = re.search(r"GLOBAL (\S+)|TorchScript", error)
    if code:
        return UserError(
            f"{path}: carries code or objects ({code[1] or 'a TorchScript program'}), expected "
            "arrays alone; nothing of it was run. Take the file from its first publisher, or the "
            "model.safetensors; of a checkpoint that you trust, save the weights alone: "
            "torch.save(checkpoint['model'], ...), or 'state_dict', as they are called there."
        )
    reason = error.partition(". ")[0].partition("\n")[0] or "it ends too early"
    return UserError(f"{path}: truncated or no PyTorch file ({reason}); fetch it again.")


def import_torch(path):
    """PyTorch, which only the converters need, and only for its own files.

    Raises:
      UserError: it is not installed, or too old to be safe.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: a PyTorch file needs PyTorch: pip install -r requirements/convert.txt, or "
            "use the Hugging Face model.safetensors, which needs none."
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise UserError(
            f"{path}: PyTorch {torch.__version__} may run code that a file carries; expected "
            f"{'.'.join(map(str, _SAFE_TORCH))} or newer: pip install -r requirements/convert.txt."
        )
    return torch


def _to_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none, so the bits go over
        import torch

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray):
    """A tensor over the array's memory, or over a copy where that is read-only."""
    import torch

    array = np.require(array, requirements=("C", "W"))
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
