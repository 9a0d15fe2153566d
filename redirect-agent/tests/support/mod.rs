//! What several of these tests need.

use std::{fs, path::Path};

/// Checks that a text is the one in `tests/golden`, or, with `UPDATE_GOLDEN`, makes it so.
pub fn golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, actual).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    assert_eq!(actual, expected, "{} (UPDATE_GOLDEN=1 writes it)", path.display());
}
