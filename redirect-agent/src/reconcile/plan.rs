//! What to do next for a pod: a pure comparison of what is wished with what is known to be true.

/// What is wanted for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// In the mesh.
    Enrolled,
    /// Not in the mesh.
    Bypass,
}

/// What is known to be true of a pod. All false: nothing was ever done to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Everything is in place in its namespace.
    pub(super) prepared: bool,
    /// The proxy may know it.
    pub(super) offered: bool,
    /// The proxy listens in it.
    pub(super) served: bool,
    /// Its new connections may be redirected.
    pub(super) captured: bool,
    /// They are, exactly as its settings say.
    pub(super) shaped: bool,
    /// Connections of it may be redirected.
    pub(super) redirected: bool,
    /// Its peers are told to speak HBONE to it.
    pub(super) published: bool,
    /// Something may be published of it.
    pub(super) mentioned: bool,
    /// Its peers may be told so although nothing of it is in place: its sandbox was made anew.
    pub(super) stale: bool,
    /// The map `pods` says why it bypasses.
    pub(super) noted: bool,
    /// istio-cni's rules are in its namespace.
    pub(super) foreign: bool,
}

impl Standing {
    /// Of a namespace that a former agent has set up, or half set up: all that it may have done.
    pub(super) fn of_ours() -> Self {
        Self {
            prepared: true,
            offered: true,
            captured: true,
            redirected: true,
            mentioned: true,
            ..Self::default()
        }
    }
}

/// One thing to do for a pod; each is idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Set everything up, without redirecting.
    Prepare,
    /// Hand it to the proxy, and wait until that listens.
    Serve,
    /// Redirect new connections as the settings say.
    Capture,
    /// Take istio-cni's rules out of it.
    Displace,
    /// Tell its peers to speak HBONE to it.
    Publish,
    /// Tell its peers not to.
    Retract,
    /// Stop redirecting new connections.
    Release,
    /// Let redirected connections end.
    Drain,
    /// Take it away from the proxy.
    Withdraw,
    /// Leave no trace.
    Remove,
    /// Say in the map `pods` why it bypasses.
    Note,
}

