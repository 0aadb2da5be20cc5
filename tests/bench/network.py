"""Network namespaces, cables between them, and a server with its nodes, for the benchmarks."""
import atexit, base64, copy, ctypes, functools, ipaddress, json, os, random, shutil, signal
import subprocess, tempfile, threading, time

LIBC = ctypes.CDLL(None, use_errno=True)


def sh(*cmd, check=True, timeout=30):
    done = subprocess.run(cmd, text=True, capture_output=True, timeout=timeout)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(cmd)}: {done.stdout}{done.stderr}")
    return done.stdout


def wait_for(test, what, secs=20):
    end = time.time() + secs
    while not test():
        if time.time() > end:
            raise RuntimeError(f"{what} did not come up")
        time.sleep(0.1)


class Space:
    """A network namespace and what runs in it."""

    def __init__(self, name):
        self.name = name
        self.children = []
        sh("ip", "netns", "add", name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *cmd, **options):
        return sh("ip", "netns", "exec", self.name, *cmd, **options)

    def start(self, log, *cmd):
        with open(log, "w") as out:
            self.children.append(subprocess.Popen(
                ["ip", "netns", "exec", self.name, *cmd], stdout=out, stderr=out,
                start_new_session=True))
        return self.children[-1]

    def stop(self, child):
        child.send_signal(signal.SIGTERM)
        child.wait(10)
        self.children.remove(child)

    def inside(self, work):
        """Runs a function on a thread in the namespace; gives its result."""
        result = []

        def body():
            with open(f"/var/run/netns/{self.name}") as space:
                if LIBC.setns(space.fileno(), 0x40000000):
                    result.append(OSError("setns"))
                    return
            try:
                result.append(work())
            except Exception as error:
                result.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()

        def wait(timeout=120):
            thread.join(timeout)
            if not result:
                raise RuntimeError("no end in time")
            if isinstance(result[0], Exception):
                raise result[0]
            return result[0]

        return wait

    def close(self):
        for child in self.children:
            child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(3)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        sh("ip", "netns", "del", self.name, check=False)


def connect(one, other, net, settings=""):
    """A veth pair with addresses 10.200.net.1 and .2; `settings` are those of ethtool -K."""
    ends = [f"bench{net}a", f"bench{net}b"]
    sh("ip", "link", "add", ends[0], "netns", one.name, "type", "veth",
       "peer", "name", ends[1], "netns", other.name)
    for space, device, host in ((one, ends[0], 1), (other, ends[1], 2)):
        space.run("ip", "addr", "add", f"10.200.{net}.{host}/24", "dev", device)
        space.run("ip", "link", "set", device, "up")
        if settings:
            space.run("ethtool", "-K", device, *settings.split())


class Network:
    """A server and the nodes that are enrolled with it, their state in one directory."""

    def __init__(self, binary, directory=None):
        self.binary, self.own = binary, directory is None
        self.directory = directory or tempfile.mkdtemp(prefix="bench-")
        self.control = f"{self.directory}/server.sock"
        self.spaces = {}

    def serve(self, space, hosts, *flags, listen=None):
        """Starts the server; `hosts` are the addresses that nodes reach it by."""
        self.server = space
        public = [part for host in dict.fromkeys(hosts) for part in ("--public-addr", f"{host}:41820")]
        child = space.start(f"{self.directory}/server.log", self.binary, "server", "--listen",
                            f"{listen or hosts[0]}:41820", *public, "--state-dir", f"{self.directory}/server",
                            "--socket", self.control, *flags)
        wait_for(lambda: os.path.exists(self.control), "the server")
        return child

    def invite(self, uses=1):
        out = self.server.run(self.binary, "server", "invite", "--uses", str(uses), "--json", "--socket", self.control)
        return json.loads(out)["join"]

    def join(self, space, name, *flags, line=None):
        """Starts a node that enrols itself, with an invite of its own unless `line` is one."""
        path = f"{self.directory}/{name}.join"
        with open(path, "w") as file:
            file.write(line or self.invite())
        return self.start(space, name, f"file:{path}", *flags)

    def start(self, space, name, *flags):
        """Starts a node, which has been enrolled before unless a join line is among `flags`."""
        self.spaces[name] = space
        return space.start(f"{self.directory}/{name}.log", self.binary, "up", *flags, "--name", name, "--state-dir",
                           f"{self.directory}/{name}", "--socket", f"{self.directory}/{name}.sock", "--interface",
                           f"ov{name}")

    def status(self, name):
        out = self.spaces[name].run(self.binary, "status", "--json", "--socket", f"{self.directory}/{name}.sock")
        return json.loads(out)

    def peers(self, name):
        """None of them as long as the node does not answer."""
        try:
            return self.status(name)["peers"]
        except (RuntimeError, ValueError):
            return []

    def netmap(self, name):
        return f"{self.directory}/{name}/netmap.json"

    def fill(self, name, seed, count, keep=False):
        """Writes the saved netmap of a node anew: `count` peers like the one in `seed`, which is the
        first of them with `keep`."""
        netmap = json.loads(seed)
        (number, like), = list(netmap["peers"].items())[:1]
        v4, v6 = (ipaddress.ip_address(like["addrs"][family]) for family in ("v4", "v6"))
        netmap["peers"] = {number: like} if keep else {}
        for step in range(len(netmap["peers"]), count):
            peer = copy.deepcopy(like)
            peer["name"] = f"idle-{step}"
            peer["node_key"] = base64.b64encode(random.randbytes(32)).decode()
            peer["addrs"] = {"v4": str(v4 + step), "v6": str(v6 + step)}
            peer.pop("last_direct", None)
            netmap["peers"][f"{int(number, 16) + step:08x}"] = peer
        with open(self.netmap(name), "w") as file:
            json.dump(netmap, file)

    def close(self):
        if self.own:
            shutil.rmtree(self.directory, ignore_errors=True)


def cost(pid):
    """Resident bytes and processor seconds; `ip netns exec` has become the program itself."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    ticks = int(fields[11]) + int(fields[12])
    return int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), ticks / os.sysconf("SC_CLK_TCK")


def busy():
    """Seconds of work of all processors; what the host took away counts as well."""
    fields = [int(field) for field in open("/proc/stat").readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


@functools.cache
def load_tool():
    """The program that load.c is, compiled for this run."""
    directory = tempfile.mkdtemp(prefix="load-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "load.c")
    sh("cc", "-O2", "-pthread", "-o", f"{directory}/load", source)
    return f"{directory}/load"
