"""Networks, as Flax modules that know nothing of data or training."""
