"""oneDNN in the layout of its own choice, blocks of 16 channels (nChw16c): what a network that runs
in oneDNN throughout would use. Bringing data into it and back is not counted."""

from bncore.bench.peers import Unsupported, onednn
from bncore.bench.workloads import Case


class Peer(onednn.Peer):
    def format(self, case: Case) -> str:
        if len(case.shape) == 2:
            raise Unsupported("(N, C) has no blocked layout")
        return "blocked"
