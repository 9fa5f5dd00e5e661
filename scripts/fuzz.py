"""Call bncore with random arguments for a while; each batch in a process of its own.

    python scripts/fuzz.py [--minutes 30]

A crash ends the batch's process only: its last call, written down before it was made, joins the
corpus ``tests/trust/fuzz_corpus.json``, which the test suite replays, and so do calls on which the
backends disagree.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRUST = ROOT / "tests" / "trust"
CORPUS = TRUST / "fuzz_corpus.json"
BATCH = 2000
"""Calls in one process."""


def run_batch(seed, diary):
    """Make the calls; write each down first."""
    sys.path[:0] = [str(ROOT), str(TRUST)]
    from trust_fuzz import check

    warnings.simplefilter("ignore")
    numbers = random.Random(seed)
    for _ in range(BATCH):
        call = [numbers.randrange(2**16) for _ in range(numbers.randrange(40))]
        Path(diary).write_text(json.dumps(call))
        check(call)


def keep(call):
    corpus = json.loads(CORPUS.read_text())
    if call not in corpus:
        CORPUS.write_text(
            "[\n" + ",\n".join(f"  {json.dumps(c)}" for c in [*corpus, call]) + "\n]\n"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch:
        return run_batch(*options.batch)
    end, failures, batches = time.monotonic() + 60 * options.minutes, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        diary = f"{directory}/call.json"
        while time.monotonic() < end:
            seed = str(random.SystemRandom().randrange(2**32))
            command = [sys.executable, "-X", "faulthandler", __file__, "--batch", seed, diary]
            done = subprocess.run(command, capture_output=True, text=True)
            batches += 1
            if done.returncode:
                failures += 1
                call = json.loads(Path(diary).read_text())
                keep(call)
                print(f"exit code {done.returncode} on {call}\n{done.stderr[-2000:]}", flush=True)
    print(f"{batches * BATCH} calls at most, {failures} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
