"""SAM-Mix in JAX: segmentation of medical images from few labelled slices."""
