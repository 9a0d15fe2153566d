//! A real browser without a window, driven by the Chrome DevTools Protocol over a pipe.

use std::env;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::netns::{Netns, TestDir};

/// The browsers that know the protocol; `cargo xtask setup` brings the first one.
const NAMES: [&str; 3] = ["chromium-headless-shell", "chromium", "google-chrome"];
/// How long it may take for an answer, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Reads the protocol from descriptor 3 and writes it to 4, which are our pipes.
const PIPES: &str = "exec 3<&0 4>&1 </dev/null >&2; exec \"$@\"";

/// How a page is shown.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    /// In CSS pixels.
    pub width: u32,
    /// In CSS pixels.
    pub height: u32,
    /// Whether the user prefers dark colors.
    pub dark: bool,
}

/// A browser with one page. It is ended when dropped.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: String,
    sent: u64,
    /// What has happened in the page since it was opened: method and parameters.
    events: Vec<(String, Value)>,
}

impl Browser {
    /// Starts one in a namespace. Its profile is below `dir`.
    ///
    /// # Errors
    ///
    /// When there is no browser, or it does not start.
    pub fn start(netns: &Netns, dir: &TestDir) -> Result<Self> {
        let profile = dir.subdir("browser")?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", netns.path().display()))
            .args(["sh", "-c", PIPES, "browser"])
            .arg(find()?)
            // Root has no sandbox; the namespace leads nowhere but to the test's own servers.
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
            .args(["--no-first-run", "--disable-background-networking", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .env("HOME", &profile)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().context("start the browser")?;
        let to = child.stdin.take().context("write to the browser")?;
        let from = follow(child.stdout.take().context("read from the browser")?);
        let (session, events) = (String::new(), Vec::new());
        let mut browser = Self { child, to, from, session, sent: 0, events };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": page["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach)?;
        browser.session = attached["sessionId"].as_str().context("no session")?.to_owned();
        for domain in ["Page.enable", "Network.enable", "Log.enable", "Runtime.enable"] {
            browser.call(domain, json!({}))?;
        }
        Ok(browser)
    }

    /// Shows the page that is at `url`, and waits until it is loaded.
    ///
    /// # Errors
    ///
    /// When it cannot be loaded.
    pub fn open(&mut self, url: &str, screen: Screen) -> Result<()> {
        let Screen { width, height, dark } = screen;
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        });
        self.call("Emulation.setDeviceMetricsOverride", metrics)?;
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media)?;
        self.events.clear();
        let navigated = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(navigated["errorText"].is_null(), "open {url}: {}", navigated["errorText"]);
        let deadline = Instant::now() + PATIENCE;
        while !self.events.iter().any(|(method, _)| method == "Page.loadEventFired") {
            self.receive(deadline).with_context(|| format!("wait for {url}"))?;
        }
        Ok(())
    }

    /// The value of an expression in the page.
    ///
    /// # Errors
    ///
    /// When it throws.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let wanted = json!({"expression": expression, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", wanted)?;
        let thrown = &answer["exceptionDetails"];
        ensure!(thrown.is_null(), "evaluate {expression}: {thrown}");
        Ok(answer["result"]["value"].take())
    }

    /// What the page, since it was opened, has asked for: each URL.
    pub fn requests(&self) -> Vec<String> {
        let url = |(method, event): &(String, Value)| {
            let asked = method == "Network.requestWillBeSent";
            asked.then(|| event["request"]["url"].as_str().unwrap_or_default().to_owned())
        };
        self.events.iter().filter_map(url).collect()
    }

    /// What the browser has complained about since the page was opened: violations of its policy, say.
    pub fn complaints(&self) -> Vec<String> {
        let is_one = |method: &str| {
            ["Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"]
                .contains(&method)
        };
        let all = self.events.iter().filter(|(method, _)| is_one(method));
        all.map(|(method, event)| format!("{method}: {event}")).collect()
    }

    /// What it shows now, as PNG.
    ///
    /// # Errors
    ///
    /// When the browser cannot say.
    pub fn screenshot(&mut self) -> Result<Vec<u8>> {
        let shot = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        let data = shot["data"].as_str().context("no screenshot")?;
        BASE64_STANDARD.decode(data).context("decode the screenshot")
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.sent += 1;
        let mut message = json!({"id": self.sent, "method": method, "params": params});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).with_context(|| format!("send {method} to the browser"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.receive(deadline).with_context(|| format!("wait for {method}"))?;
            let Some(mut answer) = answer.filter(|answer| answer["id"] == self.sent) else {
                continue;
            };
            if let Some(error) = answer.get("error") {
                bail!("{method}: {error}");
            }
            return Ok(answer["result"].take());
        }
    }

    /// The next message: an answer, or `None` for an event, which is kept.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Value>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut message = self.from.recv_timeout(left).context("the browser says nothing more")?;
        let Some(method) = message["method"].as_str().map(str::to_owned) else {
            return Ok(Some(message));
        };
        self.events.push((method, message["params"].take()));
        Ok(None)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It takes its own processes along; else the end of its pipe does.
        let _ended = self.call("Browser.close", json!({}));
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Passes on the messages, each of which ends with a zero byte.
fn follow(from: ChildStdout) -> Receiver<Value> {
    let (to, messages) = mpsc::channel();
    thread::spawn(move || {
        for message in BufReader::new(from).split(0) {
            let Ok(message) = message else { return };
            let Ok(message) = serde_json::from_slice(&message) else { return };
            if to.send(message).is_err() {
                return;
            }
        }
    });
    messages
}

fn find() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = env::split_paths(&path).collect();
    let all = NAMES.iter().flat_map(|name| dirs.iter().map(move |dir| dir.join(name)));
    all.into_iter().find(|path| path.is_file()).with_context(|| {
        format!("find one of {} in PATH (`cargo xtask setup` brings it)", NAMES.join(", "))
    })
}
