"""Train a small network on handwritten digits, with batch normalization by bncore.

NumPy, bncore and scikit-learn (for the images) are all it takes::

    pip install bncore scikit-learn
    python train_digits.py

One hidden layer is  x -> x W -> batch norm -> ReLU.  `bncore demo` is the larger, measured version.
"""

import numpy as np
from sklearn.datasets import load_digits

import bncore

rng = np.random.default_rng(0)

# 1797 scans of 8 x 8 pixels, the last 297 to test with.
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
order = rng.permutation(len(images))
train, test = order[:-297], order[-297:]

# Weights, and one batch norm a hidden layer; gamma and beta are in the layer.
sizes = [64, 128, 128, 10]
weights = [
    (rng.standard_normal((n, m)) * np.sqrt(2 / n)).astype(np.float32)
    for n, m in zip(sizes, sizes[1:])
]
norms = [bncore.BatchNorm1d(m) for m in sizes[1:-1]]


def forward(x):
    """Scores, and the input of every matrix for the way back."""
    inputs = [x]
    for w, norm in zip(weights, norms):
        inputs.append(np.maximum(norm(inputs[-1] @ w), 0))
    return inputs[-1] @ weights[-1], inputs


def backward(dscores, inputs):
    """Gradients of the weights; each norm keeps its own in grad_gamma and grad_beta."""
    gradients = [inputs[-1].T @ dscores]
    dh = dscores @ weights[-1].T
    for w, norm, x, h in zip(weights[-2::-1], norms[::-1], inputs[-2::-1], inputs[:0:-1]):
        dz = norm.backward(dh * (h > 0))
        gradients.insert(0, x.T @ dz)
        dh = dz @ w.T
    return gradients


def accuracy(part):
    for norm in norms:
        norm.eval()  # running statistics, so that an image's scores do not depend on its neighbours
    scores, _ = forward(images[part])
    for norm in norms:
        norm.train()
    return (scores.argmax(axis=1) == labels[part]).mean()


batch_size, learning_rate = 50, 0.1
for epoch in range(1, 11):
    rng.shuffle(train)
    for batch in train.reshape(-1, batch_size):
        scores, inputs = forward(images[batch])

        # Softmax and cross entropy: the gradient is (probabilities - truth) / batch size.
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(batch_size), labels[batch]] -= 1
        gradients = backward(p / batch_size, inputs)

        for w, dw in zip(weights, gradients):
            w -= learning_rate * dw
        for norm in norms:
            norm.gamma -= learning_rate * norm.grad_gamma
            norm.beta -= learning_rate * norm.grad_beta
    print(f"epoch {epoch:2}: test accuracy {100 * accuracy(test):.1f} %")
