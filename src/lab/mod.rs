//! A small internet in one process.
