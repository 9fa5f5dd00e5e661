"""Stochastic gradient descent with momentum, and the sweep over learning rates.

Both networks get the same treatment: per seed the same initial weights and the same minibatches in
the same order, the same learning rates to choose from, and the choice made on validation images.
The test images choose nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice, pairwise
from time import perf_counter
from typing import NamedTuple

import numpy as np

from bncore.demo.data import CLASSES
from bncore.demo.network import cross_entropy, deep_network

PERCENTILES = (15, 50, 85)
"""Those of Ioffe & Szegedy 2015, figure 1."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes
    ----------
    hidden_layers, width : int
        Hidden layers, and units in each.
    activation : {"sigmoid", "tanh"}
    batch_size : int
        Images per step.
    steps : int
        Minibatches per run.
    momentum : float
        Of the gradient descent.
    learning_rates : tuple of float
        The sweep.
    seeds : tuple of int
        Repetitions: initial weights and order of the minibatches.
    """

    hidden_layers: int = 10
    width: int = 100
    activation: str = "sigmoid"
    batch_size: int = 60
    steps: int = 1500
    momentum: float = 0.9
    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    seeds: tuple[int, ...] = (0, 1, 2)

    def total_steps(self):
        """Steps of all runs of one network."""
        return self.steps * len(self.learning_rates) * len(self.seeds)

    def evaluations(self):
        """Steps after which to look at the network: often at first, when much changes."""
        early = min(100, self.steps)
        return sorted({*range(0, early, 5), *range(early, self.steps, 20), self.steps})


class Run(NamedTuple):
    """One network trained once. E evaluations, H units in the last hidden layer.

    Attributes
    ----------
    batch_norm : bool
    learning_rate : float
    seed : int
    steps : (E,) ndarray of int
        Steps made at each evaluation, from 0.
    validation, test : (E,) ndarray of float
        Accuracy, 0 to 1.
    percentiles : (E - 1, 3, H) ndarray of float
        Of each unit's inputs in the last hidden layer, over the minibatches of the latest epoch.
    seconds : float
        Training, without evaluation.
    batch_norm_seconds : float
        The part of it in batch normalization.
    """

    batch_norm: bool
    learning_rate: float
    seed: int
    steps: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    percentiles: np.ndarray
    seconds: float
    batch_norm_seconds: float

    def steps_to(self, accuracy):
        """Steps made when an evaluation first showed this test accuracy; inf if none did."""
        reached = self.test >= accuracy
        return float(self.steps[reached.argmax()]) if reached.any() else np.inf

    def mean_validation(self):
        """Validation accuracy averaged over training: high for a fast start and a good end."""
        middle = (self.validation[1:] + self.validation[:-1]) / 2
        return float(np.average(middle, weights=np.diff(self.steps)))


class Momentum:
    """Stochastic gradient descent with momentum::

        v <- momentum v - learning_rate g      p <- p + v

    Parameters
    ----------
    parameters : list of (layer, name)
        As `bncore.demo.network.Network.parameters` gives them.
    learning_rate, momentum : float
    """

    def __init__(self, parameters, learning_rate, momentum):
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.parameters = [
            (layer, name, np.zeros_like(getattr(layer, name))) for layer, name in parameters
        ]

    def step(self):
        """Move every parameter by its latest gradient."""
        for layer, name, velocity in self.parameters:
            velocity *= self.momentum
            velocity -= self.learning_rate * getattr(layer, f"grad_{name}")
            parameter = getattr(layer, name)
            parameter += velocity


def minibatches(count, size, seed):
    """Indices of minibatches without end: every epoch in a new order, incomplete ones left out.

    Parameters
    ----------
    count, size : int
        Of all examples, and of a minibatch.
    seed : int

    Yields
    ------
    (size,) ndarray of int
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def accuracy(network, part):
    """Share of images whose highest score is that of their digit, in evaluation mode."""
    network.train(False)
    correct = network(part.x).argmax(axis=1) == part.labels
    network.train(True)
    return correct.mean()


def train(digits, settings, *, batch_norm, learning_rate, seed, progress):
    """Train one network.

    Parameters
    ----------
    digits : bncore.demo.data.Digits
    settings : Settings
    batch_norm : bool
    learning_rate : float
    seed : int
    progress : callable
        Called with a number of steps when they have been made.

    Returns
    -------
    Run
    """
    from threadpoolctl import threadpool_limits

    x, labels = digits.training
    sizes = [x.shape[1], *[settings.width] * settings.hidden_layers, CLASSES]
    network = deep_network(sizes, activation=settings.activation, batch_norm=batch_norm, seed=seed)
    last_hidden = network.layers[-2]
    optimizer = Momentum(network.parameters(), learning_rate, settings.momentum)
    batches = minibatches(len(x), settings.batch_size, seed)
    inputs = deque(maxlen=len(x) // settings.batch_size)

    def advance(steps):
        """Make some steps; returns the seconds they took."""
        start = perf_counter()
        for batch in islice(batches, steps):
            _, dscores = cross_entropy(network(x[batch]), labels[batch])
            network.backward(dscores)
            optimizer.step()
            inputs.append(last_hidden.x)
        return perf_counter() - start

    def evaluate():
        return accuracy(network, digits.validation), accuracy(network, digits.test)

    steps = settings.evaluations()
    percentiles = []
    seconds = 0.0
    # A second BLAS thread costs small matrices more than it brings.
    with threadpool_limits(1, user_api="blas"):
        accuracies = [evaluate()]
        for done, target in pairwise(steps):
            seconds += advance(target - done)
            percentiles.append(np.percentile(np.concatenate(inputs), PERCENTILES, axis=0))
            accuracies.append(evaluate())
            progress(target - done)
    return Run(
        batch_norm, learning_rate, seed, np.array(steps), *np.array(accuracies).T,
        np.array(percentiles), seconds, network.batch_norm_seconds,
    )  # fmt: skip


def sweep(digits, settings, *, batch_norm, bar):
    """Train with every learning rate and seed.

    Parameters
    ----------
    digits : bncore.demo.data.Digits
    settings : Settings
    batch_norm : bool
    bar : tqdm.tqdm
        Moved on by every step.

    Returns
    -------
    dict of float to list of Run
        Per learning rate one run a seed.
    """
    runs = {}
    for rate in settings.learning_rates:
        bar.set_description(f"batch norm {'on' if batch_norm else 'off'}, learning rate {rate:g}")
        # A learning rate that is too high may overflow: a bad run, which is not chosen.
        with np.errstate(over="ignore", invalid="ignore"):
            runs[rate] = [
                train(
                    digits, settings, batch_norm=batch_norm, learning_rate=rate, seed=seed,
                    progress=bar.update,
                )
                for seed in settings.seeds
            ]  # fmt: skip
    return runs


def best(runs):
    """The learning rate with the highest validation accuracy, averaged over training and seeds.

    Parameters
    ----------
    runs : dict of float to list of Run

    Returns
    -------
    float
    """
    return max(runs, key=lambda rate: np.mean([run.mean_validation() for run in runs[rate]]))
