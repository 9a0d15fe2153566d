//! The bill of materials: what is linked into the binary, and into the kernel programs that it
//! carries. CycloneDX 1.5.
//!
//! `cargo tree` says what that is, for one package and one target. `cargo metadata` would add what
//! only the workspace's other packages use.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, anyhow, ensure};
use cyclonedx_bom::{
    external_models::{date_time::DateTime, uri::Purl},
    models::{
        bom::{Bom, SpecVersion},
        component::{Classification, Component, Components},
        dependency::{Dependencies, Dependency},
        hash::{Hash, HashAlgorithm, HashValue, Hashes},
        license::{LicenseChoice, Licenses},
        metadata::Metadata,
    },
    validation::Validate as _,
};
use sha2::{Digest as _, Sha256};

use super::{ROOT, VERSION, build::Built, read_source, rfc3339};
use crate::process::{cargo, read};

const AGENT: &str = "redirect-agent";

/// Every package that is linked in, each by name and version, with what it uses.
type Packages = BTreeMap<(String, String), Package>;

#[derive(Debug, Default, PartialEq, Eq)]
struct Package {
    license: String,
    uses: BTreeSet<(String, String)>,
}

/// The document for one binary.
pub(super) fn document(built: &Built, binary: &[u8], epoch: u64) -> Result<Vec<u8>> {
    let target = built.machine.target();
    let mut packages = Packages::new();
    add(&mut packages, &tree(&["--package", AGENT, "--target", &target])?)?;
    let programs = ["--package", "redirect-ebpf", "--features", "kernel"];
    add(&mut packages, &tree(&[&programs[..], &["--target", "bpfel-unknown-none"]].concat())?)?;
    let checksums = checksums(&read_source("Cargo.lock")?);
    let mut bom = bom(&packages, &checksums, rfc3339(epoch)?, binary)?;
    // Linked in by the toolchain.
    let toolchain = [
        library("generic", "rust-std", &built.rust, "MIT OR Apache-2.0")?,
        library("generic", "glibc", &built.glibc, "LGPL-2.1-or-later")?,
    ];
    if let Some(components) = &mut bom.components {
        components.0.extend(toolchain);
    }
    write(bom)
}

/// What `cargo tree` shows: a line per package, with its depth, and nothing twice.
fn tree(selection: &[&str]) -> Result<String> {
    read(
        cargo()
            .args(["tree", "--locked", "--edges", "normal,no-proc-macro", "--prefix", "depth"])
            .args(["--format", " {p} | {l} |"])
            .args(selection)
            .current_dir(ROOT),
    )
}

/// Adds what a tree shows: `2 aya v0.14.0 | MIT OR Apache-2.0 | (*)`.
fn add(packages: &mut Packages, tree: &str) -> Result<()> {
    let mut above: Vec<(String, String)> = Vec::new();
    for line in tree.lines() {
        let package = || {
            let (depth, rest) = line.split_once(' ')?;
            let (package, rest) = rest.split_once(" | ")?;
            let (license, _) = rest.split_once('|')?;
            let (name, rest) = package.split_once(" v")?;
            let version = rest.split(' ').next()?;
            let id = (name.to_owned(), version.to_owned());
            Some((depth.parse::<usize>().ok()?, id, license.trim()))
        };
        let (depth, id, license) = package().with_context(|| format!("read {line:?}"))?;
        above.truncate(depth);
        ensure!(above.len() == depth, "read {line:?}: it has no package above it");
        if let Some(user) = above.last() {
            packages.entry(user.clone()).or_default().uses.insert(id.clone());
        }
        // Before SPDX's expressions, a slash was cargo's word for OR.
        packages.entry(id.clone()).or_default().license = license.replace('/', " OR ");
        above.push(id);
    }
    Ok(())
}

