#!/usr/bin/env python3
"""What a node costs that has nothing to do: memory and processor time with many idle peers.

usage: idle.py [--peers N,N,...] [--secs N] BINARY

A node joins a network with one other member. Then its saved netmap gets as many members as wanted,
with keys and addresses of their own, and it is started again without a server: it finds them all on
disk and idles. Resident memory and processor time of the whole process are printed for each count.

Needs root and iproute2. Every command is bounded in time.
"""
import argparse, json, os, time

from network import Network, Space, connect, cost, wait_for


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--peers", default="1,1000")
    parser.add_argument("--secs", type=int, default=20)
    parser.add_argument("binary")
    args = parser.parse_args()
    network = Network(args.binary)
    tag = f"i{os.getpid() % 10000}"
    near, far = Space(f"{tag}a"), Space(f"{tag}b")
    try:
        connect(near, far, 1)
        server = network.serve(near, ["10.200.1.1"])
        node, other = network.join(near, "a"), network.join(far, "b")
        saved = network.netmap("a")
        wait_for(lambda: network.peers("a"), "the other member")
        wait_for(lambda: os.path.exists(saved) and json.load(open(saved))["peers"], "the saved netmap")
        for space, child in ((near, node), (far, other), (near, server)):
            space.stop(child)
        seed = open(saved).read()
        print("| idle peers | resident, MB | of a core, % |\n|---|---|---|")
        for count in map(int, args.peers.split(",")):
            network.fill("a", seed, count)
            child = network.start(near, "a")
            wait_for(lambda: len(network.peers("a")) == count, "all peers")
            time.sleep(5)
            _, before = cost(child.pid)
            time.sleep(args.secs)
            memory, after = cost(child.pid)
            print(f"| {count} | {memory / 1e6:.1f} | {(after - before) / args.secs * 100:.2f} |", flush=True)
            near.stop(child)
    finally:
        for space in (near, far):
            space.close()
        network.close()


if __name__ == "__main__":
    main()
