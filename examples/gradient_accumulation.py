"""A big batch in small pieces: micro-batches whose statistics and gradients are the whole batch's.

Accumulating gradients over micro-batches is how a large batch fits into little memory, but batch
normalization of each piece by itself is not batch normalization of the whole.  Here it is: the
pieces' moments are merged, each piece is normalized by the merged ones, and in the backward pass
the pieces' two sums are added before each piece gets its gradient::

    moments -> + -> batch_norm_inference -> backward_reduce -> + -> backward_apply

Between processes it is the same, with the additions made by an all-reduce.  NumPy and bncore are
all it takes::

    pip install bncore
    python gradient_accumulation.py
"""

import numpy as np

import bncore

EPS = 1e-5


def forward(pieces, gamma, beta):
    """Normalize the pieces of a batch by the statistics of them all.

    Each piece is read twice, so pieces may be loaded anew each time; only the moments are kept.
    """
    moments = bncore.Moments()  # the moments of nothing
    for x in pieces:
        moments += bncore.moments(x)
    lo = moments.mean_lo  # what float64 leaves of the mean: for values far from zero
    ys = [
        bncore.batch_norm_inference(
            x, moments.mean, moments.var(), gamma, beta, eps=EPS, mean_lo=lo
        )
        for x in pieces
    ]
    return ys, moments


def backward(dys, pieces, gamma, moments):
    """Gradients of the pieces, gamma and beta, through the statistics of the whole batch."""
    mean, lo, inv_std = moments.mean, moments.mean_lo, 1 / np.sqrt(moments.var() + EPS)
    dbeta = dgamma = 0
    for dy, x in zip(dys, pieces, strict=True):
        sums = bncore.backward_reduce(dy, x, mean, inv_std, mean_lo=lo)
        dbeta, dgamma = dbeta + sums.sum_dy, dgamma + sums.sum_dy_xhat
    dxs = [
        bncore.backward_apply(dy, x, mean, inv_std, gamma, dbeta, dgamma, moments.count, mean_lo=lo)
        for dy, x in zip(dys, pieces, strict=True)
    ]
    return dxs, dgamma, dbeta


def main():
    rng = np.random.default_rng(0)
    x = 1e6 + rng.standard_normal((96, 8, 14, 14))
    dy = rng.standard_normal(x.shape)
    gamma, beta = rng.standard_normal(8), rng.standard_normal(8)

    # The big batch at once.
    y, saved = bncore.batch_norm(x, gamma, beta, eps=EPS)
    whole = bncore.batch_norm_backward(dy, saved)

    # The same in pieces of unequal size.
    cuts = [32, 64, 65]
    pieces, dys = np.split(x, cuts), np.split(dy, cuts)
    ys, moments = forward(pieces, gamma, beta)
    dxs, dgamma, dbeta = backward(dys, pieces, gamma, moments)

    for name, merged, expected in (
        ("variance", moments.var(), saved.var),
        ("y", np.concatenate(ys), y),
        ("dx", np.concatenate(dxs), whole.dx),
        ("dgamma", dgamma, whole.dgamma),
        ("dbeta", dbeta, whole.dbeta),
    ):
        difference = abs(merged - expected).max() / abs(expected).max()
        print(f"{name:<9}largest difference {difference:.0e} of the largest value")
        assert difference < 1e-11

    # Each piece by itself is another function of the batch, as the one image of the third shows.
    alone = np.concatenate([bncore.batch_norm(piece, gamma, beta, eps=EPS)[0] for piece in pieces])
    print(f"y of each piece by itself is off by {abs(alone - y).max():.1f}")


if __name__ == "__main__":
    main()
