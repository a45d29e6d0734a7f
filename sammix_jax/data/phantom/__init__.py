"""Phantom CT: the embedded data set, so that everything runs without a download."""

from sammix_jax.data.phantom.scans import (
    DOMAINS,
    LIVER,
    PORTAL,
    TUMOUR,
    UNENHANCED,
    Domain,
    Phantom,
    make_patient,
    write_lits,
    write_totalsegmentator,
)

__all__ = [
    "DOMAINS",
    "LIVER",
    "PORTAL",
    "TUMOUR",
    "UNENHANCED",
    "Domain",
    "Phantom",
    "make_patient",
    "write_lits",
    "write_totalsegmentator",
]
