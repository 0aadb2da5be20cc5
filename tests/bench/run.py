#!/usr/bin/env python3
"""Throughput, cost and latency of the data plane between two network namespaces on one machine.

usage: run.py [--rounds N] [--secs N] [--mtu N] [--check MB] [--only TEST,...]
              [--rival KIND=BINARY]... [--relayed NAME=BINARY]... NAME=BINARY...

Every BINARY is brought up once as a server and two nodes, side by side; then each round runs each
test once with each of them in random order, so that the drift of the machine hits all alike. NAME
`veth` without a binary is the bare link. Medians and ranges over the rounds are printed as a table.
All tests take seven minutes for a round of six contenders with --secs 1; --only takes a part of them:
tcp1,tcp8,reverse,bidir / udp64,udp512,udp1200 / flood64,packet64,train64,flood1200 / ping,one,half,smooth.

  --rival K=B another program beside ours: K is gotatun, boringtun, wireguard-go or nebula
  --relayed N=B  like NAME=BINARY, and the nodes can reach only the server, which forwards between them
  --relay     so it is for each NAME=BINARY
  --no-udp    the UDP of such nodes is dropped, so the relay has their control connections only
  --check MB  before measuring, compare SHA-256 of MB megabytes each way over IPv4 and IPv6, and
              UDP datagrams of odd sizes byte by byte
  --ethtool T settings for both ends of the link, e.g. 'tx off' to try what happens without offloads
  --config T  a line for the nodes' node.toml (may be repeated), e.g. 'udp-gso = false'

Needs root, iproute2, iputils-ping, iperf3 and a C compiler. Every command is bounded in time.
"""
import argparse, ctypes, hashlib, json, os, random, shutil, signal, socket, statistics
import subprocess, sys, tempfile, time

import rivals
from network import LIBC, Network, Space, busy, connect, load_tool, sh, wait_for


class Pair:
    """Two ends, and how one calls the other."""

    def __init__(self, name, binary, number, args, rival=False, relayed=False):
        self.name, self.binary, self.rival, self.full_load = name, binary, rival, 1e9
        self.dir = tempfile.mkdtemp(prefix="bench-")
        self.device, self.mac = None, "-"
        tag = f"b{os.getpid() % 10000}n{number}"
        self.a, self.b = Space(f"{tag}a"), Space(f"{tag}b")
        self.spaces = [self.a, self.b]
        server = self.a
        if relayed:
            server = Space(f"{tag}s")
            self.spaces.append(server)
            connect(server, self.a, number * 2, args.ethtool)
            connect(server, self.b, number * 2 + 1, args.ethtool)
            for space in (self.a, self.b) if args.no_udp else ():
                space.run("nft", "add table inet no; add chain inet no out { type filter hook output priority 0; }; "
                          "add rule inet no out oifname bench* meta l4proto udp drop")
        else:
            connect(self.a, self.b, number * 2, args.ethtool)
        self.v4, self.v6, self.back = f"10.200.{number * 2}.2", None, f"10.200.{number * 2}.1"
        if rival:
            underlay = [f"10.200.{number * 2}.{host}" for host in (1, 2)]
            rivals.start(name, self, binary, underlay, args.mtu, wait_for)
        elif binary:
            hosts = [f"10.200.{number * 2 + way}.1" for way in range(2 if relayed else 1)]
            self.bring_up(server, hosts, relayed, args)
        self.b.start(os.devnull, "iperf3", "-s")
        time.sleep(0.3)

    def bring_up(self, server, hosts, relayed, args):
        self.network = Network(self.binary, self.dir)
        self.network.serve(server, hosts, listen="0.0.0.0" if relayed else None)
        with open(f"{self.dir}/node.toml", "w") as config:
            config.write("\n".join(args.config) + "\n")
        self.nodes = [self.network.join(space, host, "--mtu", str(args.mtu), "--config", f"{self.dir}/node.toml")
                      for space, host in ((self.a, "a"), (self.b, "b"))]
        wanted = "direct"
        if relayed:
            wanted = "relay-tcp" if args.no_udp else "relay-udp"
        wait_for(lambda: self.path() == wanted, f"a {wanted} path")

    def way_out(self):
        """What a packet socket has to know: the interface towards the other end, the next hop's
        address on it, and our own."""
        route = json.loads(self.a.run("ip", "-j", "route", "get", self.v4))[0]
        link = json.loads(self.b.run("ip", "-j", "link", "show", "dev", "bench" + route["dev"][5:-1] + "b"))[0] \
            if route["dev"].startswith("bench") else {"address": "-"}
        return route["dev"], link["address"], route["prefsrc"]

    def status(self, host="a"):
        return self.network.status(host)

    def path(self):
        try:
            status = self.status()
        except (RuntimeError, ValueError):
            return None
        self.back = status["self"]["ipv4"]
        for peer in status["peers"]:
            self.v4, self.v6 = peer["ipv4"], peer["ipv6"]
            self.a.run("ping", "-c1", "-W1", self.v4, check=False)
            return peer["path"]["kind"]
        return None

    def iperf(self, secs, *extra):
        out = self.a.run("iperf3", "-J", "-c", self.v4, "-t", str(secs), *extra, timeout=secs + 20, check=False)
        return json.loads(out)["end"]

    def close(self):
        for space in self.spaces:
            space.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def received(end):
    return end["sum_received"]["bits_per_second"] / 1e9


