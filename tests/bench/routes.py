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
import argparse, collections, copy, base64, ipaddress, json, os, random, shutil, subprocess, tempfile, time

from idle import join, start, status, stop
from run import Space, connect, test_flood, wait_for

LOOKUP = ("ForwardingTable", "hash_one", "SipHash", "Hasher", "hashbrown", "prefix_trie")


class Ends:
    """What test_flood of run.py wants of a pair."""

    def __init__(self, near, far, v4):
        self.a, self.b, self.v4 = near, far, v4


def fill(path, seed, count):
    """Adds members beside the one that is there."""
    netmap = json.loads(seed)
    (number, like), = netmap["peers"].items()
    v4, v6 = (ipaddress.ip_address(like["addrs"][family]) for family in ("v4", "v6"))
    for step in range(1, count):
        peer = copy.deepcopy(like)
        peer["name"], peer["node_key"] = f"idle-{step}", base64.b64encode(random.randbytes(32)).decode()
        peer["addrs"] = {"v4": str(v4 + step), "v6": str(v6 + step)}
        peer.pop("last_direct", None)
        netmap["peers"][f"{int(number, 16) + step:08x}"] = peer
    with open(path, "w") as file:
        json.dump(netmap, file)


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
    directory = tempfile.mkdtemp(prefix="routes-")
    tag = f"r{os.getpid() % 10000}"
    near, far = Space(f"{tag}a"), Space(f"{tag}b")
    try:
        connect(near, far, 1, "")
        control = f"{directory}/server.sock"
        with open(f"{directory}/server.toml", "w") as file:
            file.write('network = "10.77.0.0/16"\n')
        server = near.start(f"{directory}/server.log", args.binary, "server", "--listen", "10.200.1.1:41820", "--config",
                            f"{directory}/server.toml", "--public-addr", "10.200.1.1:41820", "--state-dir", f"{directory}/server",
                            "--socket", control)
        wait_for(lambda: os.path.exists(control), "the server")
        node = join(near, near, args.binary, directory, "a", control)
        other = join(near, far, args.binary, directory, "b", control)
        peers = lambda space, name: status(space, args.binary, directory, name)["peers"]
        direct = lambda: any(peer["path"]["kind"] == "direct" for peer in peers(near, "a"))

        def reach():
            near.run("ping", "-c1", "-W1", v4, check=False)
            return direct()

        wait_for(lambda: peers(near, "a"), "the other member")
        v4 = peers(near, "a")[0]["ipv4"]
        wait_for(reach, "a direct path")
        time.sleep(2)
        for space, child in ((near, node), (far, other), (near, server)):
            stop(space, child)
        seed = open(f"{directory}/a/netmap.json").read()
        start(far, args.binary, directory, "b")
        print("| peers | prefixes | 64 B datagrams, kpps | look-up, % of the packet threads |\n|---|---|---|---|")
        for count in (1, args.peers):
            fill(f"{directory}/a/netmap.json", seed, count)
            child = start(near, args.binary, directory, "a")
            wait_for(lambda: len(peers(near, "a")) == count, "all peers", 60)
            wait_for(reach, "a direct path", 60)
            data = f"{directory}/perf.{count}"
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
            stop(near, child)
    finally:
        for space in (near, far):
            space.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
