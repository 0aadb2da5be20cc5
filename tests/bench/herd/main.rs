//! A herd of nodes against one server: `cargo bench --bench herd -- RUN [--nodes N] [--json]`.
//!
//! Thousands of nodes in one process speak the real protocol over real sockets on loopback with the
//! real `overlay server`. `join` measures how fast nodes join and what each costs, `storm` how fast
//! all come back after the server restarted, `churn` what nodes cost that come and go, `fanout` how
//! long another endpoint takes to those who need it, `revoke` how long a removal takes until every
//! node has put it into effect. docs/measurements.md has the figures.

#![expect(clippy::print_stdout, reason = "a program for people")]

mod crowd;
mod figures;
mod member;
mod runs;
mod server;

use std::fmt::Debug;
use std::net::Ipv4Addr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

use runs::Size;
use server::Wish;

/// Load on one server.
#[derive(Debug, Parser)]
struct Args {
    /// What is measured
    run: Run,
    /// How many nodes
    #[arg(long, default_value_t = 1_000)]
    nodes: usize,
    /// How many others each node uses
    #[arg(long, default_value_t = 10)]
    peers: usize,
    /// Nodes are told of everybody in a network of up to so many
    #[arg(long, default_value_t = 256)]
    whole_netmap_up_to: usize,
    /// Endpoints announced (fanout) or nodes removed (revoke)
    #[arg(long, default_value_t = 50)]
    rounds: usize,
    /// Seconds of churn
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Nodes that go and come, each second
    #[arg(long, default_value_t = 10)]
    flaps: u32,
    /// Addresses that the nodes share; else 16 nodes have one
    #[arg(long)]
    sources: Option<usize>,
    /// Address of the server. The nodes have others of 127.0.0.0/8 if it is one of these, else some
    /// of 198.19.0.0/16, which have to be this machine's own
    #[arg(long, default_value = "127.0.0.1")]
    at: Ipv4Addr,
    /// Leave it to the kernel who runs where; else the server has a core of its own
    #[arg(long)]
    any_core: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Said by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Run {
    Join,
    Storm,
    Churn,
    Fanout,
    Revoke,
}

/// Ends the run, and the server with it: without `wanted` nothing can be measured.
fn die(wanted: &str, why: &dyn Debug) -> ! {
    panic!("no {wanted}: {why:?}")
}

fn main() {
    let args = Args::parse();
    allow_many_sockets();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let own_core = cores > 1 && !args.any_core;
    if own_core {
        leave_core_zero(cores);
    }
    let size = Size {
        nodes: args.nodes,
        peers: args.peers,
        sources: args.sources,
        wish: Wish {
            whole_netmap_up_to: args.whole_netmap_up_to,
            core: own_core.then_some(0),
            at: args.at,
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(if own_core { cores - 1 } else { cores })
        .enable_all()
        .build()
        .unwrap_or_else(|error| die("threads", &error));
    let figures = runtime.block_on(async {
        match args.run {
            Run::Join => runs::join(size).await,
            Run::Storm => runs::storm(size).await,
            Run::Churn => runs::churn(size, args.flaps, Duration::from_secs(args.seconds)).await,
            Run::Fanout => runs::fanout(size, args.rounds).await,
            Run::Revoke => runs::revoke(size, args.rounds).await,
        }
    });
    if args.json {
        println!("{}", figures.json());
    } else {
        print!("{}", figures.table());
    }
    // The members need not say goodbye.
    std::process::exit(0);
}

/// Every member has two sockets.
fn allow_many_sockets() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        // Only root may go beyond the hard limit; with what there is, fewer nodes fit.
        let wanted = hard.max(65_536);
        setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted)
            .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
    });
    if let Err(error) = raised {
        die("open files", &error);
    }
}

/// Stays off the core that the server gets.
fn leave_core_zero(cores: usize) {
    let mut set = CpuSet::new();
    for core in 1..cores {
        set.set(core).unwrap_or_else(|error| die("a core", &error));
    }
    sched_setaffinity(Pid::from_raw(0), &set).unwrap_or_else(|error| die("a core", &error));
}