/// The next step, in the order that misdirects no connection; `None` when all is as wished.
///
/// Into the mesh: nothing is redirected before the proxy listens, and peers use HBONE only when
/// that is answered. Out of it: the reverse, and the proxy, which cuts a pod's connections when it
/// loses it, loses it only when they have ended or have had their time.
///
/// A pod that istio-cni redirects is served already, and stays so: its peers are not told
/// otherwise, and ours is all in place before istio-cni's goes.
pub(super) fn next(wish: Wish, s: &Standing) -> Option<Step> {
    match wish {
        Wish::Enrolled if s.stale && !s.captured && !s.foreign => Some(Step::Retract),
        Wish::Enrolled if !s.prepared => Some(Step::Prepare),
        Wish::Enrolled if !s.served => Some(Step::Serve),
        Wish::Enrolled if !s.captured || !s.shaped => Some(Step::Capture),
        Wish::Enrolled if s.foreign => Some(Step::Displace),
        Wish::Enrolled if !s.published => Some(Step::Publish),
        Wish::Enrolled => None,
        Wish::Bypass if s.foreign && !s.prepared => Some(Step::Prepare),
        Wish::Bypass if s.mentioned => Some(Step::Retract),
        Wish::Bypass if s.captured => Some(Step::Release),
        Wish::Bypass if s.foreign => Some(Step::Displace),
        Wish::Bypass if s.redirected => Some(Step::Drain),
        Wish::Bypass if s.offered => Some(Step::Withdraw),
        Wish::Bypass if s.prepared => Some(Step::Remove),
        Wish::Bypass if !s.noted => Some(Step::Note),
        Wish::Bypass => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a step makes true when it succeeds.
    fn done(step: Step, mut s: Standing) -> Standing {
        match step {
            Step::Prepare => (s.prepared, s.noted) = (true, false),
            Step::Serve => (s.served, s.offered) = (true, true),
            Step::Capture => (s.captured, s.shaped, s.redirected) = (true, true, true),
            Step::Displace => (s.foreign, s.redirected) = (false, true),
            Step::Publish => (s.published, s.mentioned) = (true, true),
            Step::Retract => (s.published, s.mentioned, s.stale) = (false, false, false),
            Step::Release => (s.captured, s.shaped) = (false, false),
            Step::Drain => s.redirected = false,
            Step::Withdraw => (s.served, s.offered) = (false, false),
            Step::Remove => s.prepared = false,
            Step::Note => s.noted = true,
        }
        s
    }

    fn walk(wish: Wish, mut s: Standing) -> (Vec<Step>, Standing) {
        let mut steps = Vec::new();
        while let Some(step) = next(wish, &s) {
            steps.push(step);
            assert!(steps.len() <= 11, "{wish:?} does not settle: {steps:?}");
            s = done(step, s);
        }
        (steps, s)
    }

    fn every_standing() -> impl Iterator<Item = Standing> {
        (0..=2047u16).map(|bits| {
            let bit = |n: u8| bits & (1 << n) != 0;
            Standing {
                prepared: bit(0),
                offered: bit(1),
                served: bit(2),
                captured: bit(3),
                shaped: bit(3) && bit(8),
                redirected: bit(4),
                published: bit(5),
                noted: bit(6),
                stale: bit(5) && bit(9),
                mentioned: bit(5) || bit(7),
                foreign: bit(10),
            }
        })
    }

    #[test]
    fn a_new_pod_goes_in_and_out_in_the_documented_order() {
        use Step::*;
        let (steps, inside) = walk(Wish::Enrolled, Standing::default());
        assert_eq!(steps, [Prepare, Serve, Capture, Publish]);
        let (steps, _) = walk(Wish::Bypass, inside);
        assert_eq!(steps, [Retract, Release, Drain, Withdraw, Remove, Note]);
    }

    #[test]
    fn settings_of_a_pod_in_the_mesh_change_without_taking_it_out() {
        use Step::*;
        let (_, inside) = walk(Wish::Enrolled, Standing::default());
        let changed = Standing { prepared: false, shaped: false, ..inside };
        let (steps, end) = walk(Wish::Enrolled, changed);
        assert_eq!((steps, end), (vec![Prepare, Capture], inside));
        // Half-way it may well be captured: it has to be released all the same.
        let (steps, _) = walk(Wish::Bypass, changed);
        assert_eq!(steps, [Retract, Release, Drain, Withdraw, Note]);
    }

    #[test]
    fn peers_stop_speaking_hbone_to_a_pod_whose_sandbox_is_made_anew() {
        use Step::*;
        let lost =
            Standing { published: true, mentioned: true, stale: true, ..Standing::default() };
        let (steps, _) = walk(Wish::Enrolled, lost);
        assert_eq!(steps, [Retract, Prepare, Serve, Capture, Publish]);
    }

    #[test]
    fn pod_that_istio_cni_redirects_is_taken_over_when_all_of_ours_is_in_place() {
        use Step::*;
        let foreign = Standing {
            published: true,
            mentioned: true,
            stale: true,
            foreign: true,
            ..Standing::default()
        };
        let (steps, inside) = walk(Wish::Enrolled, foreign);
        assert_eq!(steps, [Prepare, Serve, Capture, Displace]);
        assert!(inside.published);
        let (steps, _) = walk(Wish::Bypass, Standing { offered: true, ..foreign });
        assert_eq!(steps, [Prepare, Retract, Displace, Drain, Withdraw, Remove, Note]);
    }

    #[test]
    fn from_wherever_it_was_interrupted_a_pod_gets_to_where_it_should_be() {
        for s in every_standing() {
            let (_, end) = walk(Wish::Enrolled, s);
            assert!(
                end.prepared
                    && end.served
                    && end.captured
                    && end.shaped
                    && end.published
                    && !end.foreign,
                "{s:?}"
            );
            let (_, end) = walk(Wish::Bypass, s);
            assert_eq!(end, Standing { noted: true, served: end.served, ..Standing::default() });
        }
    }

    #[test]
    fn nothing_is_newly_redirected_to_a_proxy_that_does_not_listen() {
        for s in every_standing() {
            if next(Wish::Enrolled, &s) == Some(Step::Capture) {
                assert!(s.served, "{s:?}");
            }
        }
    }

    #[test]
    fn the_proxy_loses_a_pod_only_when_nothing_is_redirected_to_it() {
        for s in every_standing() {
            match next(Wish::Bypass, &s) {
                Some(Step::Withdraw) => {
                    assert!(!s.captured && !s.redirected && !s.foreign, "{s:?}");
                }
                Some(Step::Remove) => assert!(!s.offered && !s.captured && !s.foreign, "{s:?}"),
                _ => {}
            }
        }
    }
}
