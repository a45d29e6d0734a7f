"""Converts ImageNet weights for the classifier.

python -m convert.classifier --input=resnet50-11ad3fa6.pth --output=resnet50.safetensors

Reads ResNet-18, -34 and -50 with the key names of torchvision and timm, and ResNet-38 (model A1 of
"Wider or Deeper") with those of the public PyTorch ports, `resnet38d`; as .pth or .safetensors. The
architecture is recognised from the shapes. The ImageNet head is left out: the classifier's own
starts from random values.
"""

from absl import flags

from convert.classifier_rules import CLASSIFIERS
from convert.program import run
from convert.rules import recognise
from convert.sources import caster, foreign, read_tensors, refuse_input
from sammix_jax.data.files import sha256
from sammix_jax.data.paths import as_path
from sammix_jax.errors import UserError
from sammix_jax.weights import DTYPES, write_weights


def convert(path, output, dtype: str | None = None) -> str:
    """Converts one file.

    Args:
      path: weights in one of the known layouts.
      output: the `.safetensors` to write.
      dtype: type to store; None keeps the input's.

    Returns:
      The architecture found.

    Raises:
      UserError: a file that cannot be read or is no such classifier; nothing is written then.
    """
    path, output = as_path(path), as_path(output)
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: expected a name that ends in .safetensors.")
    if output.is_dir():
        raise UserError(f"{output}: is a folder; expected the name of a file.")
    refuse_input(path, output)
    source = read_tensors(path)
    tables = [table for table, _ in CLASSIFIERS.values() if table.marker in source]
    if not tables:
        raise foreign(path, source, "a ResNet-18, -34, -50 or -38")
    table = tables[0]
    models = {arch: shapes for arch, (of, shapes) in CLASSIFIERS.items() if of is table}
    arch = recognise(path, source, table, models)
    arrays = table.to_ours(path, models[arch](), source, caster(path, dtype))
    metadata = {"kind": "classifier", "model": arch, "source": path.name, "sha256": sha256(path)}
    write_weights(output, arrays, metadata)
    return arch


def main(given: flags.FlagValues) -> list[str]:
    arch = convert(given.input, given.output, given.dtype)
    return [
        f"{given.output}: {arch}; train with --config.model.classifier={arch} "
        f"--config.model.classifier_weights={given.output} "
        "--config.input.normalise=sam, whose mean and deviation are ImageNet's"
    ]


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "The ImageNet weights, .pth or .safetensors.", required=True)
    flags.DEFINE_string("output", None, "The file to write, .safetensors.", required=True)
    flags.DEFINE_enum("dtype", None, DTYPES, "Type to store; the input's without it.")
    run(main)