/// The checksums of Cargo.lock, by name and version; our own packages have none.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let packages = lock.split("[[package]]").filter_map(|package| {
        let value = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key))?;
            Some(line.strip_prefix(" = \"")?.strip_suffix('"')?.to_owned())
        };
        Some(((value("name")?, value("version")?), value("checksum")?))
    });
    packages.collect()
}

fn bom(
    packages: &Packages,
    checksums: &BTreeMap<(String, String), String>,
    time: String,
    binary: &[u8],
) -> Result<Bom> {
    let agent = (AGENT.to_owned(), VERSION.to_owned());
    let mut components = Vec::new();
    let mut application = None;
    for (id, package) in packages {
        let mut component = library("cargo", &id.0, &id.1, &package.license)?;
        component.hashes = checksums.get(id).map(|sum| sha256(sum.clone()));
        if *id == agent {
            component.component_type = Classification::Application;
            component.hashes = Some(sha256(format!("{:x}", Sha256::digest(binary))));
            application = Some(component);
        } else {
            components.push(component);
        }
    }
    let name = |id: &(String, String)| Ok(purl("cargo", &id.0, &id.1)?.to_string());
    let dependencies = packages.iter().map(|(id, package)| {
        let dependencies = package.uses.iter().map(name).collect::<Result<_>>()?;
        Ok(Dependency { dependency_ref: name(id)?, dependencies })
    });
    Ok(Bom {
        spec_version: SpecVersion::V1_5,
        // A random one would differ each time.
        serial_number: None,
        metadata: Some(Metadata {
            timestamp: Some(DateTime::try_from(time)?),
            component: Some(application.context("find redirect-agent in its own tree")?),
            ..Metadata::default()
        }),
        components: Some(Components(components)),
        dependencies: Some(Dependencies(dependencies.collect::<Result<_>>()?)),
        ..Bom::default()
    })
}

fn library(kind: &str, name: &str, version: &str, license: &str) -> Result<Component> {
    let purl = purl(kind, name, version)?;
    let mut component =
        Component::new(Classification::Library, name, version, Some(purl.to_string()));
    component.purl = Some(purl);
    component.licenses = Some(Licenses(vec![LicenseChoice::expression(license)]));
    Ok(component)
}

fn purl(kind: &str, name: &str, version: &str) -> Result<Purl> {
    Purl::new(kind, name, version).with_context(|| format!("name {name} {version}"))
}

fn sha256(content: String) -> Hashes {
    Hashes(vec![Hash { alg: HashAlgorithm::SHA_256, content: HashValue(content) }])
}

