"""Offline weight tools; the package `sammix_jax` never imports them.

python -m convert.sam --help         SAM: official, Hugging Face and this project's files
python -m convert.classifier --help  ImageNet classifiers: ResNet-18, -34, -50 and ResNet-38
python -m convert.hdf5 --help        slices prepared here, in the form of the authors' files
"""
