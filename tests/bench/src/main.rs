//! Prints the product's figures beside their references
fn main() {}