def test_tcp1(pair, secs):
    before = busy()
    end = pair.iperf(secs)
    gigabytes = end["sum_received"]["bytes"] / 1e9
    pair.full_load = end["sum_received"]["bits_per_second"]
    return {"tcp1 Gb/s": received(end), "CPU s/GB": (busy() - before) / gigabytes}


def test_udp(pair, secs, size):
    total = pair.iperf(secs, "-u", "-b", "0", "-l", str(size))["sum"]
    return (total["packets"] - total["lost_packets"]) / total["seconds"] / 1e3


def test_ping(pair, what="ping"):
    out = pair.a.run("ping", "-c", "400", "-i", "0.005", "-W", "1", pair.v4, timeout=60)
    times = sorted(float(line.split("time=")[1].split()[0]) * 1e3 for line in out.splitlines() if "time=" in line)
    return {f"{what} p50 us": times[len(times) // 2], f"{what} p99 us": times[len(times) * 99 // 100]}


def test_one(pair):
    """All that takes part on one processor, which is awake from the first packet to the last: what is
    left of the round trip is work, and none of it the time that a sleeping processor takes to wake."""
    everywhere = os.sched_getaffinity(0)

    def run_on(processors):
        os.sched_setaffinity(0, processors)
        for child in [child for space in pair.spaces for child in space.children]:
            sh("taskset", "-a", "-c", "-p", ",".join(map(str, processors)), str(child.pid))

    try:
        run_on({min(everywhere)})
        return test_ping(pair, "ping on one processor")
    finally:
        run_on(everywhere)


def test_half(pair, what="ping at half load", *extra):
    """Beside one TCP flow of half of what `tcp1` has just reached."""
    rate = str(int(pair.full_load / 2))
    load = pair.a.start(os.devnull, "iperf3", "-c", pair.v4, "-t", "3", "-b", rate, *extra)
    time.sleep(0.3)
    try:
        return test_ping(pair, what)
    finally:
        pair.a.children.remove(load)
        load.wait(20)


def test_bidir(pair, secs):
    before = busy()
    end = pair.iperf(secs, "--bidir")
    ways = [end["sum_received"], end.get("sum_received_bidir_reverse", {"bytes": 0, "bits_per_second": 0})]
    gigabytes = sum(way["bytes"] for way in ways) / 1e9
    rate = sum(way["bits_per_second"] for way in ways) / 1e9
    return {"bidir Gb/s": rate, "bidir CPU s/GB": (busy() - before) / gigabytes}


def test_flood(pair, secs, size, segments):
    """A sender that is not the bottleneck: sendmmsg of 64 datagrams, each cut into `segments`."""
    sink = sink_at(pair)
    near = pair.a.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))()
    near.connect(sink.getsockname())
    if segments > 1:
        near.setsockopt(socket.SOL_UDP, 103, size)  # UDP_SEGMENT
    payload = ctypes.create_string_buffer(size * segments)
    piece = (ctypes.c_void_p * 2)(ctypes.addressof(payload), size * segments)
    # struct mmsghdr: name, name length, pieces, count, control, its length, flags, sent.
    batch = (ctypes.c_uint64 * (8 * 64))()
    for number in range(64):
        batch[number * 8 + 2], batch[number * 8 + 3] = ctypes.addressof(piece), 1

    before, started = arrived(pair), time.time()
    while time.time() < started + secs:
        for _ in range(8):
            LIBC.sendmmsg(near.fileno(), batch, 64, 0)
    took = time.time() - started
    return (arrived(pair) - before) / took / 1e3


