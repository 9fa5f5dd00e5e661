"""Peak memory of a training step: batch norm and leaky ReLU forward, their gradients backward.

x and dy are there before; what a step takes beyond them is counted, its results included. Each
candidate has a process of its own, whose resident memory is asked for at its highest.

    python benchmarks/memory.py --markdown memory.md
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

SLOPE = 0.01
ACTIVATION = ("leaky_relu", SLOPE)

Step = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""x (N, C, H, W) and dy to y and dx."""


def torch(channels: int, in_place: bool) -> Step:
    """``BatchNorm2d`` and ``LeakyReLU``, which may write over what it is given."""
    import torch

    network = torch.nn.Sequential(
        torch.nn.BatchNorm2d(channels), torch.nn.LeakyReLU(SLOPE, inplace=in_place)
    )

    def step(x, dy):
        leaf = torch.from_numpy(x).requires_grad_()
        y = network(leaf)
        y.backward(torch.from_numpy(dy))
        return y.detach().numpy(), leaf.grad.numpy()

    return step


def one_after_another(channels: int) -> Step:
    """The activation and its gradient by NumPy."""
    import bncore

    gamma, beta = _parameters(channels)

    def step(x, dy):
        y, saved = bncore.batch_norm(x, gamma, beta)
        np.multiply(y, SLOPE, out=y, where=y < 0)
        dz = dy.copy()
        np.multiply(dz, SLOPE, out=dz, where=y < 0)
        return y, bncore.batch_norm_backward(dz, saved).dx

    return step


def fused(channels: int, over_dy: bool) -> Step:
    """The activation in the same pass; dx in a fresh array or over dy."""
    import bncore

    gamma, beta = _parameters(channels)

    def step(x, dy):
        y, saved = bncore.batch_norm(x, gamma, beta, activation=ACTIVATION)
        return y, bncore.batch_norm_backward(dy, saved, out=dy if over_dy else None).dx

    return step


def given(channels: int) -> Step:
    """Into arrays for y and dx that are there from the first step on, and counted."""
    import bncore

    gamma, beta = _parameters(channels)
    arrays: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def step(x, dy):
        out, dx = arrays.setdefault(x.shape, (np.empty_like(x), np.empty_like(x)))
        for _ in range(3):
            y, saved = bncore.batch_norm(x, gamma, beta, activation=ACTIVATION, out=out)
            bncore.batch_norm_backward(dy, saved, out=dx)
        return y, dx

    return step


def from_y(channels: int, over_dy: bool) -> Step:
    """y over x, and the gradient from y; dx in a fresh array or over dy."""
    import bncore

    layer = bncore.InPlaceBatchNorm(channels, activation=ACTIVATION)

    def step(x, dy):
        y = layer(x)
        return y, layer.backward(dy, out=dy if over_dy else None)

    return step


CANDIDATES: dict[str, Callable[[int], Step]] = {
    "PyTorch": partial(torch, in_place=False),
    "PyTorch, `LeakyReLU(inplace=True)`": partial(torch, in_place=True),
    "bncore, leaky ReLU by NumPy": one_after_another,
    "bncore, activation fused": partial(fused, over_dy=False),
    "bncore, activation fused, `out=`": given,
    "bncore, activation fused, dx over dy": partial(fused, over_dy=True),
    "`bncore.InPlaceBatchNorm`": partial(from_y, over_dy=False),
    "`bncore.InPlaceBatchNorm`, dx over dy": partial(from_y, over_dy=True),
}


def _parameters(channels: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(channels, np.float32), np.zeros(channels, np.float32)


def data(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """x and dy, made without any other array: the highest memory until then is theirs."""
    random = np.random.default_rng(0)
    x, dy = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for array in (x, dy):
        random.standard_normal(dtype=np.float32, out=array)
    return x, dy


def peak_of(name: str, shape: tuple[int, ...]) -> int:
    """Bytes that a step takes at most beyond x and dy, in this process."""
    step = CANDIDATES[name](shape[1])
    for _ in range(3):
        step(*data((4, shape[1], 32, 32)))  # threads, and what libraries keep for themselves
    x, dy = data(shape)
    before = _highest()
    results = step(x, dy)
    return _highest() - before if results else 0


def _highest() -> int:
    """The highest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(shape: tuple[int, ...]) -> dict[str, int | None]:
    """Bytes by candidate; None where its library is missing."""
    peaks: dict[str, int | None] = {}
    for name in CANDIDATES:
        command = [sys.executable, __file__, "--shape", _join(shape, ","), "--candidate", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = json.loads(done.stdout)
    return peaks


def show(peaks: dict[str, int | None], shape: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Peak memory of a training step beyond x and dy, {_join(shape)} float32")
    for column in ("", "MB", "arrays of x's size"):
        table.add_column(column, justify="right" if column else "left")
    for row in _rows(peaks, shape):
        table.add_row(*row)
    Console().print(table)


def markdown(peaks: dict[str, int | None], shape: tuple[int, ...]) -> str:
    """The same table for a text."""
    head = [f"{_join(shape, '×')} float32", "MB beyond x and dy", "arrays of x's size"]
    lines = [head, ["---", "---:", "---:"], *_rows(peaks, shape)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(peaks: dict[str, int | None], shape: tuple[int, ...]) -> list[list[str]]:
    size = 4 * math.prod(shape)
    return [
        [name, "–", "–"] if peak is None else [name, f"{peak / 1e6:.0f}", f"{peak / size:.2f}"]
        for name, peak in peaks.items()
    ]


def _join(shape: tuple[int, ...], sign: str = "x") -> str:
    return sign.join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="64,64,112,112", help="N,C,H,W")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = tuple(int(length) for length in args.shape.split(","))
    if args.candidate:
        try:
            print(json.dumps(peak_of(args.candidate, shape)))
        except ModuleNotFoundError:
            print("null")
        return
    peaks = measure(shape)
    show(peaks, shape)
    if args.markdown:
        args.markdown.write_text(markdown(peaks, shape), encoding="utf-8")


if __name__ == "__main__":
    main()
