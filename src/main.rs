//! The `overlay` binary.

fn main() {}