def sink_at(pair):
    sink = pair.b.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))()
    sink.bind((pair.v4, 0))
    return sink


def arrived(pair):
    """Datagrams that came to a socket at the far end, whether it had room for them or not."""
    lines = [line.split() for line in pair.b.run("cat", "/proc/net/snmp").splitlines() if line.startswith("Udp:")]
    named = dict(zip(lines[0][1:], lines[1][1:]))
    return int(named["InDatagrams"]) + int(named["RcvbufErrors"])


def test_packet(pair, secs, size):
    """The same from a packet socket, straight into the interface: no socket, route or queue of the
    sender's is in the way. What it made is told as well."""
    sink = sink_at(pair)
    device, mac, source = pair.way_out()
    before = arrived(pair)
    out = pair.a.run(load_tool(), "flood", device, mac, source, pair.v4, str(sink.getsockname()[1]), str(size), str(secs))
    what = f"{size} B, packet socket"
    return {f"{what}, kpps": (arrived(pair) - before) / secs / 1e3, f"{what}: made by it, kpps": int(out) / secs / 1e3}


TESTS = {
    "tcp1": test_tcp1,
    "tcp8": lambda pair, secs: {"tcp8 Gb/s": received(pair.iperf(secs, "-P", "8"))},
    "reverse": lambda pair, secs: {"reverse Gb/s": received(pair.iperf(secs, "-R"))},
    "bidir": test_bidir,
    "udp64": lambda pair, secs: {"udp64 kpps": test_udp(pair, secs, 64)},
    "udp512": lambda pair, secs: {"udp512 kpps": test_udp(pair, secs, 512)},
    "udp1200": lambda pair, secs: {"udp1200 kpps": test_udp(pair, secs, 1200)},
    "flood64": lambda pair, secs: {"64 B, unbounded sender, kpps": test_flood(pair, secs, 64, 1)},
    "packet64": lambda pair, secs: test_packet(pair, secs, 64),
    "train64": lambda pair, secs: {"64 B, sender with trains, kpps": test_flood(pair, secs, 64, 32)},
    "flood1200": lambda pair, secs: {"1200 B, unbounded sender, kpps": test_flood(pair, secs, 1200, 1)},
    "ping": lambda pair, secs: test_ping(pair),
    "one": lambda pair, secs: test_one(pair),
    "half": lambda pair, secs: test_half(pair),
    # iperf3 sends what is due once a millisecond; here ten times as often.
    "smooth": lambda pair, secs: test_half(pair, "ping at half load, smooth", "--pacing-timer", "100"),
}


