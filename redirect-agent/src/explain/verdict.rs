//! What is wrong, and who has to act, judged only from what was gathered.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use redirect_ebpf::abi::{PORT_HBONE, PORT_INBOUND, PORT_OUTBOUND, PORT_PROXY_DNS};
use strsim::damerau_levenshtein;

use super::{
    Area, Bypass, Cause, Destination, EndpointPart, Finding, Judgment, KernelPart, NodePart, Path,
    Place, PodPart, Weight, listeners::is_called, service,
};
use crate::{
    dataplane::PartKind,
    membership::{LABEL_DATAPLANE_MODE, Reason},
    output::PodState,
    source::{EventKind, Redirection, Whom},
    words::Slip,
    zds::Answer,
};

/// How long something that was put back may be the cause of a failure.
const LATELY: Duration = Duration::from_secs(10 * 60);
/// The proxy's own ports in a pod.
const PROXY_PORTS: [u16; 4] = [PORT_OUTBOUND, PORT_INBOUND, PORT_HBONE, PORT_PROXY_DNS];
const HBONE: &str = "HBONE";
const PLAINTEXT: &str = "plaintext";
/// The caller's proxy decides.
const UNKNOWN: &str = "unknown";

/// A pod's role in the question.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The question is about this pod.
    Alone,
    /// It calls.
    Caller,
    /// It is called, at this address and port if they are known.
    Called(Option<IpAddr>, Option<u16>),
}

/// Judges. `endpoint` is where a call to a Service arrives, and `to.pod` is behind it.
pub(super) fn judge(
    node: &NodePart,
    pod: &PodPart,
    to: Option<&Destination>,
    endpoint: Option<&EndpointPart>,
    now: SystemTime,
) -> Judgment {
    let mut findings = Vec::new();
    let called = to.and_then(|to| to.pod.as_ref());
    let role = if to.is_some() { Role::Caller } else { Role::Alone };
    of_pod(node, pod, role, now, &mut findings);
    if let (Some(to), Some(called)) = (to, called) {
        let (ip, port) = to.arrives_at(endpoint);
        of_pod(node, called, Role::Called(ip, port), now, &mut findings);
    }
    let told = to.filter(|to| to.service_unknown.is_none());
    findings.extend(told.and_then(|to| service::findings(&to.asked, to.service.as_ref())));
    let path = to.and_then(|to| path(pod, to, endpoint));
    match (&path, to) {
        (Some(path), Some(to)) => of_path(pod, to, path, &mut findings),
        (None, None) => findings.push(nothing(pod)),
        _ => {}
    }
    // Of equally certain causes, the first one in the list.
    findings.sort_by_key(|finding| (finding.weight, finding.cause));
    let mut seen = Vec::new();
    findings.retain(|finding| {
        let new = !seen.contains(&(finding.cause, finding.message.clone()));
        seen.push((finding.cause, finding.message.clone()));
        new
    });
    (path, findings)
}

fn finding(area: Area, cause: Cause, pod: &PodPart, message: String, next: &[String]) -> Finding {
    let pod = Some(pod.name.clone());
    Finding { area, cause, pod, message, next: next.to_vec(), weight: Weight::Wrong }
}

fn hint(finding: Finding) -> Finding {
    Finding { weight: Weight::Hint, ..finding }
}

fn of_pod(node: &NodePart, pod: &PodPart, role: Role, now: SystemTime, out: &mut Vec<Finding>) {
    if pod.place == Place::Unknown {
        out.push(unknown(pod, role));
        return;
    }
    let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
    if !pod.conflicts.is_empty() {
        out.push(finding(
            Area::Network,
            Cause::TwoPodsOneAddress,
            pod,
            format!("{}: {}", pod.name, pod.conflicts.join("; ")),
            &["kubectl get pods -A -o wide --field-selector status.podIP=ADDRESS".to_owned()],
        ));
    }
    if !pod.missing_addresses.is_empty() {
        let missing = join(&pod.missing_addresses);
        out.push(finding(
            Area::Network,
            Cause::AddressMissing,
            pod,
            format!(
                "no interface of {} has its address {missing}, so what is sent there does not arrive",
                pod.name
            ),
            &[
                format!("kubectl -n {namespace} get pod {name} -o jsonpath='{{.status.podIPs}}'"),
                in_netns(pod, "ip address"),
            ],
        ));
    }
    words(pod, out);
    let enrolled = pod.decision.as_ref().is_some_and(|decision| decision.enrolled);
    if !enrolled {
        out.extend(out_of_the_mesh(node, pod));
    } else if pod.place == Place::Here {
        proxy(node, pod, out);
        kernel(pod, now, out);
    }
    if enrolled || role != Role::Alone {
        out.extend(application(pod, role));
    }
}

