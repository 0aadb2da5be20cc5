#!/usr/bin/env python3
"""What peers cost a node that talks to all of them: memory and processor time with many sessions.

usage: active.py [--peers N,N,...] [--secs N] BINARY

A server and a node share a namespace; every peer has one of its own and a cable to it. The node pings
every peer, so that there is a session and a direct path to each, and again four times a second while
processor time is measured. Printed for each count, the same node going on with more peers.

Needs root, iproute2 and iputils-ping. Every command is bounded in time.
"""
import argparse, os, time

from network import Network, Space, cost, sh, wait_for

HUB = "10.201.0.1"


def plug(hub, space, number):
    """A cable from a peer's namespace to the bridge of the node's."""
    sh("ip", "link", "add", f"p{number}", "netns", hub.name, "type", "veth", "peer", "name", "eth0", "netns", space.name)
    hub.run("ip", "link", "set", f"p{number}", "master", "br0", "up")
    space.run("ip", "addr", "add", f"10.201.{1 + number // 250}.{1 + number % 250}/16", "dev", "eth0")
    space.run("ip", "link", "set", "eth0", "up")


def direct(network):
    return [peer["ipv4"] for peer in network.peers("hub")
            if peer["path"]["kind"] == "direct" and peer["last_handshake_s"] is not None]


def ping_all(hub, peers, count):
    """All at once, four times a second each."""
    loop = f"for p in {' '.join(peers)}; do ping -q -i 0.25 -c {count} -W 1 $p >/dev/null & done; wait"
    hub.run("sh", "-c", loop, timeout=count + 30, check=False)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--peers", default="1,10,50")
    parser.add_argument("--secs", type=int, default=10)
    parser.add_argument("binary")
    args = parser.parse_args()
    network = Network(args.binary)
    tag = f"a{os.getpid() % 10000}"
    hub = Space(f"{tag}h")
    spaces = [hub]
    try:
        for words in ("link add br0 type bridge", f"addr add {HUB}/16 dev br0", "link set br0 up"):
            hub.run("ip", *words.split())
        network.serve(hub, [HUB])
        counts = sorted(map(int, args.peers.split(",")))
        line = network.invite(counts[-1] + 1)
        node = network.join(hub, "hub", line=line)
        print("| active peers | resident, MB | of a core, % |\n|---|---|---|")
        made = 0
        for count in counts:
            while made < count:
                space = Space(f"{tag}n{made}")
                spaces.append(space)
                plug(hub, space, made)
                network.join(space, f"n{made}", line=line)
                made += 1
            wait_for(lambda: len(direct(network)) == count, f"{count} direct peers", 60)
            peers = direct(network)
            ping_all(hub, peers, 8)
            _, before = cost(node.pid)
            started = time.time()
            ping_all(hub, peers, args.secs * 4)
            memory, after = cost(node.pid)
            print(f"| {count} | {memory / 1e6:.1f} | {(after - before) / (time.time() - started) * 100:.1f} |", flush=True)
    finally:
        for space in spaces:
            space.close()
        network.close()


if __name__ == "__main__":
    main()
