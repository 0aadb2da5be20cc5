//! `cargo run --release --bin parser -- corpus/NAME`: one parser, named by its corpus.
//!
//! `OVERLAY_PARSER=NAME` names it apart from the corpus.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

#[path = "../parsers.rs"]
mod parsers;

fn parser() -> parsers::Parser {
    static PARSER: OnceLock<parsers::Parser> = OnceLock::new();
    *PARSER.get_or_init(|| {
        let named = std::env::var("OVERLAY_PARSER").ok();
        let words: Vec<String> = named.into_iter().chain(std::env::args()).collect();
        let is_named = |name: &str| {
            words.iter().any(|word| word == name || word.ends_with(&format!("corpus/{name}")))
        };
        let found = parsers::ALL.iter().find(|(name, _)| is_named(name));
        found.expect("the corpus or OVERLAY_PARSER names a parser").1
    })
}

fuzz_target!(|bytes: &[u8]| parser()(bytes));