fn unknown(pod: &PodPart, role: Role) -> Finding {
    let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
    let find = format!("kubectl get pods -A --field-selector metadata.name={name}");
    if pod.elsewhere.is_empty() {
        let message = match role {
            Role::Called(..) => format!("there is no pod {} and no Service of that name", pod.name),
            _ => format!("there is no pod {} on this node", pod.name),
        };
        return finding(Area::Configuration, Cause::NoSuchPod, pod, message, &[find]);
    }
    let others = pod.elsewhere.join(", ");
    let message = format!("there is no pod {name} in namespace {namespace}, but there is {others}");
    let next = pod.elsewhere.iter().map(|other| format!("redirect-agent explain {other}"));
    let next: Vec<String> = next.collect();
    finding(Area::Configuration, Cause::WrongNamespace, pod, message, &next)
}

/// Labels and annotations that do not mean what they seem to.
fn words(pod: &PodPart, out: &mut Vec<Finding>) {
    let enrolled = pod.decision.as_ref().is_some_and(|decision| decision.enrolled);
    for word in &pod.unknown_words {
        let cause = match word.what {
            Slip::LabelKey | Slip::NotALabel => Cause::MisspelledLabelKey,
            Slip::LabelValue => Cause::MisspelledLabelValue,
            Slip::AnnotationKey | Slip::Sidecar => Cause::UnknownAnnotation,
        };
        let kubectl = on_object(&word.object);
        let value = word.quoted_value();
        let next = match (cause, &word.meant) {
            (Cause::MisspelledLabelValue, meant) => {
                let value = meant.as_deref().unwrap_or("ambient");
                vec![format!("kubectl label {kubectl} --overwrite {}={value}", word.key)]
            }
            (Cause::MisspelledLabelKey, _) => {
                vec![format!("kubectl label {kubectl} {LABEL_DATAPLANE_MODE}={value}")]
            }
            (_, Some(key)) => vec![format!("kubectl annotate {kubectl} {key}={value}")],
            (_, None) => vec![format!("kubectl annotate {kubectl} {}-", word.key)],
        };
        let found = finding(Area::Configuration, cause, pod, word.to_string(), &next);
        // If the pod is in the mesh anyway, another label put it there.
        let harmless = enrolled && cause != Cause::UnknownAnnotation || word.what == Slip::Sidecar;
        out.push(if harmless { hint(found) } else { found });
    }
    for origin in &pod.settings {
        let Some(problem) = &origin.problem else { continue };
        let key = &origin.annotation;
        let message = format!(
            "annotation {key} of pod {} cannot be used: {problem}; what it said before holds, or nothing",
            pod.name
        );
        let next = format!(
            "kubectl annotate {} --overwrite {key}=…",
            on_object(&format!("pod {}", pod.name))
        );
        out.push(finding(Area::Configuration, Cause::AnnotationValue, pod, message, &[next]));
    }
}

/// `namespace shop`, `-n shop pod cart`: for kubectl.
fn on_object(object: &str) -> String {
    match object.strip_prefix("pod ").and_then(|pod| pod.split_once('/')) {
        Some((namespace, name)) => format!("-n {namespace} pod {name}"),
        None => object.to_owned(),
    }
}

