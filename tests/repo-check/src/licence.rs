//! Every crate that the product or its tests are made of has a permissive licence.

use crate::metadata::{self, text};

const ALLOWED: [&str; 11] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

#[test]
fn all_dependencies_are_permissive() {
    let refused: Vec<String> = metadata::packages(true)
        .iter()
        .filter(|package| !permitted(&text(package, "license")))
        .map(|package| format!("{}: {:?}", text(package, "name"), text(package, "license")))
        .collect();
    assert!(refused.is_empty(), "crates whose licence is not on the list: {refused:#?}");
}

/// True if an SPDX expression (or the older form with slashes) can be met with the allowed licences.
fn permitted(expression: &str) -> bool {
    let expression = expression.trim();
    if let Some((left, right)) = split(expression, &[" OR ", "/"]) {
        return permitted(left) || permitted(right);
    }
    if let Some((left, right)) = split(expression, &[" AND "]) {
        return permitted(left) && permitted(right);
    }
    match expression.strip_prefix('(').and_then(|rest| rest.strip_suffix(')')) {
        Some(inner) => permitted(inner),
        None => ALLOWED.contains(&expression),
    }
}

/// Splits at the first of the operators that stands outside parentheses.
fn split<'a>(expression: &'a str, operators: &[&str]) -> Option<(&'a str, &'a str)> {
    let mut depth = 0;
    for (at, character) in expression.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth > 0 => {}
            _ => {
                let (left, rest) = expression.split_at(at);
                let found = operators.iter().find_map(|operator| rest.strip_prefix(operator));
                if let Some(right) = found {
                    return Some((left, right));
                }
            }
        }
    }
    None
}

#[test]
fn expressions_are_understood() {
    for good in ["MIT", "MIT/GPL-2.0", "GPL-2.0 OR (ISC AND MIT)", "(MIT OR GPL-2.0) AND Unicode-3.0"] {
        assert!(permitted(good), "{good}");
    }
    for bad in ["", "GPL-2.0", "MIT AND GPL-2.0", "(MIT AND GPL-2.0) OR MPL-2.0"] {
        assert!(!permitted(bad), "{bad}");
    }
}
