"""Other libraries' conventions, as arguments of `bncore.BatchNorm`.

They differ in the channel axis, in eps, in which way round momentum is, in the variance that the
running one takes, and in what becomes of a batch of one value per channel. All are here in bncore's
terms: ``momentum`` is the weight of the newest batch, 1 minus what most call momentum or decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

_CONVENTIONS: dict[str, dict[str, Any]] = {
    # torch.nn.BatchNorm1d and its like
    "pytorch": {"axis": 1, "eps": 1e-5, "momentum": 0.1, "ddof": 1, "single_value": "raise"},
    # keras.layers.BatchNormalization, version 3
    "keras": {"axis": -1, "eps": 1e-3, "momentum": 0.01, "ddof": 0, "single_value": "zero"},
    # flax.linen.BatchNorm, flax.nnx.BatchNorm
    "flax": {"axis": -1, "eps": 1e-5, "momentum": 0.01, "ddof": 0, "single_value": "zero"},
    # The operator BatchNormalization, version 15
    "onnx": {"axis": 1, "eps": 1e-5, "momentum": 0.1, "ddof": 0, "single_value": "zero"},
    # chainer.links.BatchNormalization: the variance times n / max(n - 1, 1)
    "chainer": {"axis": 1, "eps": 2e-5, "momentum": 0.1, "ddof": 1, "single_value": "zero"},
    # The operator BatchNorm; gluon's layer has another eps, 1e-5
    "mxnet": {"axis": 1, "eps": 1e-3, "momentum": 0.1, "ddof": 0, "single_value": "zero"},
}


class Presets(Mapping[str, Mapping[str, Any]]):
    """Arguments of a layer that behaves as another library's does by default, by its name.

    Read-only; of "pytorch", "keras", "flax", "onnx", "chainer" and "mxnet".

    Examples
    --------
    >>> import bncore
    >>> bncore.BatchNorm(64, **bncore.presets["keras"]).eps
    0.001
    >>> bncore.BatchNorm(64, **{**bncore.presets["keras"], "axis": 1}).axis
    1
    """

    def __init__(self, conventions: Mapping[str, Mapping[str, Any]]) -> None:
        self._conventions = {name: MappingProxyType(dict(c)) for name, c in conventions.items()}

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        try:
            return self._conventions[name]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, self._conventions))
            raise KeyError(f"there are the presets {known}, not {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._conventions)

    def __len__(self) -> int:
        return len(self._conventions)

    def __repr__(self) -> str:
        return f"Presets({', '.join(map(repr, self._conventions))})"


presets = Presets(_CONVENTIONS)
