#!/usr/bin/env python3
"""What a large forwarding table costs under load: the share of the look-up in a profile.

usage: routes.py [--peers N] [--secs N] BINARY

Two nodes join a network, and the saved netmap of one gets so many members that it has two prefixes for
each. Both start again without a server and find each other. Then 64-byte datagrams flow from it, each of
them looked up, once with one peer and once with all, while perf records the node. Printed are datagrams
that arrived, and the share of samples whose top is a function of the look-up: the table's own, hashing,
tries; and the functions that have most.

Needs root, iproute2 and perf. Every command is bounded in time.
"""
import argparse, collections, os, subprocess, time

from network import Network, Space, connect, wait_for
from run import test_flood

LOOKUP = ("ForwardingTable", "hash_one", "SipHash", "Hasher", "hashbrown", "prefix_trie")


class Ends:
    """What test_flood of run.py wants of a pair."""

    def __init__(self, near, far, v4):
        self.a, self.b, self.v4 = near, far, v4


def tops(data):
    """Functions on top, of the packet threads."""
    text = subprocess.run(["perf", "script", "-i", data, "-F", "comm,ip,sym", "--no-inline"], text=True,
                          capture_output=True, timeout=60).stdout
    counts = collections.Counter()
    for line in text.splitlines():
        comm, _, symbol = (line.split(None, 2) + ["", ""])[:3]
        if comm in ("tun-to-udp", "udp-to-tun"):
            counts[symbol] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--peers", type=int, default=5000)
    parser.add_argument("--secs", type=int, default=4)
    parser.add_argument("binary")
    args = parser.parse_args()
    network = Network(args.binary)
    tag = f"r{os.getpid() % 10000}"
    near, far = Space(f"{tag}a"), Space(f"{tag}b")
    try:
        connect(near, far, 1)
        with open(f"{network.directory}/server.toml", "w") as file:
            file.write('network = "10.77.0.0/16"\n')
        server = network.serve(near, ["10.200.1.1"], "--config", f"{network.directory}/server.toml")
        node, other = network.join(near, "a"), network.join(far, "b")

        def reach():
            near.run("ping", "-c1", "-W1", v4, check=False)
            return any(peer["path"]["kind"] == "direct" for peer in network.peers("a"))

        wait_for(lambda: network.peers("a"), "the other member")
        v4 = network.peers("a")[0]["ipv4"]
        wait_for(reach, "a direct path")
        time.sleep(2)
        for space, child in ((near, node), (far, other), (near, server)):
            space.stop(child)
        seed = open(network.netmap("a")).read()
        network.start(far, "b")
        print("| peers | prefixes | 64 B datagrams, kpps | look-up, % of the packet threads |\n|---|---|---|---|")
        for count in (1, args.peers):
            network.fill("a", seed, count, keep=True)
            child = network.start(near, "a")
            wait_for(lambda: len(network.peers("a")) == count, "all peers", 60)
            wait_for(reach, "a direct path", 60)
            data = f"{network.directory}/perf.{count}"
            perf = subprocess.Popen(["perf", "record", "-q", "-F", "1999", "-p", str(child.pid), "-o", data, "--", "sleep",
                                     str(args.secs)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rate = test_flood(Ends(near, far, v4), args.secs, 64, 1)
            perf.wait(30)
            counts = tops(data)
            total = sum(counts.values()) or 1
            found = sum(number for name, number in counts.items() if any(word in name for word in LOOKUP))
            print(f"| {count} | {2 * count} | {rate:.0f} | {100 * found / total:.2f} of {total} samples |", flush=True)
            for name, number in counts.most_common(6):
                print(f"    {100 * number / total:5.1f} % {name}")
            near.stop(child)
    finally:
        for space in (near, far):
            space.close()
        network.close()


if __name__ == "__main__":
    main()
