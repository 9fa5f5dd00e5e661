"""oneDNN in the layout of its own choice, blocks of channels: what a network that runs in oneDNN
throughout would use. Bringing data into it and back is not counted.

A block is what a vector holds: 16 channels (nChw16c), or 8 (nChw8c) where there is no AVX-512.
"""

from bncore.bench.peers import Unsupported, onednn
from bncore.bench.workloads import Case


class Peer(onednn.Peer):
    def format(self, case: Case) -> str:
        if len(case.shape) == 2:
            raise Unsupported("(N, C) has no blocked layout")
        return f"blocks of {self.driver.onednn_block()}"
