//! Verifications as text.

use std::fmt::{self, Write as _};

use super::{Call, Connection, Direction, Outcome, Verification, Verifications};
use crate::output::{self, printable};

/// The column after the headings.
const COLUMN: usize = 11;

/// A verification as text for people.
pub fn text(found: &Verification) -> String {
    let mut out = String::new();
    let _infallible = write(found, &mut out);
    out
}

fn write(found: &Verification, out: &mut String) -> fmt::Result {
    let Verification { time, node, kernel_release, pod, programs, calls, .. } = found;
    let uid = pod.uid.as_deref().unwrap_or("-");
    let head = format!("{} on {}, uid {uid}, at {time}", pod.name, node.name);
    writeln!(out, "{}", printable(&head))?;
    let mut kernel = match &pod.kernel {
        None => "nothing of the agent".to_owned(),
        Some(kernel) => {
            let all = kernel.present.len() + kernel.missing.len();
            let mut text = format!("{}/{all}; netns {}", kernel.present.len(), kernel.netns);
            if !kernel.missing.is_empty() {
                write!(text, "; lacks {}", kernel.missing.join(", "))?;
            }
            text
        }
    };
    write!(kernel, "; {} programs; Linux {kernel_release}", programs.len())?;
    line(out, "  kernel", &kernel)?;
    for call in calls {
        line(out, &format!("  {}", call.direction.as_str()), &call_text(call)?)?;
    }
    line(out, "result", &format!("{}: {}", found.result.as_str(), found.message))?;
    if let Some(finding) = &found.finding {
        let text = format!("{}: {}", finding.area.as_str(), finding.cause.as_str());
        line(out, "  explain", &text)?;
        line(out, "", &finding.message)?;
        for (n, next) in finding.next.iter().enumerate() {
            line(out, if n == 0 { "  next" } else { "" }, next)?;
        }
    }
    Ok(())
}

/// A heading and its text. Text from objects must not contain control characters.
fn line(out: &mut String, word: &str, text: &str) -> fmt::Result {
    writeln!(out, "{word:<COLUMN$}{}", printable(text))
}

/// `ipv4  10.0.0.2:40000 > 192.0.2.1:9: connected; redirected_outbound: captured`.
fn call_text(call: &Call) -> Result<String, fmt::Error> {
    let mut text = format!("{}  {:<12}", call.family, call.outcome.as_str());
    if let Some(to) = call.destination {
        match call.source {
            Some(source) => write!(text, "  {source} > {to}")?,
            None => write!(text, "  to {to}")?,
        }
    }
    let mut said: Vec<&str> =
        call.verdicts.iter().map(|verdict| verdict.verdict.as_str()).collect();
    if call.destination.is_some() && said.is_empty() {
        said.push("no verdict");
    }
    if let Some(connection) = &call.connection {
        said.push(connection.as_str());
    }
    said.extend(call.why.as_deref());
    let mark = if call.destination.is_some() { ": " } else { "  " };
    write!(text, "{mark}{}", said.join(", "))?;
    Ok(text)
}

impl Connection {
    fn as_str(&self) -> &str {
        match self {
            Connection::Connected => "connected",
            Connection::Refused => "connection refused",
            Connection::TimedOut => "connection timed out",
            Connection::Failed(why) => why,
        }
    }
}

/// Several verifications as a table.
pub fn table(found: &Verifications) -> String {
    let rows = found.items.iter().map(|found| {
        let (namespace, name) = found.pod.name.split_once('/').unwrap_or_default();
        vec![
            namespace.to_owned(),
            name.to_owned(),
            found.result.as_str().to_owned(),
            outcomes(&found.calls, Direction::Outbound),
            outcomes(&found.calls, Direction::Inbound),
            found.message.clone(),
        ]
    });
    let header = ["NAMESPACE", "NAME", "RESULT", "OUTBOUND", "INBOUND", "MESSAGE"];
    let mut out = output::table(&header, rows);
    for failed in &found.failed {
        out.push_str(&printable(failed));
        out.push('\n');
    }
    out
}

/// `captured`, or `ipv4 captured, ipv6 unknown`.
fn outcomes(calls: &[Call], direction: Direction) -> String {
    let calls: Vec<&Call> = calls.iter().filter(|call| call.direction == direction).collect();
    let first: Option<Outcome> = calls.first().map(|call| call.outcome);
    if calls.iter().all(|call| Some(call.outcome) == first) {
        return first.map_or_else(String::new, |outcome| outcome.as_str().to_owned());
    }
    let each = calls.iter().map(|call| format!("{} {}", call.family, call.outcome.as_str()));
    each.collect::<Vec<_>>().join(", ")
}
