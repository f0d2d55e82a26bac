//! The engine from outside: frames in, frames and counters out. Frames are built and read by etherparse, so that no mistake of
//! our own wire formats hides itself.

mod arp_nd;
mod beside;
mod choice;
mod fragments;
mod icmp;
mod kept;
mod limits;
mod modes;
mod robust;
mod share;
mod world;

use world::*;
