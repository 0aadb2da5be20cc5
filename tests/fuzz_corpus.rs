//! Plays the committed corpora of the parsers' fuzz targets, whole and cut short.

#[path = "fuzz/parsers.rs"]
mod parsers;

use std::fs;
use std::path::Path;

#[test]
fn no_committed_input_makes_a_parser_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    for (name, parser) in parsers::ALL {
        let files = fs::read_dir(corpus.join(name)).expect("every parser has a corpus");
        let mut inputs: Vec<Vec<u8>> = files
            .map(|entry| fs::read(entry.expect("it can be read").path()).expect("so can its files"))
            .collect();
        assert!(!inputs.is_empty(), "{name}: every parser has a corpus");
        inputs.sort();
        for input in inputs {
            for end in 0..=input.len() {
                parser(&input[..end]);
            }
            // One bit off in each byte: what lies beside a good input.
            for at in 0..input.len() {
                let mut beside = input.clone();
                beside[at] ^= 1 << (at % 8);
                parser(&beside);
            }
        }
    }
}
