"""Sequences of unequal length: padded with a mask, or packed without padding.

Padding must not count: zeros at the ends of short sequences pull mean and variance towards zero.
A batch of sequences is here normalized in two ways that give the same:

padded  (N, C, L) with a mask made from the lengths; padding may hold anything, even NaN;
packed  (sum of lengths, C): the time steps of all sequences as rows, one after the other, without
        any padding.  Batch norm does not care which row belongs to which sequence.

NumPy and bncore are all it takes::

    pip install bncore
    python padded_sequences.py
"""

import numpy as np

import bncore


def mask_of(lengths, longest):
    """True at the first ``length`` steps of each sequence: (N, 1, L), to go with (N, C, L)."""
    return (np.arange(longest) < np.asarray(lengths)[:, None])[:, None, :]


def pack(padded, mask):
    """The steps that count as rows of (steps, C)."""
    return padded.transpose(0, 2, 1)[mask[:, 0]]


def unpack(rows, mask):
    """The inverse of `pack`: (N, C, L), zeros at the padding."""
    sequences, _, longest = mask.shape
    padded = np.zeros((sequences, longest, rows.shape[1]), rows.dtype)
    padded[mask[:, 0]] = rows
    return padded.transpose(0, 2, 1)


def main():
    rng = np.random.default_rng(0)
    lengths = [50, 7, 33, 1, 20]
    gamma, beta = rng.standard_normal(16), rng.standard_normal(16)
    x = 5 + rng.standard_normal((len(lengths), 16, max(lengths)))
    dy = rng.standard_normal(x.shape)
    mask = mask_of(lengths, max(lengths))

    # Padded: whatever stands beyond a sequence's end has no influence on any other position.
    x[np.broadcast_to(~mask, x.shape)] = np.nan
    y, saved = bncore.batch_norm(x, gamma, beta, mask=mask)
    g = bncore.batch_norm_backward(dy, saved)
    print(f"padded: {saved.count[0]:.0f} of {len(lengths) * max(lengths)} steps count")
    assert (y == np.where(mask, y, 0)).all(), "y is 0 at the padding"

    # Packed: the same steps as rows, at less than half the work here.
    rows = pack(x, mask)
    packed_y, saved = bncore.batch_norm(rows, gamma, beta)
    packed_g = bncore.batch_norm_backward(pack(dy, mask), saved)
    print(f"packed: {len(rows)} rows")

    for name, padded, packed in (
        ("y", y, unpack(packed_y, mask)),
        ("dx", g.dx, unpack(packed_g.dx, mask)),
    ):
        print(f"{name:<3}largest difference {abs(padded - packed).max():.0e}")
        np.testing.assert_allclose(padded, packed, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    main()
