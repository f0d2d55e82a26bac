//! The benchmark behind `make bench`: the same two hosts through the kernel's forwarding, through an nftables DNAT, and
//! through the lane, side by side.
//!
//! | file | holds |
//! |---|---|
//! | [`conntrack`] | room for the kernel's own connections |
//! | [`memory`] | what flows cost in memory |
//! | [`paths`] | the network, and the ways through it |
//! | [`flood`] | a flood of SYNs beside established connections |
//! | [`measure`] | sender and receiver |
//! | [`program`] | what the program in the kernel costs a packet, without a network |
//! | [`report`] | results as JSON and as a page |
//! | [`wire`] | packets per second from a generator in the kernel |

pub mod conntrack;
pub mod flood;
pub mod measure;
pub mod memory;
pub mod paths;
pub mod program;
pub mod report;
pub mod wire;
