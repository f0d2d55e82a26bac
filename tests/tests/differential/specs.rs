//! Services and backends by chance, and what becomes of them.

use crate::build::{BackendSpec, ServiceSpec};
use crate::rng::Rng;

pub fn service(rng: &mut Rng, id: u8) -> ServiceSpec {
    let backends = (0..rng.weighted(&[1, 6, 6, 6, 6])).map(|_| backend(rng)).collect();
    ServiceSpec {
        id,
        second_vip: rng.one_in(3),
        v6: rng.one_in(2),
        second_port: rng.one_in(2),
        udp: rng.one_in(3),
        mode: rng.byte(),
        scheduler: rng.of(&[0, 0, 0, 1, 2, 3]),
        dead_backend: rng.byte(),
        track_udp: rng.one_in(2),
        consult_all_slots: rng.one_in(5),
        backends,
    }
}

fn backend(rng: &mut Rng) -> BackendSpec {
    let weight = rng.of(&[1, 1, 1, 2, 0]);
    BackendSpec {
        place: rng.byte(),
        second_port: rng.one_in(3),
        weight,
        base_weight: if rng.one_in(6) { rng.of(&[0, 1, 2]) } else { weight },
        alive: !rng.one_in(14),
    }
}

pub fn change(rng: &mut Rng, spec: &mut ServiceSpec) {
    for backend in &mut spec.backends {
        if rng.one_in(5) {
            backend.weight = rng.of(&[0, 1, 1, 2]);
        }
        if rng.one_in(2) {
            backend.base_weight = backend.weight;
        }
        if rng.one_in(if backend.alive { 15 } else { 2 }) {
            backend.alive = !backend.alive;
        }
    }
    if rng.one_in(4) {
        spec.backends.push(backend(rng));
    }
    if rng.one_in(5) && !spec.backends.is_empty() {
        let at = rng.below(spec.backends.len() as u64) as usize;
        spec.backends.remove(at);
    }
    if rng.one_in(8) {
        spec.consult_all_slots = !spec.consult_all_slots;
    }
    if rng.one_in(10) {
        spec.dead_backend = rng.byte();
    }
}