/// Why a pod is not in the mesh, which may be intentional.
fn out_of_the_mesh(node: &NodePart, pod: &PodPart) -> Option<Finding> {
    let reason = pod.decision.as_ref()?.reason;
    let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
    let why = format!("{} is not in the mesh: {}", pod.name, reason.explain());
    let label = format!("kubectl label namespace {namespace} {LABEL_DATAPLANE_MODE}=ambient");
    let is_near = |other: &&String| {
        let near = damerau_levenshtein(other, namespace) <= 2;
        let longer = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.starts_with('-'));
        near || longer(other, namespace) || longer(namespace, other)
    };
    let near = node.mesh_namespaces.iter().find(is_near);
    let (cause, why, next) = match (reason, near) {
        (Reason::NotLabeled, Some(near)) => {
            let why = format!("{why}; namespace {near} has it: was {namespace} meant?");
            (Cause::WrongNamespace, why, vec![label])
        }
        (Reason::NotLabeled | Reason::NotSelected, _) if node.lacks_namespace => {
            let why = format!(
                "cannot tell whether {} is in the mesh: no manifest has the Namespace {namespace}, \
                 whose labels may decide",
                pod.name
            );
            let next = format!("kubectl get namespace {namespace} --output yaml");
            (Cause::NamespaceMissing, why, vec![next])
        }
        (Reason::NotLabeled, None) => (Cause::NotLabeled, why, vec![label]),
        (Reason::NotSelected, _) => (
            Cause::NotLabeled,
            why,
            vec![
                format!("kubectl -n {namespace} get pod {name} --show-labels"),
                format!("kubectl get namespace {namespace} --show-labels"),
            ],
        ),
        (Reason::PodLabelNone, _) => {
            let next = format!("kubectl -n {namespace} label pod {name} {LABEL_DATAPLANE_MODE}-");
            (Cause::KeptOut, why, vec![next])
        }
        (Reason::Paused, _) => (Cause::KeptOut, why, vec!["redirect-agent resume".to_owned()]),
        (Reason::OverrideBypass, _) => {
            (Cause::KeptOut, why, vec![format!("redirect-agent auto {}", pod.name)])
        }
        (Reason::Sidecar, _) => (
            Cause::KeptOut,
            why,
            vec![
                format!("kubectl label namespace {namespace} istio-injection-"),
                format!("kubectl -n {namespace} delete pod {name}"),
            ],
        ),
        _ => (Cause::KeptOut, why, Vec::new()),
    };
    Some(hint(finding(Area::Configuration, cause, pod, why, &next)))
}

/// What is wrong with the proxy of a pod in the mesh.
fn proxy(node: &NodePart, pod: &PodPart, out: &mut Vec<Finding>) {
    let of_proxy = [
        format!(
            "kubectl -n istio-system get pods -l app=ztunnel -o wide --field-selector spec.nodeName={}",
            node.name
        ),
        "kubectl -n istio-system logs -l app=ztunnel --tail 50".to_owned(),
    ];
    if let (Some(0), Some(since)) = (node.proxies, node.no_proxy_since) {
        let (cause, message) = match &node.last_proxy {
            Some(did) => (
                Cause::ProxyAway,
                format!(
                    "no proxy since {since}, when the last one {did}; new connections of pods in the mesh are \
                     refused; is ztunnel running on this node?"
                ),
            ),
            None => (
                Cause::ProxyNeverConnected,
                format!(
                    "no proxy has connected to the ZDS socket since the agent started at {since}; is ztunnel \
                     running on this node, and does it use the same socket?"
                ),
            ),
        };
        out.push(finding(Area::Proxy, cause, pod, message, &of_proxy));
        return;
    }
    if let Some(Answer::Refused(error)) = &pod.proxy {
        let message = format!("the proxy refuses {}: {error}", pod.name);
        out.push(finding(Area::Proxy, Cause::ProxyRefusesPod, pod, message, &of_proxy));
        return;
    }
    let Some(kernel) = pod.kernel.as_ref().filter(|kernel| kernel.captured) else { return };
    if !kernel.proxy_does_not_listen.is_empty() {
        let ports = join(&kernel.proxy_does_not_listen);
        let message = format!(
            "the proxy is connected, but does not listen in {} on port {ports}: what goes there is refused",
            pod.name
        );
        out.push(finding(Area::Proxy, Cause::ProxyNotListening, pod, message, &of_proxy));
    } else if !kernel.proxy_dns && pod.traffic.as_ref().is_some_and(|t| t.captures_dns()) {
        let message = format!(
            "the DNS of {} is captured, and the proxy has none (port {PORT_PROXY_DNS}): queries are refused",
            pod.name
        );
        let next = format!(
            "kubectl annotate {} ambient.istio.io/dns-capture=false",
            on_object(&format!("pod {}", pod.name))
        );
        out.push(finding(Area::Proxy, Cause::ProxyWithoutDns, pod, message, &[next]));
    }
}

