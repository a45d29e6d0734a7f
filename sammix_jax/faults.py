"""What may be wrong with the machine while a command runs, in words that say how to mend it."""

import errno

import jax

# A disk or a quota that is full, or a folder that may only be read.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_OUT_OF_MEMORY = (
    "A smaller --config.evaluate.batch lessens what validating, scoring and predicting take, and a "
    "larger mesh.fsdp what training does, both when a run goes on too; model.dtype=bfloat16, "
    "model.remat=blocks and train.accumulate need a new workdir. --mode=plan tells before what a "
    "step takes."
)


def fault_of_the_machine(error: Exception) -> str:
    """Tells of a full disk, a store that does not answer, a missing right or too little memory; ""
    of any other error."""
    first = str(error).partition("\n")[0][:200]
    if _is_of_no_place(error):
        return f"{error}; what was saved before is whole: make room and run the same command."
    if isinstance(error, TimeoutError) or "DEADLINE_EXCEEDED" in str(error):
        others = ", or another process, whose log says more," * jax.distributed.is_initialized()
        told = f"a disk or store{others} did not answer in time; what was saved before is whole"
        return f"{told} ({first})"
    if isinstance(error, PermissionError):
        return f"{error}; you lack the right to use it (chmod, or another folder)."
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"{first.rstrip('.')}. {_OUT_OF_MEMORY}"
    return ""


def _is_of_no_place(error: Exception) -> bool:
    """Whether a disk is full. TensorStore calls it exhausted, as XLA does memory, and says why."""
    if isinstance(error, OSError):
        return error.errno in _NO_PLACE
    return any(f"os_error_code='{code}'" in str(error) for code in _NO_PLACE)
