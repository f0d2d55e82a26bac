//! What nodes say to each other. All of it comes sealed, so only who has the cluster's key can send it; a node of another version
//! or with a fault has it.

use std::sync::OnceLock;

use komainu_cluster::flowsync::{Data, MAX_LEN, Report};
use komainu_cluster::pulse::Beat;
use komainu_cluster::seal::{Key, Kind, ReplayGuard, Sealer};

/// Beats: whatever is understood can be said again, and then means the same.
pub fn beat(data: &[u8]) {
    let Ok(beat) = Beat::decode(data) else { return };
    let (said, kept) = beat.encode();
    assert!(kept <= beat.observations.len());
    let again = Beat::decode(&said).expect("what was understood can be said again");
    assert_eq!(again.encode().0, said);
}

/// The exchange of flows.
pub fn flows(data: &[u8]) {
    if let Ok(report) = Report::decode(data) {
        assert_eq!(Report::decode(&report.encode()).as_ref(), Ok(&report));
    }
    if let Ok(data_) = Data::decode(data) {
        // No change takes less than a byte, so nobody makes us allocate more than was sent.
        assert!(data_.changes.len() <= data.len());
        assert!(data.len() > MAX_LEN || data_.begins.as_ref().is_none_or(|b| b.len() <= MAX_LEN));
    }
}

/// Seals: nothing that wasn't sealed with the key opens, whatever becomes of a datagram that was.
pub fn sealed(data: &[u8]) {
    static SEALER: OnceLock<Sealer> = OnceLock::new();
    let sealer = SEALER.get_or_init(|| Sealer::new(&Key::from_bytes([7; 32])).expect("randomness"));
    let _ = sealer.peek(data);
    assert!(sealer.open(Kind::Beat, b"to", data).is_err(), "opened by chance");
    let mut honest = sealer.seal(Kind::Beat, b"to", data);
    let opened = sealer.open(Kind::Beat, b"to", &honest).expect("sealed a moment ago");
    assert_eq!(opened.plain, data);
    let mut guard = ReplayGuard::default();
    guard.accept(&opened).expect("the first time");
    guard.accept(&opened).expect_err("the second time");
    assert!(sealer.open(Kind::Beat, b"other", &honest).is_err(), "opened by whom it was not for");
    let Some((at, flip)) = data.first_chunk::<2>().map(|[at, flip]| (usize::from(*at) % honest.len(), *flip))
    else {
        return;
    };
    honest[at] ^= flip;
    assert_eq!(sealer.open(Kind::Beat, b"to", &honest).is_ok(), flip == 0);
}
