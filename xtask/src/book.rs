//! `cargo xtask book`: the documentation as a book, with mdbook, which has to be installed.

use std::{ffi::OsStr, fs, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::process::{find, run};

/// The pages outside docs/, and their names in the book.
const ROOT_PAGES: [(&str, &str); 5] = [
    ("README.md", "index.md"),
    ("ARCHITECTURE.md", "ARCHITECTURE.md"),
    ("SECURITY.md", "SECURITY.md"),
    ("CONTRIBUTING.md", "CONTRIBUTING.md"),
    ("CHANGELOG.md", "CHANGELOG.md"),
];
/// The files, and directories of files, to which pages link.
const LINKED: [&str; 6] = [
    "LICENSE",
    "LICENSES",
    "deploy/monitoring",
    "deploy/helm/redirect-agent",
    "deploy/helm/redirect-agent/files",
    "deploy/helm/redirect-agent/templates",
];
/// What book.toml reads. mdbook needs all pages in one directory that has nothing else in it.
const SOURCE: &str = "target/book-src";

/// Builds the book into target/book.
pub(crate) fn build() -> Result<()> {
    if find("mdbook").is_none() {
        bail!("find mdbook: install it with `cargo install mdbook --locked`");
    }
    let source = Path::new(SOURCE);
    if source.exists() {
        fs::remove_dir_all(source).with_context(|| format!("remove {SOURCE}"))?;
    }
    for (page, name) in ROOT_PAGES {
        copy(Path::new(page), &source.join(name))?;
    }
    copy_files(Path::new("docs"), source)?;
    for linked in LINKED {
        let (from, to) = (Path::new(linked), source.join(linked));
        if from.is_dir() { copy_files(from, &to)? } else { copy(from, &to)? }
    }
    run(Command::new("mdbook").arg("build")).context("build the book")
}

/// Copies the files of a directory, without those below it.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("list {}", from.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("list {}", from.display()))?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            // mdbook would rename it, and not the links to it.
            let name = if name == "README.md" { OsStr::new("index.md") } else { name };
            copy(&path, &to.join(name))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let content = fs::read_to_string(from).with_context(|| format!("read {}", from.display()))?;
    let is_page = from.extension().is_some_and(|extension| extension == "md");
    let content = if is_page { in_one_directory(&content) } else { content };
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    fs::write(to, content).with_context(|| format!("write {}", to.display()))
}

/// The links of a page, once the pages of docs/ and those of the root are in one directory.
fn in_one_directory(page: &str) -> String {
    // The chart's README is the only page that is in neither.
    let chart = page.contains("](../../../docs/");
    let page = page.replace("](docs/", "](").replace("](../../../docs/", "](../../../");
    let page = if chart { page } else { page.replace("](../", "](") };
    page.replace("README.md)", "index.md)").replace("README.md#", "index.md#")
}

#[cfg(test)]
mod tests {
    use super::in_one_directory;

    #[test]
    fn links_lead_where_the_pages_are() {
        for (link, wanted) in [
            ("[a](docs/install.md#upgrade)", "[a](install.md#upgrade)"),
            ("![a](docs/hbone.svg)", "![a](hbone.svg)"),
            ("[a](../SECURITY.md)", "[a](SECURITY.md)"),
            ("[a](../deploy/monitoring/alerts.yaml)", "[a](deploy/monitoring/alerts.yaml)"),
            ("[a](dns.md)", "[a](dns.md)"),
            ("[a](README.md#license)", "[a](index.md#license)"),
            ("[a](https://example.com/docs/)", "[a](https://example.com/docs/)"),
            ("[a](../../../docs/install.md)", "[a](../../../install.md)"),
        ] {
            assert_eq!(in_one_directory(link), wanted);
        }
    }
}
