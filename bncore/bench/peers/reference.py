"""bncore on its NumPy backend: the process is started with ``BNCORE_BACKEND=numpy``."""

from bncore.bench.peers.bncore import Peer

__all__ = ["Peer"]
