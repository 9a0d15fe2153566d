//! Reads the annotations of a pod.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    ANNOTATION_BYPASS_INBOUND, ANNOTATION_DNS_CAPTURE, ANNOTATION_VIRTUAL_INTERFACES, Entry,
    PREFIX, SIDECAR_NAMES, SIDECAR_PREFIX, Selection, Selections, Traffic, fits, parse_range,
};

/// The longest name of an interface. Source: Linux `include/uapi/linux/if.h`, `IFNAMSIZ`.
const INTERFACE_NAME: usize = 15;

/// Every pod has it, and what arrives there is not the pod's own traffic. Source: CNI, `CNI_IFNAME`, which is
/// always `eth0` in Kubernetes.
const OWN_INTERFACES: [&str; 2] = ["lo", "eth0"];

/// The node's settings for reading pods' annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// The defaults for pods without annotations.
    pub defaults: Selections,
    /// Whether the sidecar's annotations with the same meaning apply if ours is absent.
    pub sidecar_annotations: bool,
    /// Whether the DNS of a pod without an annotation goes to the proxy's DNS.
    pub dns_capture: bool,
}

impl Settings {
    /// What the annotations of a pod ask for, and what is wrong with them.
    ///
    /// An annotation that cannot be parsed keeps its value from `last`, the pod's previous settings. If there
    /// are none, it counts as absent.
    pub fn read(
        &self,
        annotations: &BTreeMap<String, String>,
        last: Option<&Traffic>,
    ) -> (Traffic, Vec<String>) {
        let (traffic, origins) = self.trace(annotations, last);
        let problem = |o: Origin| Some(format!("annotation {}: {}", o.annotation, o.problem?));
        (traffic, origins.into_iter().filter_map(problem).collect())
    }

    /// The same, with each annotation that was read.
    pub fn trace(
        &self,
        annotations: &BTreeMap<String, String>,
        last: Option<&Traffic>,
    ) -> (Traffic, Vec<Origin>) {
        let absent = Traffic {
            dns_capture: self.dns_capture,
            selections: self.defaults.clone(),
            ..Traffic::default()
        };
        let mut reader = Reader {
            annotations,
            sidecar: self.sidecar_annotations,
            last: last.unwrap_or(&absent),
            absent: &absent,
            origins: Vec::new(),
        };
        let traffic = Traffic {
            bypass_inbound: reader
                .named(ANNOTATION_BYPASS_INBOUND, parse_bool, |t| t.bypass_inbound),
            dns_capture: reader.named(ANNOTATION_DNS_CAPTURE, parse_bool, |t| t.dns_capture),
            virtual_interfaces: reader.named(
                ANNOTATION_VIRTUAL_INTERFACES,
                |s| list(s, interface),
                |t| t.virtual_interfaces.clone(),
            ),
            selections: Selections {
                outbound_ranges: reader
                    .selection("OutboundIPRanges", parse_range, |s| s.outbound_ranges.clone()),
                outbound_ports: reader
                    .selection("OutboundPorts", str::parse, |s| s.outbound_ports.clone()),
                inbound_ports: reader
                    .selection("InboundPorts", str::parse, |s| s.inbound_ports.clone()),
                inbound_sources: reader
                    .selection("InboundSourceIPRanges", parse_range, |s| s.inbound_sources.clone()),
            },
        };
        (traffic, reader.origins)
    }
}

/// An annotation of a pod that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its key.
    pub annotation: String,
    /// Its value.
    pub value: String,
    /// Why the value cannot be used, so that the previous one stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

struct Reader<'a> {
    annotations: &'a BTreeMap<String, String>,
    sidecar: bool,
    last: &'a Traffic,
    absent: &'a Traffic,
    origins: Vec<Origin>,
}

impl Reader<'_> {
    fn named<T>(
        &mut self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
        of: impl Fn(&Traffic) -> T,
    ) -> T {
        let Some(value) = self.annotations.get(name) else { return of(self.absent) };
        let (read, problem) = match parse(value) {
            Ok(read) => (read, None),
            Err(problem) => (of(self.last), Some(problem)),
        };
        self.origins.push(Origin { annotation: name.to_owned(), value: value.clone(), problem });
        read
    }

    fn selection<T: Clone + Entry>(
        &mut self,
        what: &str,
        parse: impl Fn(&str) -> Result<T, String> + Copy,
        of: impl Fn(&Selections) -> Selection<T>,
    ) -> Selection<T> {
        let (include, exclude) = (self.name("include", what), self.name("exclude", what));
        Selection {
            only: self.named(
                &include,
                |s| if s.trim() == "*" { Ok(None) } else { list(s, parse).map(Some) },
                |t| of(&t.selections).only,
            ),
            except: self.named(&exclude, |s| list(s, parse), |t| of(&t.selections).except),
        }
    }

    /// The annotation that applies: ours, or the sidecar's if ours is absent.
    fn name(&self, how: &str, what: &str) -> String {
        let name = format!("{how}{what}");
        let (ours, sidecars) = (format!("{PREFIX}{name}"), format!("{SIDECAR_PREFIX}{name}"));
        let takes = self.sidecar && SIDECAR_NAMES.contains(&name.as_str());
        match takes && !self.annotations.contains_key(&ours) {
            true => sidecars,
            false => ours,
        }
    }
}

/// A comma-separated list: sorted, without duplicates and empty entries.
pub(super) fn list<T: Entry>(
    s: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let entries = s.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let mut found = entries.map(parse).collect::<Result<Vec<T>, String>>()?;
    found.sort();
    found.dedup();
    fits(&found)?;
    Ok(found)
}

/// As Go's `strconv.ParseBool`.
fn parse_bool(s: &str) -> Result<bool, String> {
    match s {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err(format!("{s:?} is neither \"true\" nor \"false\"")),
    }
}

/// A virtual interface. Source: Linux `net/core/dev.c`, `dev_valid_name`.
pub(super) fn interface(s: &str) -> Result<String, String> {
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if s.len() > INTERFACE_NAME || s == "." || s == ".." || s.contains(odd) {
        return Err(format!("{s:?} is not the name of an interface"));
    }
    if OWN_INTERFACES.contains(&s) {
        return Err(format!("{s:?} is the pod's own interface, and leads to no VM or container"));
    }
    Ok(s.to_owned())
}