def check(pair, megabytes):
    """Bytes in are bytes out: TCP both ways and both families, UDP of odd sizes."""
    addresses = {"v4": (socket.AF_INET, pair.v4)}
    if pair.v6:
        addresses["v6"] = (socket.AF_INET6, pair.v6)
    block = random.randbytes(1 << 20)
    for family, (kind, address) in addresses.items():
        for direction in ("up", "down"):
            listener = pair.b.inside(lambda: socket.create_server((address, 0), family=kind))()
            port = listener.getsockname()[1]

            def give(stream):
                sent = hashlib.sha256()
                for number in range(megabytes):
                    # Odd cuts, so that segments of all sizes are made.
                    piece = number.to_bytes(4, "big") + block[number % 977:]
                    sent.update(piece)
                    stream.sendall(piece)
                stream.shutdown(socket.SHUT_WR)
                return sent.hexdigest()

            def take(stream):
                got, buffer = hashlib.sha256(), bytearray(1 << 20)
                while count := stream.recv_into(buffer):
                    got.update(memoryview(buffer)[:count])
                return got.hexdigest()

            roles = (take, give) if direction == "up" else (give, take)
            far = pair.b.inside(lambda: roles[0](listener.accept()[0]))
            near = pair.a.inside(lambda: roles[1](socket.create_connection((address, port))))
            started = time.time()
            if near(300) != far(300):
                raise RuntimeError(f"{pair.name}: TCP {family} {direction}: the sums differ")
            print(f"{pair.name}: TCP {family} {direction}: {megabytes} MB equal, {time.time() - started:.1f} s")
        far = pair.b.inside(lambda: socket.socket(kind, socket.SOCK_DGRAM))()
        near = pair.a.inside(lambda: socket.socket(kind, socket.SOCK_DGRAM))()
        far.bind((address, 0))
        for end in (far, near):
            end.settimeout(3)
        near.connect(far.getsockname()[:2])
        for size in [*range(0, 2600, 7), 8000, 65_000]:
            sent = block[size:size * 2]
            near.send(sent)
            got, back = far.recvfrom(70_000)
            far.sendto(got, back)
            if near.recv(70_000) != sent:
                raise RuntimeError(f"{pair.name}: UDP {family} of {size} bytes differs")
        print(f"{pair.name}: UDP {family}: all sizes equal")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--secs", type=int, default=3)
    parser.add_argument("--mtu", type=int, default=1280)
    parser.add_argument("--relay", action="store_true")
    parser.add_argument("--relayed", action="append", default=[])
    parser.add_argument("--no-udp", action="store_true")
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--ethtool", default="")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--only", default=",".join(TESTS))
    parser.add_argument("--rival", action="append", default=[])
    parser.add_argument("contenders", nargs="*")
    args = parser.parse_args()
    contenders = [(*contender.partition("=")[::2], False, args.relay) for contender in args.contenders]
    contenders += [(*contender.partition("=")[::2], False, True) for contender in args.relayed]
    for kind, _, binary in (rival.partition("=") for rival in args.rival):
        try:
            contenders.append((kind, rivals.find(kind, binary), True, False))
        except rivals.Missing as missing:
            parser.error(str(missing))
    if not contenders:
        parser.error("nothing to measure: give NAME=BINARY or --rival KIND=BINARY")
    pairs, results = [], {}
    # Whoever ends this early, by timeout(1) say, leaves nothing running either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended early"))
    try:
        for number, (name, binary, rival, relayed) in enumerate(contenders):
            pairs.append(Pair(name, binary, number, args, rival, relayed))
            if binary and not rival:
                print(f"{name}: offloads {pairs[-1].status()['self'].get('offloads')}", flush=True)
        if args.check:
            for pair in pairs:
                check(pair, args.check)
        tests = [test for test in args.only.split(",") if test in TESTS]
        for _ in range(args.rounds):
            for test in tests:
                for pair in random.sample(pairs, len(pairs)):
                    try:
                        measured = TESTS[test](pair, args.secs)
                    except (KeyError, ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
                        print(f"{pair.name} {test}: {error!r}"[:200])
                        continue
                    for what, value in measured.items():
                        results.setdefault(what, {}).setdefault(pair.name, []).append(value)
        if args.rounds < 5:
            print("\nless than five rounds: no figures to publish")
        names = [pair.name for pair in pairs]
        print("\n| | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|")
        for what, by_name in results.items():
            def cell(values):
                if not values:
                    return "-"
                return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"
            print(f"| {what} | " + " | ".join(cell(by_name.get(name)) for name in names) + " |")
        for pair in pairs:
            if pair.binary and not pair.rival:
                drops = {k: v for h in "ab" for k, v in pair.status(h)["self"]["drops"].items() if v}
                print(f"{pair.name}: drops {drops}, offloads {pair.status()['self'].get('offloads')}")
    finally:
        for pair in pairs:
            pair.close()


if __name__ == "__main__":
    main()
