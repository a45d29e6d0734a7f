"""Pretraining of a promptable SAM on drawn shapes."""
