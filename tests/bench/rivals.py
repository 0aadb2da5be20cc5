"""Other programs that join two machines, brought up on the same two namespaces for comparison."""
import os, shutil, time

# Overlay addresses of the two ends.
NEAR, FAR = "10.201.0.1", "10.201.0.2"

INSTALL = {
    "gotatun": "cargo install gotatun-cli",
    "boringtun": "cargo install boringtun-cli",
    # Debian's of 2022 has no offloads.
    "wireguard-go": "go install golang.zx2c4.com/wireguard@latest",
    "nebula": "apt-get install nebula",
}


class Missing(Exception):
    """A program that is needed is not there; says how to get it."""


def find(kind, binary):
    """The full path of a rival's program."""
    if kind not in INSTALL:
        raise Missing(f"unknown rival {kind!r}: one of {', '.join(INSTALL)}")
    path = shutil.which(binary)
    if not path:
        raise Missing(f"{kind}: no program {binary!r}; install it with: {INSTALL[kind]}")
    needed = {"nebula": ("nebula-cert", "nebula")}.get(kind, ("wg", "wireguard-tools"))
    if not shutil.which(needed[0]):
        raise Missing(f"{kind}: needs {needed[0]}; install it with: apt-get install {needed[1]}")
    return path


def start(kind, pair, binary, underlay, mtu, wait_for):
    """Starts both ends in `pair.a` and `pair.b`; `underlay` are their addresses on the link."""
    bring_up = nebula if kind == "nebula" else wireguard
    bring_up(kind, pair, binary, underlay, mtu, wait_for)
    pair.v4, pair.back = FAR, NEAR
    answers = ("ping", "-c1", "-W1", FAR)
    wait_for(lambda: "1 received" in pair.a.run(*answers, check=False), f"a path through {kind}")


def wireguard(kind, pair, binary, underlay, mtu, wait_for):
    """Whatever speaks the configuration protocol of WireGuard's user space programs."""
    flags = [] if kind == "wireguard-go" else ["--disable-drop-privileges"]
    ends = [(pair.a, underlay[0], NEAR), (pair.b, underlay[1], FAR)]
    devices, public = [], []
    for number, (space, _, _) in enumerate(ends):
        device = f"bw{os.getpid() % 10000}{kind[0]}{number}"
        key = f"{pair.dir}/{device}.key"
        with open(key, "w") as file:
            file.write(space.run("wg", "genkey"))
        public.append(space.run("sh", "-c", f"wg pubkey < {key}").strip())
        devices.append((device, key))
        space.start(f"{pair.dir}/{device}.log", binary, "-f", *flags, device)
    for number, (space, _, address) in enumerate(ends):
        device, key = devices[number]
        wait_for(lambda: os.path.exists(f"/var/run/wireguard/{device}.sock"), kind)
        time.sleep(0.2)
        other = 1 - number
        space.run("wg", "set", device, "listen-port", "51820", "private-key", key, "peer", public[other],
                  "allowed-ips", f"{ends[other][2]}/32", "endpoint", f"{ends[other][1]}:51820")
        space.run("ip", "addr", "add", f"{address}/24", "dev", device)
        space.run("ip", "link", "set", device, "mtu", str(mtu), "up")


def nebula(_, pair, binary, underlay, mtu, __):
    """With its default cipher, AES-256-GCM."""
    pair.a.run("sh", "-c", f"cd {pair.dir} && nebula-cert ca -name bench && "
               f"nebula-cert sign -name a -ip {NEAR}/24 && nebula-cert sign -name b -ip {FAR}/24")
    ends = [(pair.a, "a", underlay[0], NEAR), (pair.b, "b", underlay[1], FAR)]
    for (space, name, _, _), (_, _, outer, inner) in zip(ends, reversed(ends)):
        rule = "[{port: any, proto: any, host: any}]"
        with open(f"{pair.dir}/{name}.yml", "w") as config:
            config.write("\n".join([
                f"pki: {{ca: {pair.dir}/ca.crt, cert: {pair.dir}/{name}.crt, key: {pair.dir}/{name}.key}}",
                f'static_host_map: {{"{inner}": ["{outer}:4242"]}}',
                "listen: {host: 0.0.0.0, port: 4242}",
                f"tun: {{dev: neb{name}, mtu: {mtu}}}",
                f"firewall: {{outbound: {rule}, inbound: {rule}}}", ""]))
        space.start(f"{pair.dir}/{name}.log", binary, "-config", f"{pair.dir}/{name}.yml")
