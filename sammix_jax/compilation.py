"""Compiled steps are kept between runs."""

import os
import pathlib

import jax


def cache_compilations() -> None:
    """Keeps them below the user's cache folder, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = pathlib.Path.home() / ".cache" / "sammix_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))
