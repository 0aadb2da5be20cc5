#!/usr/bin/env python3
"""What peers cost a node that talks to all of them: memory and processor time with many sessions.

usage: active.py [--peers N,N,...] [--secs N] BINARY

A server and a node share a namespace; every peer has one of its own and a cable to it. The node pings
every peer, so that there is a session and a direct path to each, and again four times a second while
processor time is measured. Printed for each count, the same node going on with more peers.

Needs root, iproute2 and iputils-ping. Every command is bounded in time.
"""
import argparse, json, os, shutil, tempfile, time

from idle import cost
from run import Space, sh, wait_for

HUB = "10.201.0.1"


def plug(hub, space, number):
    """A cable from a peer's namespace to the bridge of the node's."""
    sh("ip", "link", "add", f"p{number}", "netns", hub.name, "type", "veth", "peer", "name", "eth0", "netns", space.name)
    hub.run("ip", "link", "set", f"p{number}", "master", "br0", "up")
    space.run("ip", "addr", "add", f"10.201.{1 + number // 250}.{1 + number % 250}/16", "dev", "eth0")
    space.run("ip", "link", "set", "eth0", "up")


def up(space, args, directory, name, line):
    with open(f"{directory}/{name}.join", "w") as file:
        file.write(line)
    return space.start(f"{directory}/{name}.log", args.binary, "up", f"file:{directory}/{name}.join", "--name", name,
                       "--state-dir", f"{directory}/{name}", "--socket", f"{directory}/{name}.sock")


def direct(hub, args, directory):
    try:
        peers = json.loads(hub.run(args.binary, "status", "--json", "--socket", f"{directory}/hub.sock"))["peers"]
    except (RuntimeError, ValueError):
        return []
    return [peer["ipv4"] for peer in peers if peer["path"]["kind"] == "direct" and peer["last_handshake_s"] is not None]


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
    directory = tempfile.mkdtemp(prefix="active-")
    tag = f"a{os.getpid() % 10000}"
    hub = Space(f"{tag}h")
    spaces = [hub]
    try:
        for words in ("link add br0 type bridge", f"addr add {HUB}/16 dev br0", "link set br0 up"):
            hub.run("ip", *words.split())
        control = f"{directory}/server.sock"
        hub.start(f"{directory}/server.log", args.binary, "server", "--listen", f"{HUB}:41820", "--public-addr",
                  f"{HUB}:41820", "--state-dir", f"{directory}/server", "--socket", control)
        wait_for(lambda: os.path.exists(control), "the server")
        counts = sorted(map(int, args.peers.split(",")))
        invite = json.loads(hub.run(args.binary, "server", "invite", "--uses", str(counts[-1] + 1), "--json",
                                    "--socket", control))
        node = up(hub, args, directory, "hub", invite["join"])
        print("| active peers | resident, MB | of a core, % |\n|---|---|---|")
        made = 0
        for count in counts:
            while made < count:
                space = Space(f"{tag}n{made}")
                spaces.append(space)
                plug(hub, space, made)
                up(space, args, directory, f"n{made}", invite["join"])
                made += 1
            wait_for(lambda: len(direct(hub, args, directory)) == count, f"{count} direct peers", 60)
            peers = direct(hub, args, directory)
            ping_all(hub, peers, 8)
            _, before = cost(node.pid)
            started = time.time()
            ping_all(hub, peers, args.secs * 4)
            memory, after = cost(node.pid)
            print(f"| {count} | {memory / 1e6:.1f} | {(after - before) / (time.time() - started) * 100:.1f} |", flush=True)
    finally:
        for space in spaces:
            space.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
