//! `redirect-agent`.

fn main() {}
