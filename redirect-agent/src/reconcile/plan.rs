//! What to do next for a pod: a pure comparison of the desired state with the observed one.

/// The desired state of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// In the mesh.
    Enrolled,
    /// Not in the mesh.
    Bypass,
}

/// The observed state of a pod. All false: nothing was ever done to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// Something of ours may be in its namespace.
    pub(super) present: bool,
    /// Everything is in place there, except what redirects.
    pub(super) prepared: bool,
    /// The proxy may know the pod.
    pub(super) offered: bool,
    /// The proxy listens in it.
    pub(super) served: bool,
    /// Some of its new connections may be redirected.
    pub(super) captured: bool,
    /// New connections are redirected exactly as its settings say.
    pub(super) shaped: bool,
    /// Some of its connections may be redirected.
    pub(super) redirected: bool,
    /// The annotation tells its peers to use HBONE.
    pub(super) published: bool,
    /// It may have an annotation.
    pub(super) mentioned: bool,
    /// The annotation tells its peers to use HBONE although nothing redirects the pod, because its sandbox
    /// was recreated.
    pub(super) stale: bool,
    /// The map `pods` says why it bypasses.
    pub(super) noted: bool,
}

/// One thing to do for a pod; each is idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Set everything up, without redirecting.
    Prepare,
    /// Hand the pod to the proxy, and wait until the proxy listens.
    Serve,
    /// Redirect new connections as the settings say.
    Capture,
    /// Tell its peers to use HBONE.
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

impl Step {
    /// Applies to `s` what this step changes when it succeeds.
    fn done(self, s: &mut Standing) {
        match self {
            Step::Prepare => (s.present, s.prepared, s.noted) = (true, true, false),
            Step::Serve => (s.served, s.offered) = (true, true),
            Step::Capture => (s.captured, s.shaped, s.redirected) = (true, true, true),
            Step::Publish => (s.published, s.mentioned) = (true, true),
            Step::Retract => (s.published, s.mentioned, s.stale) = (false, false, false),
            Step::Release => (s.captured, s.shaped) = (false, false),
            Step::Drain => s.redirected = false,
            Step::Withdraw => (s.served, s.offered) = (false, false),
            Step::Remove => (s.present, s.prepared) = (false, false),
            Step::Note => s.noted = true,
        }
    }
}

/// What to do, in an order that misdirects no connection; empty when the pod is in its desired state.
///
/// Into the mesh: nothing is redirected before the proxy listens, and peers use HBONE only once it is
/// answered. Out of the mesh, the reverse. The proxy closes a pod's connections when it loses the pod, so it
/// loses the pod only after they have ended or their time is up.
pub(super) fn steps(wish: Wish, standing: &Standing) -> Vec<Step> {
    let mut standing = *standing;
    std::iter::from_fn(|| {
        let step = next(wish, &standing)?;
        step.done(&mut standing);
        Some(step)
    })
    .collect()
}

fn next(wish: Wish, s: &Standing) -> Option<Step> {
    match wish {
        Wish::Enrolled if s.stale => Some(Step::Retract),
        Wish::Enrolled if !s.prepared => Some(Step::Prepare),
        Wish::Enrolled if !s.served || !s.offered => Some(Step::Serve),
        Wish::Enrolled if !s.captured || !s.shaped => Some(Step::Capture),
        Wish::Enrolled if !s.published => Some(Step::Publish),
        Wish::Enrolled => None,
        Wish::Bypass if s.mentioned => Some(Step::Retract),
        Wish::Bypass if s.captured => Some(Step::Release),
        Wish::Bypass if s.redirected => Some(Step::Drain),
        Wish::Bypass if s.offered => Some(Step::Withdraw),
        Wish::Bypass if s.present => Some(Step::Remove),
        Wish::Bypass if !s.noted => Some(Step::Note),
        Wish::Bypass => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Step::*, *};

    /// The steps, and the pod's state after them.
    fn walk(wish: Wish, mut s: Standing) -> (Vec<Step>, Standing) {
        let steps: Vec<Step> =
            std::iter::from_fn(|| next(wish, &s).inspect(|step| step.done(&mut s)))
                .take(12)
                .collect();
        assert!(steps.len() < 12, "{wish:?} does not settle: {steps:?}");
        (steps, s)
    }

    fn every_standing() -> impl Iterator<Item = Standing> {
        (0..=2047u16).map(|bits| {
            let bit = |n: u8| bits & (1 << n) != 0;
            Standing {
                present: bit(0),
                prepared: bit(0) && bit(1),
                offered: bit(2),
                served: bit(3),
                captured: bit(4),
                shaped: bit(4) && bit(5),
                redirected: bit(6),
                published: bit(7),
                mentioned: bit(7) || bit(8),
                stale: bit(7) && !bit(4) && bit(9),
                noted: bit(10),
            }
        })
    }

    #[test]
    fn a_new_pod_goes_in_and_out_in_the_documented_order() {
        let (into, inside) = walk(Wish::Enrolled, Standing::default());
        assert_eq!(into, [Prepare, Serve, Capture, Publish]);
        assert_eq!(steps(Wish::Enrolled, &Standing::default()), into);
        let (out, _) = walk(Wish::Bypass, inside);
        assert_eq!(out, [Retract, Release, Drain, Withdraw, Remove, Note]);
        assert_eq!(steps(Wish::Bypass, &inside), out);
    }

    #[test]
    fn settings_of_a_pod_in_the_mesh_change_without_taking_it_out() {
        let (_, inside) = walk(Wish::Enrolled, Standing::default());
        let changed = Standing { prepared: false, shaped: false, ..inside };
        let (into, end) = walk(Wish::Enrolled, changed);
        assert_eq!((into, end), (vec![Prepare, Capture], inside));
        // Wherever the pod stands, everything has to be removed.
        let (out, _) = walk(Wish::Bypass, changed);
        assert_eq!(out, [Retract, Release, Drain, Withdraw, Remove, Note]);
    }

    #[test]
    fn peers_stop_speaking_hbone_to_a_pod_whose_sandbox_is_made_anew() {
        let lost =
            Standing { published: true, mentioned: true, stale: true, ..Standing::default() };
        let (into, _) = walk(Wish::Enrolled, lost);
        assert_eq!(into, [Retract, Prepare, Serve, Capture, Publish]);
    }

    #[test]
    fn from_wherever_it_was_interrupted_a_pod_gets_to_where_it_should_be() {
        for s in every_standing() {
            let (_, end) = walk(Wish::Enrolled, s);
            assert!(
                end.prepared && end.served && end.captured && end.shaped && end.published,
                "{s:?}"
            );
            let (_, end) = walk(Wish::Bypass, s);
            let served = end.served;
            assert_eq!(end, Standing { noted: true, served, ..Standing::default() }, "{s:?}");
        }
    }

    #[test]
    fn nothing_is_newly_redirected_to_a_proxy_that_does_not_listen() {
        for s in every_standing() {
            if next(Wish::Enrolled, &s) == Some(Capture) {
                assert!(s.served, "{s:?}");
            }
        }
    }

    #[test]
    fn the_proxy_loses_a_pod_only_when_nothing_is_redirected_to_it() {
        for s in every_standing() {
            match next(Wish::Bypass, &s) {
                Some(Withdraw) => assert!(!s.captured && !s.redirected, "{s:?}"),
                Some(Remove) => assert!(!s.offered && !s.captured, "{s:?}"),
                _ => {}
            }
        }
    }
}
