#!/usr/bin/env python3
"""Times of every cell of the NAT matrix, over many runs.

    cargo build --release && cargo test --test e2e --no-run
    tests/bench/matrix.py --runs 20

Runs the end-to-end program's `matrix::` cases again and again, each with a new lab, and prints the
median and the 95th percentile, in milliseconds from the start of the second node's process: to the
first answer, and to both sides having their final kind of path. Needs what those tests need. Ends
before --limit seconds have passed, and says how many runs of each cell there were.
"""
import argparse, json, os, re, statistics, subprocess, sys, time

LINE = re.compile(r"^(.+): first answer after ([\d.]+)(µs|ms|s), (\S+) both ways after ([\d.]+)(µs|ms|s)$")
UNIT = {"µs": 0.001, "ms": 1.0, "s": 1000.0}
# Their times are not those of a pair that meets.
SKIP = ["one_port_for_both"]


def e2e_program():
    built = subprocess.run(
        ["cargo", "test", "--test", "e2e", "--no-run", "--message-format=json"],
        capture_output=True, text=True, check=True).stdout
    found = [json.loads(line).get("executable") for line in built.splitlines() if line.startswith("{")]
    return [path for path in found if path and "/e2e-" in path][-1]


def percentile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="cells at a time")
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--binary", default="target/release/overlay")
    parser.add_argument("--program", help="the end-to-end program, if it is built already")
    parser.add_argument("--filter", default="matrix::")
    args = parser.parse_args()
    program = args.program or e2e_program()
    environment = dict(os.environ, OVERLAY_E2E_TIMES_ONLY="1",
                       OVERLAY_TEST_BINARY=os.path.abspath(args.binary))
    command = [program, args.filter, "--test-threads", str(args.threads)]
    for name in SKIP:
        command += ["--skip", name]

    cells, failures, start, longest = {}, [], time.monotonic(), 0.0
    for run in range(args.runs):
        begun = time.monotonic()
        if begun - start + longest > args.limit:
            print(f"stopped after {run} runs: the time is up", file=sys.stderr)
            break
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        longest = max(longest, time.monotonic() - begun)
        for line in (done.stdout + done.stderr).splitlines():
            if match := LINE.match(line.strip()):
                name, first, unit, kind, both, other = match.groups()
                cells.setdefault((name, kind), []).append(
                    (float(first) * UNIT[unit], float(both) * UNIT[other]))
            elif line.startswith("test ") and line.rstrip().endswith("FAILED"):
                failures.append(line.strip())
        print(f"run {run + 1}: {longest:.0f} s at most", file=sys.stderr)

    print("| cell | path | runs | first answer, median | p95 | path, median | p95 |")
    print("|---|---|---|---|---|---|---|")
    for (name, kind), times in cells.items():
        firsts, boths = zip(*times)
        figures = [statistics.median(firsts), percentile(firsts, 0.95),
                   statistics.median(boths), percentile(boths, 0.95)]
        print(f"| {name} | {kind} | {len(times)} | " + " | ".join(f"{it:.0f}" for it in figures) + " |")
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures or not cells else 0


if __name__ == "__main__":
    sys.exit(main())
