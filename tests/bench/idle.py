#!/usr/bin/env python3
"""What a node costs that has nothing to do: memory and processor time with many idle peers.

usage: idle.py [--peers N,N,...] [--secs N] BINARY

A node joins a network with one other member. Then its saved netmap gets as many members as wanted,
with keys and addresses of their own, and it is started again without a server: it finds them all on
disk and idles. Resident memory and processor time of the whole process are printed for each count.

Needs root and iproute2. Every command is bounded in time.
"""
import argparse, base64, copy, ipaddress, json, os, random, shutil, signal, subprocess, tempfile, time

from run import Space, connect, wait_for


def join(server, space, binary, directory, name, control):
    invite = json.loads(server.run(binary, "server", "invite", "--json", "--socket", control))
    with open(f"{directory}/{name}.join", "w") as file:
        file.write(invite["join"])
    return start(space, binary, directory, name, f"file:{directory}/{name}.join")


def start(space, binary, directory, name, *line):
    return space.start(f"{directory}/{name}.log", binary, "up", *line, "--name", name, "--state-dir",
                       f"{directory}/{name}", "--socket", f"{directory}/{name}.sock", "--interface", f"ov{name}")


def status(space, binary, directory, name):
    try:
        return json.loads(space.run(binary, "status", "--json", "--socket", f"{directory}/{name}.sock"))
    except (RuntimeError, ValueError):
        return {"peers": []}


def stop(space, child):
    child.send_signal(signal.SIGTERM)
    child.wait(10)
    space.children.remove(child)


def fill(path, count, seed):
    """Writes a netmap of `count` peers like the one that is there."""
    netmap = json.loads(seed)
    (number, like), = list(netmap["peers"].items())[:1]
    v4, v6 = (ipaddress.ip_address(like["addrs"][family]) for family in ("v4", "v6"))
    netmap["peers"] = {}
    for step in range(count):
        peer = copy.deepcopy(like)
        peer["name"] = f"idle-{step}"
        peer["node_key"] = base64.b64encode(random.randbytes(32)).decode()
        peer["addrs"] = {"v4": str(v4 + step), "v6": str(v6 + step)}
        peer.pop("last_direct", None)
        netmap["peers"][f"{int(number, 16) + step:08x}"] = peer
    with open(path, "w") as file:
        json.dump(netmap, file)


def cost(pid):
    """Resident bytes and processor seconds; `ip netns exec` has become the program itself."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    ticks = int(fields[11]) + int(fields[12])
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK")



def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--peers", default="1,1000")
    parser.add_argument("--secs", type=int, default=20)
    parser.add_argument("binary")
    args = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="idle-")
    tag = f"i{os.getpid() % 10000}"
    near, far = Space(f"{tag}a"), Space(f"{tag}b")
    try:
        connect(near, far, 1, "")
        control = f"{directory}/server.sock"
        server = near.start(f"{directory}/server.log", args.binary, "server", "--listen", "10.200.1.1:41820",
                            "--public-addr", "10.200.1.1:41820", "--state-dir", f"{directory}/server", "--socket", control)
        wait_for(lambda: os.path.exists(control), "the server")
        node = join(near, near, args.binary, directory, "a", control)
        other = join(near, far, args.binary, directory, "b", control)
        saved = f"{directory}/a/netmap.json"
        wait_for(lambda: status(near, args.binary, directory, "a")["peers"], "the other member")
        wait_for(lambda: os.path.exists(saved) and json.load(open(saved))["peers"], "the saved netmap")
        for space, child in ((near, node), (far, other), (near, server)):
            stop(space, child)
        seed = open(saved).read()
        print("| idle peers | resident, MB | of a core, % |\n|---|---|---|")
        for count in map(int, args.peers.split(",")):
            fill(saved, count, seed)
            child = start(near, args.binary, directory, "a")
            wait_for(lambda: len(status(near, args.binary, directory, "a")["peers"]) == count, "all peers")
            time.sleep(5)
            _, before = cost(child.pid)
            time.sleep(args.secs)
            memory, after = cost(child.pid)
            print(f"| {count} | {memory / 1e6:.1f} | {(after - before) / args.secs * 100:.2f} |", flush=True)
            stop(near, child)
    finally:
        for space in (near, far):
            space.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
