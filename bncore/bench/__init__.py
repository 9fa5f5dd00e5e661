"""Benchmark: bncore against other libraries and against the memory's own limit.

Every library runs in a process of its own, and the processes take turns, so that what disturbs the
machine disturbs all of them. Ratios are medians over the rounds of what was measured side by side.

    workloads   what is measured: shapes, and the cases made of them
    worker      one library's process, and the protocol it speaks
    peers       one module per library: how its documentation says to call it
    runner      turns and rounds
    disturbance other processes at work meanwhile
    outcome     what came out, and its JSON file
    summary     the lead on each peer, and the rows without one
    goals       what the rows should reach, and whether they do
    report      what is printed
    markdown    a short table for a text
    plot        bandwidth against size
    comparisons what bncore's features are compared with
    features    what they cost
    features_report  what is printed of that
    cli         the command line, `add_arguments` and `main`
"""

from bncore.bench.cli import add_arguments, main

__all__ = ["add_arguments", "main"]