/// What is wrong with what the kernel has for a pod in the mesh.
fn kernel(pod: &PodPart, now: SystemTime, out: &mut Vec<Finding>) {
    let settled = matches!(pod.state, Some(PodState::Enrolled | PodState::Degraded));
    let next = |cause| {
        let status = format!("redirect-agent status {} -o wide", pod.name);
        let rules = (cause == Cause::RuleDeleted).then(|| in_netns(pod, "ip rule"));
        [Some(status), rules].into_iter().flatten().collect::<Vec<_>>()
    };
    if let Some(kernel) = pod.kernel.as_ref().filter(|kernel| settled && kernel.captured) {
        for (cause, things) in by_cause(kernel) {
            let message = format!(
                "{} lacks {}; somebody has removed or changed it, and the agent is about to put it back",
                pod.name,
                things.join(", ")
            );
            out.push(finding(Area::Redirector, cause, pod, message, &next(cause)));
        }
    }
    let is_lately = |entry: &&crate::journal::Entry| {
        entry.kind == EventKind::Repaired && entry.last.until(now) < LATELY
    };
    for entry in pod.history.iter().filter(is_lately) {
        let Some(cause) = entry.repaired.iter().map(|kind| cause_of(*kind)).min() else { continue };
        let times =
            if entry.count > 1 { format!(", {} times", entry.count) } else { String::new() };
        let message = format!(
            "at {}{times} somebody removed or changed what the agent keeps in {}: {}",
            entry.last, pod.name, entry.message
        );
        let past = finding(Area::Redirector, cause, pod, message, &next(cause));
        out.push(Finding { weight: Weight::Past, ..past });
    }
    // A pod that waits for the proxy has no fault of its own, unless it says so.
    let failed = pod.state == Some(PodState::Failed);
    let waits = out.iter().any(|f| f.weight == Weight::Wrong && f.area == Area::Proxy);
    if !settled && (failed || !waits) {
        let state = pod.state.map_or("unknown", PodState::as_str);
        let why = pod.message.as_deref().unwrap_or("it takes a moment");
        let message = format!("{} is {state}: {why}", pod.name);
        let cause = Cause::NotThereYet;
        out.push(finding(Area::Redirector, cause, pod, message, &next(cause)));
    }
}

fn by_cause(kernel: &KernelPart) -> Vec<(Cause, Vec<String>)> {
    let mut causes: Vec<(Cause, Vec<String>)> = Vec::new();
    for (kind, name) in kernel.missing_kinds.iter().zip(&kernel.missing) {
        let cause = cause_of(*kind);
        match causes.iter_mut().find(|(known, _)| *known == cause) {
            Some((_, things)) => things.push(name.clone()),
            None => causes.push((cause, vec![name.clone()])),
        }
    }
    causes
}

fn cause_of(kind: PartKind) -> Cause {
    match kind {
        PartKind::Rule
        | PartKind::DrainRule
        | PartKind::RuleOrder
        | PartKind::Route
        | PartKind::DrainRoute => Cause::RuleDeleted,
        PartKind::Lookup | PartKind::Tcx | PartKind::Clsact => Cause::LinkDetached,
        PartKind::Sysctl => Cause::SysctlChanged,
        _ => Cause::MapChanged,
    }
}

/// What is wrong with where the application of a pod listens.
fn application(pod: &PodPart, role: Role) -> Option<Finding> {
    let listens: Vec<SocketAddr> = application_listens(pod)?;
    let local = |at: &&SocketAddr| at.ip().to_canonical().is_loopback();
    let (ip, port) = match role {
        Role::Caller => return None,
        Role::Alone => (None, None),
        Role::Called(ip, port) => (ip, port),
    };
    let ips: Vec<IpAddr> = ip.map_or_else(|| pod.ips.clone(), |ip| vec![ip]);
    let there: Vec<&SocketAddr> =
        listens.iter().filter(|at| port.is_none_or(|port| at.port() == port)).collect();
    let reached = |at: &&&SocketAddr| ips.iter().any(|ip| is_called(***at, *ip, at.port()));
    if there.iter().any(|at| reached(&at)) || there.is_empty() && role == Role::Alone {
        return None;
    }
    let next = [in_netns(pod, "netstat -ltn")];
    if !there.is_empty() && there.iter().all(local) {
        let message = format!(
            "the application of {} listens on loopback only ({}), where neither its peers nor the proxy can \
             call it: let it listen on 0.0.0.0 or ::",
            pod.name,
            join(&there)
        );
        return Some(finding(Area::Application, Cause::ListensOnLoopback, pod, message, &next));
    }
    let at = port.map_or_else(String::new, |port| format!(" on port {port}"));
    let instead = match (there.is_empty(), listens.is_empty()) {
        (_, true) => "and nowhere else either".to_owned(),
        (true, false) => format!("but at {}", join(&listens)),
        (false, _) => format!("at {}, but at {}", join(&ips), join(&there)),
    };
    let message = format!("nothing listens in {}{at}, {instead}", pod.name);
    Some(finding(Area::Application, Cause::NobodyListens, pod, message, &next))
}

