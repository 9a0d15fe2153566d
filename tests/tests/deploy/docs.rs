//! The documentation: that its links lead somewhere, and that it says what it has to.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};
use redirect_tests::manifests::{Objects, dir};

use crate::monitoring::rules;

/// The repository's root.
fn root() -> Result<PathBuf> {
    dir().join("..").canonicalize().context("find the repository")
}

/// Every page of the documentation.
fn pages() -> Result<Vec<PathBuf>> {
    let root = root()?;
    let mut pages: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
            .map(|name| root.join(name))
            .into();
    pages.push(dir().join("helm/redirect-agent/README.md"));
    for entry in fs::read_dir(root.join("docs"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    Ok(pages)
}

/// What a page links to, and the anchors of its headings, as GitHub makes them.
fn links_and_anchors(text: &str) -> (Vec<String>, BTreeSet<String>) {
    let (mut links, mut anchors, mut heading) = (Vec::new(), BTreeSet::new(), None);
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                links.push(dest_url.into_string());
            }
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => {
                let title = heading.take().unwrap_or_default().to_lowercase();
                let kept = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                anchors.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
            }
            Event::Text(text) | Event::Code(text) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&text);
                }
            }
            _ => {}
        }
    }
    (links, anchors)
}

#[test]
fn every_link_leads_somewhere() -> Result<()> {
    let mut wrong = Vec::new();
    for page in pages()? {
        let text = fs::read_to_string(&page).with_context(|| format!("read {}", page.display()))?;
        let dir = page.parent().unwrap_or(Path::new("/"));
        for link in links_and_anchors(&text).0 {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { page.clone() } else { dir.join(file) };
            let is_page = target.extension().is_some_and(|extension| extension == "md");
            let found = match anchor {
                "" => target.exists(),
                anchor if is_page => fs::read_to_string(&target)
                    .is_ok_and(|text| links_and_anchors(&text).1.contains(anchor)),
                _ => false,
            };
            if !found {
                wrong.push(format!("{}: {link}", page.display()));
            }
        }
    }
    ensure!(wrong.is_empty(), "these links lead nowhere:\n{}", wrong.join("\n"));
    Ok(())
}

/// Pages name scenarios as `agent/restart.rs`, or `agent/restart.rs::name`.
#[test]
fn every_scenario_that_pages_name_exists() -> Result<()> {
    let tests = root()?.join("tests/tests");
    let mut named = 0;
    for page in pages()? {
        let text = fs::read_to_string(&page)?;
        for event in Parser::new_ext(&text, Options::ENABLE_TABLES) {
            let Event::Code(code) = event else { continue };
            let (file, scenario) = code.split_once("::").unwrap_or((&code, ""));
            let is_scenarios = ["agent/", "datapath/"].iter().any(|dir| file.starts_with(dir));
            if !is_scenarios || !file.ends_with(".rs") {
                continue;
            }
            let source = fs::read_to_string(tests.join(file))
                .with_context(|| format!("{} names {code}", page.display()))?;
            ensure!(
                scenario.is_empty() || source.contains(&format!("fn {scenario}(")),
                "{} names {code}, and there is no such scenario",
                page.display()
            );
            named += 1;
        }
    }
    ensure!(named > 0, "no page names any");
    Ok(())
}

#[test]
fn every_alert_has_a_section_in_the_runbook() -> Result<()> {
    let runbook = fs::read_to_string(root()?.join("docs/runbook.md"))?;
    let sections = links_and_anchors(&runbook).1;
    let rules = rules(&Objects::in_file("monitoring/alerts.yaml")?)?;
    let mut runbooks = BTreeSet::new();
    for rule in &rules {
        let url = rule["annotations"]["runbook_url"].as_str().context("no runbook_url")?;
        // Whoever is paged has no checkout of this repository.
        ensure!(url.starts_with("https://"), "{url} is not absolute");
        let (page, section) = url.split_once('#').context("no section")?;
        runbooks.insert(page);
        let alert = rule["alert"].as_str().context("no name")?;
        ensure!(section == alert.to_lowercase() && sections.contains(section), "{alert}: {url}");
    }
    ensure!(runbooks.len() == 1, "{runbooks:?}");
    // The title, and nothing that no alert leads to.
    ensure!(sections.len() == rules.len() + 1, "{sections:?}");
    Ok(())
}

#[test]
fn book_has_every_page_and_pages_show_every_picture() -> Result<()> {
    let docs = root()?.join("docs").canonicalize()?;
    let read =
        |page: &Path| fs::read_to_string(page).with_context(|| format!("read {}", page.display()));
    let summary = docs.join("SUMMARY.md");
    let in_book: BTreeSet<PathBuf> = links_and_anchors(&read(&summary)?)
        .0
        .iter()
        .map(|link| docs.join(link).canonicalize().with_context(|| format!("find {link}")))
        .collect::<Result<_>>()?;
    let mut shown = BTreeSet::new();
    for page in pages()? {
        let page = page.canonicalize()?;
        ensure!(in_book.contains(&page) || page == summary, "{} is missing", page.display());
        let parent = page.parent().context("a page without a directory")?.to_owned();
        let links = links_and_anchors(&read(&page)?).0;
        shown.extend(links.iter().filter_map(|link| parent.join(link).canonicalize().ok()));
    }
    for entry in fs::read_dir(&docs)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "svg") {
            ensure!(shown.contains(&path), "no page shows {}", path.display());
            let dark = read(&path)?.contains("prefers-color-scheme: dark");
            ensure!(dark, "{} is for a light page alone", path.display());
        }
        if path.extension().is_some_and(|extension| extension == "png") {
            ensure!(shown.contains(&path), "no page shows {}", path.display());
            let bytes = fs::metadata(&path)?.len();
            ensure!(bytes <= 100 * 1024, "{} has {bytes} bytes", path.display());
        }
    }
    Ok(())
}

#[test]
fn readme_is_short() -> Result<()> {
    let words = fs::read_to_string(root()?.join("README.md"))?.split_whitespace().count();
    ensure!(words <= 900, "{words} words");
    Ok(())
}
