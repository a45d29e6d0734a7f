"""The two losses of MultiMix on unlabelled slices. Both return a float32 scalar.

Source: Haque, Imran, Wang and Terzopoulos, ISBI 2021 (arXiv 2010.14731) and its code
(ayaanzhaque/MultiMix), whose whole objective is the cross-entropy of the classes + 5 · Dice +
0.25 · `pseudo_label_loss` at confidence 0.7 + 0.01 · `kl_loss`.
"""

import jax
import jax.numpy as jnp

from sammix_jax.method.losses import cross_entropy

KL_FORMS = ("published", "bernoulli")


def pseudo_label_loss(
    weak_logits: jax.Array, strong_logits: jax.Array, confidence: float = 0.7
) -> jax.Array:
    """Cross-entropy of the strong view against the class that the weak view is confident of.

    A mean over all slices: those below the confidence count as 0 (FixMatch, Sohn et al. 2020,
    arXiv 2001.07685). No gradient goes through the weak view.

    Args:
      weak_logits: (B, K) float, the classifier's on weakly augmented slices.
      strong_logits: (B, K) float, its on the same slices strongly augmented.
      confidence: probability from which the likelier class counts, 0 to 1.

    Raises:
      ValueError: shapes that do not fit.
    """
    _expect_one_shape(weak_logits, strong_logits, 2, "(B, K)")
    probability = jax.nn.softmax(jax.lax.stop_gradient(weak_logits).astype(jnp.float32))
    confident = (probability.max(axis=-1) >= confidence).astype(jnp.float32)
    labels = probability.argmax(axis=-1)
    # The weighted mean is over the confident; their share makes it one over all.
    return cross_entropy(strong_logits, labels, confident) * confident.mean()


def kl_loss(logits_a: jax.Array, logits_b: jax.Array, form: str = "bernoulli") -> jax.Array:
    """KL divergence from the masks of labelled slices to those of unlabelled ones, mean of pixels.

    The authors pair slice with slice and pixel with pixel, though the slices are not the same.
    Gradient goes through both.

    Args:
      logits_a: (B, H, W) float, of labelled slices.
      logits_b: (B, H, W) float, of unlabelled slices.
      form: 'published': between softmaxes over the one channel that a mask has. Each is 1
        everywhere, so the loss is 0 whatever the masks, and so is its gradient. 'bernoulli':
        between the distributions of mask and background, p = sigmoid(a) and q = sigmoid(b):
        p log(p / q) + (1 - p) log((1 - p) / (1 - q)).

    Raises:
      ValueError: another form, or shapes that do not fit.
    """
    _expect_one_shape(logits_a, logits_b, 3, "(B, H, W)")
    if form not in KL_FORMS:
        raise ValueError(f"form={form!r}: expected one of {KL_FORMS}.")
    a, b = (logits[..., None].astype(jnp.float32) for logits in (logits_a, logits_b))
    if form == "bernoulli":
        # The softmax of (x, 0) is (sigmoid(x), 1 - sigmoid(x)).
        a, b = (jnp.concatenate((x, jnp.zeros_like(x)), axis=-1) for x in (a, b))
    log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()


def _expect_one_shape(a: jax.Array, b: jax.Array, rank: int, shape: str) -> None:
    if a.ndim != rank or a.shape != b.shape:
        raise ValueError(f"logits {a.shape} and {b.shape}: expected {shape}, the same for both.")
