"""Segment Anything in Flax."""

from sammix_jax.models.sam.batched import predict_masks
from sammix_jax.models.sam.inputs import stack_images
from sammix_jax.models.sam.predictor import SamPredictor
from sammix_jax.models.sam.sam import (
    CONSTANTS,
    PIXEL_MEAN,
    PIXEL_STD,
    Sam,
    count_parameters,
    postprocess_masks,
)
from sammix_jax.models.sam.variants import VARIANTS, SamVariant, get_variant

__all__ = [
    "CONSTANTS",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "VARIANTS",
    "Sam",
    "SamPredictor",
    "SamVariant",
    "count_parameters",
    "get_variant",
    "postprocess_masks",
    "predict_masks",
    "stack_images",
]
