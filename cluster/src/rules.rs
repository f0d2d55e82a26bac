//! The lease rules, by name, so that a simulation can break each of them and show that it notices.

/// A rule that "never two owners" rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The leader's lease runs from the newest beat that a quorum has acknowledged.
    QuorumLease,
    /// A voter that heard a leader votes for nobody else for `E_min`.
    Promise,
    /// A voter neither votes nor campaigns for `E_min` after its start.
    StartWait,
    /// Grants never outlast the leader's lease.
    GrantWithinLease,
    /// A group moves only after its release, or when its last grant has run out.
    ReleaseFirst,
    /// A leadership transfer first drops the leader's lease, for good in that term.
    RetireFirst,
    /// A lease is activated only when the tables are installed.
    InstalledFirst,
    /// Votes leave only when they are on disk.
    PersistFirst,
    /// The voters change once a lease at most.
    OneStepALease,
    /// A resign leaves when its process is dead and its program answers for nothing any more.
    SilenceFirst,
    /// A resign is about one process, and never about the next one of that node.
    OneProcess,
    /// A dead leader binds its voters no longer only when nothing that it granted to others may be in force.
    NothingGranted,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Rule; 12] = [
        Rule::QuorumLease,
        Rule::Promise,
        Rule::StartWait,
        Rule::GrantWithinLease,
        Rule::ReleaseFirst,
        Rule::RetireFirst,
        Rule::InstalledFirst,
        Rule::PersistFirst,
        Rule::OneStepALease,
        Rule::SilenceFirst,
        Rule::OneProcess,
        Rule::NothingGranted,
    ];

    /// Whether a simulation on this thread has broken the rule. Never outside of one.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn is_broken(self) -> bool {
        BROKEN.get() == Some(self)
    }

    /// Whether a simulation on this thread has broken the rule. Never outside of one.
    #[cfg(not(any(test, feature = "sim")))]
    #[inline]
    pub(crate) const fn is_broken(self) -> bool {
        false
    }

    /// Runs `f` with this rule broken.
    #[cfg(any(test, feature = "sim"))]
    pub fn broken<T>(self, f: impl FnOnce() -> T) -> T {
        struct Mend;
        impl Drop for Mend {
            fn drop(&mut self) {
                BROKEN.set(None);
            }
        }
        BROKEN.set(Some(self));
        let _mend = Mend;
        f()
    }
}

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}
