#!/usr/bin/env python3
"""Where the processors' time goes while two nodes on one machine carry a load.

usage: profile.py [--load TEST] [--secs N] [--mtu N] [--config LINE] [--stacks N | --waits [--rival R]] BINARY

Brings up what run.py does, records all processors with `perf record -a -g` while TEST of run.py runs
(tcp1, bidir, half, flood64, train64, ...), and prints the shares of the nodes' packet threads by what
they did, and of the whole machine by program. Each sample counts once, for the first row that fits; what
the kernel does with interrupts off counts where it lets them in again.

  --waits     instead, how long threads wait for a processor once somebody wakes them, by name, and how long
              where that was on another processor, which mostly slept
  --rival R   BINARY is that rival's (see run.py); with --waits
  --stacks N  the N most frequent functions on top of a stack, too, with the row that they counted for

Needs root, perf, and what run.py needs.
"""
import argparse, collections, subprocess, tempfile, threading

import network, run

# What a packet thread does, by the names of functions on its stack. The first that fits counts.
ROWS = [
    ("sealing and opening (AEAD)", ("chacha20_poly1305", "poly1305", "ChaCha20", "chacha20")),
    ("interrupts of the machine", ("asm_sysvec_", "asm_common_interrupt", "asm_exc_")),
    ("writing to the TUN interface, with the receiver's TCP or UDP", ("tun_chr_write_iter", "tun_get_user")),
    ("reading from the TUN interface", ("tun_chr_read_iter", "tun_do_read")),
    ("sending by UDP, with the delivery to the other end", ("udp_sendmsg", "udpv6_sendmsg", "__sys_sendmsg", "__sys_sendmmsg")),
    ("receiving by UDP", ("udp_recvmsg", "udpv6_recvmsg", "__sys_recvmmsg", "__sys_recvmsg")),
    ("waiting for packets", ("do_epoll_wait", "ep_poll", "do_sys_poll")),
    ("waiting for locks", ("futex",)),
    ("scheduler", ("schedule", "__schedule")),
    ("rest of the kernel", ("entry_SYSCALL_64", "do_syscall_64", "ret_from_fork")),
]
OWN = "the program itself"
THREADS = ("tun-to-udp", "udp-to-tun")


def row_of(stack):
    """Only the top counts for AEAD: a lock inside of it would be something else."""
    name, words = ROWS[0]
    if any(word in stack[0] for word in words):
        return name
    for name, words in ROWS[1:]:
        if any(word in frame for frame in stack for word in words):
            return name
    return OWN


def samples(text):
    """Thread name and stack, the top first, of each sample of `perf script`."""
    comm, stack = None, []
    for line in text:
        if not line.strip():
            if comm and stack:
                yield comm, stack
            comm, stack = None, []
        elif comm is None:
            comm = line.strip()
        else:
            stack.append(line.strip().split(None, 1)[-1])
    if comm and stack:
        yield comm, stack


def share(counts, total, title):
    print(f"\n| {title} | % |\n|---|---|")
    for name, count in counts.most_common():
        if count * 200 >= total:
            print(f"| {name} | {100 * count / total:.1f} |")


def waits(text):
    """By thread name, the microseconds from somebody's call to running, and whether another processor called."""
    called, took = {}, collections.defaultdict(list)
    for line in text:
        cpu, at, event, *rest = line.split()
        at = float(at.rstrip(":")) * 1e6
        named = dict(field.partition("=")[::2] for field in rest if "=" in field)
        if "sched_waking:" in event:
            called.setdefault(named["pid"], (at, cpu))
        elif "next_pid" in named:
            # Who is called while it runs has nothing to wait for.
            called.pop(named["prev_pid"], None)
            since, caller = called.pop(named["next_pid"], (None, None))
            if since is None:
                continue
            took[named["next_comm"].rstrip("0123456789/-:")].append((at - since, caller != cpu))
    return took


def print_waits(script):
    print("\n| thread | woken, times | wait p50 us | p99 us | longest us | from another processor % | wait then, p50 us |")
    print("|---|---|---|---|---|---|---|")
    for name, took in sorted(waits(script).items(), key=lambda item: -len(item[1]))[:8]:
        took.sort()
        far = [wait for wait, is_far in took if is_far]
        wait = [f"{took[at][0]:.0f}" for at in (len(took) // 2, len(took) * 99 // 100, -1)]
        print(f"| {name} | {len(took)} | {' | '.join(wait)} | {100 * len(far) // len(took)} | {far[len(far) // 2] if far else 0:.0f} |")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--load", default="tcp1", choices=run.TESTS)
    parser.add_argument("--secs", type=int, default=5)
    parser.add_argument("--mtu", type=int, default=1420)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--rival")
    parser.add_argument("--stacks", type=int, default=0)
    parser.add_argument("binary")
    args = parser.parse_args()
    if args.rival and not args.waits:
        parser.error("--rival is for --waits: the rows are this program's functions")
    args.no_udp, args.ethtool = False, ""
    pair = run.Pair(args.rival or "overlay", args.binary, 0, args, rival=bool(args.rival))
    data = tempfile.NamedTemporaryFile(prefix="perf-", suffix=".data")
    try:
        if args.load == "half":
            print(run.test_tcp1(pair, 1))
        what = ("-e", "sched:sched_waking,sched:sched_switch") if args.waits else ("-g", "-F", "1999")
        # A ping run of run.py is over after two seconds.
        secs = 1 if args.load in ("half", "ping") else max(args.secs - 1, 1)
        recorder = threading.Timer(0.5, lambda: network.sh(
            "perf", "record", "-q", "-a", *what, "-o", data.name, "--", "sleep", str(secs), timeout=secs + 30))
        recorder.start()
        print(run.TESTS[args.load](pair, args.secs))
        recorder.join()
        if not args.waits:
            drops = {h: {k: v for k, v in pair.status(h)["self"]["drops"].items() if v} for h in "ab"}
            print(f"drops {drops}")
    finally:
        pair.close()
    fields = "cpu,time,event,trace" if args.waits else "comm,ip,sym"
    script = subprocess.Popen(
        ["perf", "script", "-i", data.name, "-F", fields, "--max-stack", "40"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if args.waits:
        return print_waits(script.stdout)
    threads, programs, tops = collections.Counter(), collections.Counter(), collections.Counter()
    for comm, stack in samples(script.stdout):
        programs[comm] += 1
        if comm in THREADS:
            row = row_of(stack)
            threads[row] += 1
            tops[f"{comm}: {stack[0]} ({row})"] += 1
    share(threads, sum(threads.values()), "packet threads of both nodes")
    share(programs, sum(programs.values()), "the whole machine, by thread")
    for name, count in tops.most_common(args.stacks):
        print(f"{100 * count / sum(threads.values()):5.1f} % {name}")


if __name__ == "__main__":
    main()