/// The document, if it is what the specification allows.
fn write(bom: Bom) -> Result<Vec<u8>> {
    let found = bom.validate_version(SpecVersion::V1_5);
    ensure!(found.passed(), "the bill is not CycloneDX 1.5: {found:?}");
    let mut document = Vec::new();
    bom.output_as_json_v1_5(&mut document).map_err(|error| anyhow!("{error}"))?;
    document.push(b'\n');
    Ok(document)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::dist::Machine;

    fn id(name: &str, version: &str) -> (String, String) {
        (name.to_owned(), version.to_owned())
    }

    #[test]
    fn tree_says_what_each_package_uses_also_if_it_is_shown_before() {
        let tree = "\
0 redirect-agent v0.1.0 (/source/redirect-agent) | Apache-2.0 |
1 aya v0.14.0 | MIT/Apache-2.0 |
2 libc v0.2.191 | MIT OR Apache-2.0 |
1 tokio v1.54.1 | MIT |
2 libc v0.2.191 | MIT OR Apache-2.0 | (*)";
        let mut packages = Packages::new();
        add(&mut packages, tree).unwrap();
        add(&mut packages, "0 aya v0.14.0 | MIT/Apache-2.0 |\n1 log v0.4.35 | MIT |").unwrap();
        let uses = |name, version| {
            packages[&id(name, version)]
                .uses
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(packages.len(), 5);
        assert_eq!(uses("redirect-agent", "0.1.0"), ["aya", "tokio"]);
        assert_eq!(uses("aya", "0.14.0"), ["libc", "log"]);
        assert_eq!(uses("tokio", "1.54.1"), ["libc"]);
        assert_eq!(packages[&id("aya", "0.14.0")].license, "MIT OR Apache-2.0");
        assert!(add(&mut Packages::new(), "1 aya v0.14.0 | MIT |").is_err());
        assert!(add(&mut Packages::new(), "0 aya").is_err());
    }

    #[test]
    fn checksums_are_read_where_there_are_some() {
        let lock = "\
version = 4

[[package]]
name = \"adler2\"
version = \"2.0.1\"
source = \"registry+https://github.com/rust-lang/crates.io-index\"
checksum = \"320119579fcad9c21884f5c4861d16174d0e06250625266f50fe6898340abefa\"

[[package]]
name = \"xtask\"
version = \"0.1.0\"
dependencies = [
 \"anyhow\",
]
";
        let sum = "320119579fcad9c21884f5c4861d16174d0e06250625266f50fe6898340abefa";
        assert_eq!(checksums(lock), [(id("adler2", "2.0.1"), sum.to_owned())].into());
    }

    /// Of this workspace as it is.
    #[test]
    fn bill_lists_what_is_linked_in_and_nothing_else() {
        let built = Built {
            machine: Machine::Amd64,
            path: "not read".into(),
            rust: "1.95.0".to_owned(),
            glibc: "2.36".to_owned(),
        };
        let document = document(&built, b"program", 7).unwrap();
        let bill: Value = serde_json::from_slice(&document).unwrap();
        assert_eq!(
            (&bill["bomFormat"], &bill["specVersion"]),
            (&"CycloneDX".into(), &"1.5".into())
        );
        assert_eq!(bill["metadata"]["timestamp"], "1970-01-01T00:00:07Z");
        assert_eq!(bill.get("serialNumber"), None);
        let agent = &bill["metadata"]["component"];
        assert_eq!((&agent["name"], &agent["type"]), (&AGENT.into(), &"application".into()));
        let sum = format!("{:x}", Sha256::digest(b"program"));
        assert_eq!(agent["hashes"][0]["content"], sum);

        let components = bill["components"].as_array().unwrap();
        let names: BTreeSet<&str> =
            components.iter().map(|component| component["name"].as_str().unwrap()).collect();
        // Of the agent, of its kernel programs, and of the toolchain.
        for linked in ["tokio", "kube", "redirect-ebpf", "aya-ebpf", "rust-std", "glibc"] {
            assert!(names.contains(linked), "{linked} is missing: {names:?}");
        }
        // Of tests, of this program, of build scripts, of macros, of other systems.
        let not_linked = [
            "bolero",
            "etherparse",
            "rcgen",
            "xtask",
            "oci-spec",
            "aya-build",
            "syn",
            "windows-sys",
        ];
        for other in not_linked {
            assert!(!names.contains(other), "{other} is not linked in");
        }
        for component in components {
            assert!(component["licenses"][0]["expression"].is_string(), "{component}");
            let ours_or_the_toolchains = ["redirect-ebpf", "rust-std", "glibc"];
            let has_sum = component["hashes"][0]["alg"] == "SHA-256";
            let name = component["name"].as_str().unwrap();
            assert_eq!(has_sum, !ours_or_the_toolchains.contains(&name), "{component}");
        }
        let name = |value: &Value| value.as_str().unwrap().to_owned();
        let known: BTreeSet<String> =
            components.iter().chain([agent]).map(|component| name(&component["bom-ref"])).collect();
        let mut used = 0;
        for dependency in bill["dependencies"].as_array().unwrap() {
            assert!(known.contains(&name(&dependency["ref"])), "{dependency}");
            for other in dependency["dependsOn"].as_array().into_iter().flatten() {
                assert!(known.contains(&name(other)), "{dependency}");
                used += 1;
            }
        }
        assert!(used > components.len(), "{used}");
    }
}
