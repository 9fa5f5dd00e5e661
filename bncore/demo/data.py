"""The handwritten digits: 1797 real scans of 8 x 8 pixels, which scikit-learn brings along.

Split once, by class, into three parts: training, validation (chooses the learning rate) and test
(reported, never chosen by). Pixels are shifted and scaled by the training part's mean and standard
deviation, two numbers for all pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CLASSES = 10
TRAINING, TEST = 1200, 300
"""Images to train with and to test with; the other 297 are for validation."""


class Part(NamedTuple):
    """Images and their digits.

    Attributes
    ----------
    x : (N, 64) ndarray of float32
    labels : (N,) ndarray of int
    """

    x: np.ndarray
    labels: np.ndarray


class Digits(NamedTuple):
    """The three parts of the data."""

    training: Part
    validation: Part
    test: Part


def load_digits():
    """Load and split the digits; always the same split.

    Returns
    -------
    Digits
        1200 training, 297 validation and 300 test images.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    pixels, labels = datasets.load_digits(return_X_y=True)
    rest, test, rest_labels, test_labels = train_test_split(
        pixels, labels, test_size=TEST, stratify=labels, random_state=0
    )
    training, validation, training_labels, validation_labels = train_test_split(
        rest, rest_labels, train_size=TRAINING, stratify=rest_labels, random_state=0
    )
    mean, std = training.mean(), training.std()

    def part(x, labels):
        return Part(((x - mean) / std).astype(np.float32), labels)

    return Digits(
        part(training, training_labels),
        part(validation, validation_labels),
        part(test, test_labels),
    )
