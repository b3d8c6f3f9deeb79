//! Command line: parse, call, map errors to exit codes.

fn main() {}