/// Where the application listens, and not the proxy.
pub(crate) fn application_listens(pod: &PodPart) -> Option<Vec<SocketAddr>> {
    let proxys = |at: &&SocketAddr| pod.kernel.is_some() && PROXY_PORTS.contains(&at.port());
    Some(pod.listens.as_ref()?.iter().filter(|at| !proxys(at)).copied().collect())
}

/// Whether a pod calls loopback, or itself by its address.
fn calls_itself(from: &PodPart, to: &Destination) -> bool {
    let own = to.service.is_none() && to.pod.as_ref().is_some_and(|pod| pod.name == from.name);
    own || matches!(to.asked.whom, Whom::At(ip) if from.bypass_to(ip, None) == Some(Bypass::InPod))
}

/// Which way a call takes; `None` if unknown.
fn path(from: &PodPart, to: &Destination, endpoint: Option<&EndpointPart>) -> Option<Path> {
    if from.place == Place::Unknown || from.place == Place::LeftOut {
        return None;
    }
    let called = to.pod.as_ref();
    let (ip, port) = to.dialed();
    if calls_itself(from, to) {
        let why = vec![format!("{} calls itself: that never leaves the pod", from.name)];
        let protocol = PLAINTEXT.to_owned();
        return Some(Path { protocol, by_callers_proxy: false, to_proxy_port: None, why });
    }
    let mut why = Vec::new();
    let bypass = ip.and_then(|ip| from.bypass_to(ip, port));
    let by_callers_proxy = match (is_captured(from), bypass) {
        (false, _) => {
            why.push(format!("{} is not in the mesh, so it calls directly", from.name));
            false
        }
        (true, Some(Bypass::LinkLocal)) => {
            why.push(format!(
                "link-local addresses (fe80::/10) are not redirected, so {} calls directly",
                from.name
            ));
            false
        }
        (true, Some(_)) => {
            why.push(format!(
                "settings of {} exclude {}, so it calls directly",
                from.name, to.asked
            ));
            false
        }
        (true, None) => {
            why.push(format!("{} is in the mesh: its proxy makes the call", from.name));
            true
        }
    };
    why.extend(to.service.iter().flat_map(|service| service::passes(service, by_callers_proxy)));
    let Some(called) = called else {
        if let Some(error) = &to.service_unknown {
            why.push(format!("it is unknown whether {} is a Service: {error}", to.asked));
        } else if to.service.is_none() {
            why.push(format!(
                "no pod and no Service is known at {}; if the caller's proxy knows it, that chooses the protocol",
                to.asked
            ));
        }
        let protocol = if by_callers_proxy { UNKNOWN } else { PLAINTEXT }.to_owned();
        return Some(Path { protocol, by_callers_proxy, to_proxy_port: None, why });
    };
    if called.place == Place::Unknown || called.place == Place::LeftOut {
        return None;
    }
    let says = called.redirection.as_deref();
    let hbone = by_callers_proxy && says == Some(Redirection::Enabled.as_str());
    why.push(match (says, hbone) {
        (Some(value), true) => {
            format!("{} has ambient.istio.io/redirection={value}: HBONE", called.name)
        }
        (Some(value), false) => format!(
            "{} has ambient.istio.io/redirection={value}, which only proxies read: plaintext",
            called.name
        ),
        (None, _) => {
            format!("{} has no annotation ambient.istio.io/redirection: plaintext", called.name)
        }
    });
    let settings = called.traffic.clone().unwrap_or_default();
    let source = from.ips.first().copied();
    let to_proxy_port = if hbone {
        Some(PORT_HBONE)
    } else if is_captured(called) && settings.redirects_call_from(source, to.arrives_at(endpoint).1)
    {
        Some(PORT_INBOUND)
    } else {
        None
    };
    why.push(match to_proxy_port {
        Some(port) => format!("it arrives at the proxy of {}, port {port}", called.name),
        None if is_captured(called) => {
            format!("settings of {} let it past the proxy, to the application", called.name)
        }
        None => format!("it arrives at the application of {} directly", called.name),
    });
    let protocol = if hbone { HBONE } else { PLAINTEXT }.to_owned();
    Some(Path { protocol, by_callers_proxy, to_proxy_port, why })
}

