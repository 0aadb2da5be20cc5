#!/usr/bin/env python3
"""How much of the round trip at half load is waiting for a processor, and how much is the overlay's own.

usage: turns.py [--rounds N] [--mtu N] BINARY

A ping through the overlay wakes four sleeping threads one after the other: the near node's, the far
node's, the near one's again, and ping itself. Measured in turns, on the same machine:

  overlay   ping beside one TCP flow of half of what the overlay carries
  link      ping over a bare link beside a flow of the same rate there, while two threads that hand
            work to each other burn as much processor time, train by train, as the two nodes did
  threads   instead of that ping: a token that four sleeping threads hand round, beside the same load

What `threads` waits, any program waits that is made of four threads on this machine. Printed are
medians and ranges over the rounds, and the processor time that each load took.

Needs root, iproute2, iputils-ping, iperf3 and a C compiler.
"""
import argparse, os, signal, statistics, subprocess, sys, time

import run
from network import busy, cost, load_tool

TRAIN_BITS = 65_536 * 8
# Two threads work for every train: one seals, one opens.
STAGES = 2
# The fourth is the one that lets the token go.
HOPS = 3


def percentiles(times):
    times = sorted(times)
    return times[len(times) // 2], times[len(times) * 99 // 100]


def ping(pair):
    measured = run.test_ping(pair)
    return measured["ping p50 us"], measured["ping p99 us"]


def token(pair):
    out = pair.a.run(load_tool(), "hops", str(HOPS), "400", "5000", timeout=60)
    return percentiles(float(line) for line in out.split())


def beside(pair, rate, work_us, measure):
    """What `measure` gives beside a flow and so many microseconds of work for each train; and the
    processors' seconds in a second."""
    loads = [pair.a.start(os.devnull, "iperf3", "-c", pair.v4, "-t", "4", "-b", str(int(rate)))]
    period_us = TRAIN_BITS / rate * 1e6
    if work_us:
        loads.append(pair.a.start(os.devnull, load_tool(), "burn", str(int(period_us)), str(int(work_us)), str(STAGES), "4"))
    time.sleep(0.5)
    before, started = busy(), time.time()
    try:
        result = measure(pair)
        return result, (busy() - before) / (time.time() - started)
    finally:
        for load in loads:
            pair.a.children.remove(load)
            try:
                load.wait(20)
            except subprocess.TimeoutExpired:
                load.kill()


def work_for(overlay, rate):
    """The processor time of both nodes, as microseconds of each stage for a train."""
    def spent(_):
        used = lambda: sum(cost(node.pid)[1] for node in overlay.nodes)
        before, started = used(), time.time()
        time.sleep(2)
        return (used() - before) / (time.time() - started)

    of_nodes, _ = beside(overlay, rate, 0, spent)
    return of_nodes / STAGES * TRAIN_BITS / rate * 1e6


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mtu", type=int, default=1420)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("binary")
    args = parser.parse_args()
    args.no_udp, args.ethtool = False, ""
    # Whoever ends this early, by timeout(1) say, leaves nothing running either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))
    overlay = run.Pair("overlay", args.binary, 0, args)
    link = run.Pair("link", "", 1, args)
    rows = {}
    try:
        run.test_tcp1(overlay, 2)
        rate = overlay.full_load / 2
        work_us = work_for(overlay, rate)
        print(f"{rate / 1e9:.2f} Gb/s; {work_us:.0f} us of work for each train and thread")
        for _ in range(args.rounds):
            for name, pair, work, measure in (("overlay", overlay, 0, ping), ("link", link, work_us, ping),
                                              ("threads", link, work_us, token)):
                (p50, p99), load = beside(pair, rate, work, measure)
                rows.setdefault(name, []).append((p50, p99, load * 100))
    finally:
        overlay.close()
        link.close()
    print("\n| beside half load | p50 us | p99 us | processors in use, % of one |\n|---|---|---|---|")
    for name, rounds in rows.items():
        cells = [f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})" for values in zip(*rounds)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