/// Whether a pod's new connections are redirected. On another node, this is what the pod's annotation says.
fn is_captured(pod: &PodPart) -> bool {
    match (pod.place, &pod.kernel) {
        (Place::Here, Some(kernel)) => kernel.captured,
        (Place::Here, None) => false,
        _ => pod.redirection.is_some(),
    }
}

/// What may be intentional, and where to look if nothing is wrong here.
fn of_path(from: &PodPart, to: &Destination, path: &Path, out: &mut Vec<Finding>) {
    let called = to.pod.as_ref().unwrap_or(from);
    let (namespace, _) = called.name.split_once('/').unwrap_or_default();
    let policies = [
        format!("kubectl get peerauthentication,authorizationpolicy -n {namespace}"),
        "kubectl get peerauthentication -n istio-system".to_owned(),
        "kubectl -n istio-system logs -l app=ztunnel --tail 50 | grep -w access".to_owned(),
    ];
    let heard = out.iter().all(|found| found.cause != Cause::NobodyListens);
    if path.to_proxy_port == Some(PORT_INBOUND) && heard {
        let message = format!(
            "the call is handed to the proxy of {} in plaintext, without an identity: the proxy refuses it \
             (accepts and closes it without a byte) where a PeerAuthentication says STRICT; look there",
            called.name
        );
        out.push(hint(finding(Area::Proxy, Cause::PlaintextToProxy, called, message, &policies)));
    } else if calls_itself(from, to) {
        let message = format!(
            "the redirector has no part in this call: {} calls itself; look at where its application listens",
            from.name
        );
        let next = [in_netns(from, "ss -ltnp")];
        out.push(hint(finding(Area::Application, Cause::OutsideTheMesh, from, message, &next)));
    } else if !path.by_callers_proxy && path.to_proxy_port.is_none() {
        let message = format!(
            "the redirector has no part in this call: it goes from {} to {} past every proxy; look at the \
             network between them (routes, NetworkPolicy) and at the application",
            from.name, to.asked
        );
        let next =
            [in_netns(from, "ip route"), format!("kubectl get networkpolicy -n {namespace}")];
        out.push(hint(finding(Area::Network, Cause::OutsideTheMesh, from, message, &next)));
    }
    for pod in [Some(from), to.pod.as_ref()].into_iter().flatten() {
        if pod.place == Place::OtherNode {
            let node = pod.node.as_deref().unwrap_or("another node");
            let message = format!(
                "{} is on {node}, of which this agent knows only what the pod's object says: ask there",
                pod.name
            );
            let next = format!("redirect-agent explain {} {}   # on {node}", from.name, to.asked);
            out.push(hint(finding(Area::None, Cause::OtherNode, pod, message, &[next])));
        }
    }
    let message = format!(
        "nothing is wrong with the redirection of this call ({}); when it fails all the same, a policy \
         of the proxy, the application, or the network refuses it",
        path.protocol
    );
    out.push(hint(finding(Area::None, Cause::NothingFound, from, message, &policies)));
}

pub(super) fn nothing(pod: &PodPart) -> Finding {
    let message = match pod.place {
        Place::Manifest => "the manifests say nothing that is wrong".to_owned(),
        _ if pod.state == Some(PodState::Leaving) => {
            format!("{} is leaving the mesh; its open connections go on meanwhile", pod.name)
        }
        _ => format!("{} is where it should be, and nothing of it is missing", pod.name),
    };
    let next = format!("redirect-agent explain {} NAMESPACE/POD:PORT", pod.name);
    let next = if pod.place == Place::Manifest { Vec::new() } else { vec![next] };
    hint(finding(Area::None, Cause::NothingFound, pod, message, &next))
}

/// A command that looks into the network namespace of a pod.
fn in_netns(pod: &PodPart, command: &str) -> String {
    let (namespace, name) = pod.name.split_once('/').unwrap_or_default();
    format!("kubectl debug -n {namespace} {name} -it --image=busybox -- {command}")
}

fn join<T: ToString>(things: &[T]) -> String {
    things.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}
