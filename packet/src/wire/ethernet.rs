//! Ethernet II frames and VLAN tags (IEEE 802.3, IEEE 802.1Q with 802.1ad double tags).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Malformed, bytes};

/// Length of the header without tags.
pub const HEADER_LEN: usize = 14;
/// Length of a VLAN tag.
pub const TAG_LEN: usize = 4;
/// Tags that are looked behind: a service tag and a customer tag (IEEE 802.1ad).
pub const MAX_TAGS: usize = 2;

mod field {
    pub const DST: usize = 0;
    pub const SRC: usize = 6;
    pub const ETHERTYPE: usize = 12;
}

/// A MAC address in transmission order. [`show`] displays it.
pub use crate::neighbour::Mac;

/// The address of all stations.
pub const BROADCAST: Mac = [0xff; 6];

/// Whether the group bit is set (multicast, broadcast included).
pub fn is_multicast(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Whether it can be a station's own address.
pub fn is_unicast(mac: Mac) -> bool {
    !is_multicast(mac) && mac != [0; 6]
}

/// The address that packets for a multicast or the broadcast address go to (RFC 1112 §6.4, RFC 2464 §7); none for
/// others.
pub fn multicast_mac(address: IpAddr) -> Option<Mac> {
    match address {
        IpAddr::V4(a) if a == Ipv4Addr::BROADCAST => Some(BROADCAST),
        IpAddr::V4(a) if a.is_multicast() => {
            let [_, b, c, d] = a.octets();
            Some([0x01, 0x00, 0x5e, b & 0x7f, c, d])
        }
        IpAddr::V6(a) if a.is_multicast() => Some(multicast_mac_v6(a)),
        _ => None,
    }
}

pub(crate) fn multicast_mac_v6(address: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = address.octets();
    [0x33, 0x33, a, b, c, d]
}

/// Displays a MAC address as `02:00:00:00:00:01`.
pub fn show(mac: Mac) -> impl fmt::Display {
    struct Show(Mac);
    impl fmt::Display for Show {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let [a, b, c, d, e, g] = self.0;
            write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
        }
    }
    Show(mac)
}

/// An EtherType (<https://www.iana.org/assignments/ieee-802-numbers>). Values below 0x0600 are lengths of LLC frames.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: EtherType = EtherType(0x0800);
    /// ARP.
    pub const ARP: EtherType = EtherType(0x0806);
    /// IPv6.
    pub const IPV6: EtherType = EtherType(0x86dd);
    /// Customer VLAN tag (IEEE 802.1Q).
    pub const VLAN: EtherType = EtherType(0x8100);
    /// Service VLAN tag (IEEE 802.1ad).
    pub const SERVICE_VLAN: EtherType = EtherType(0x88a8);

    /// Whether a VLAN tag follows.
    pub fn is_tag(self) -> bool {
        self == EtherType::VLAN || self == EtherType::SERVICE_VLAN
    }
}

impl fmt::Debug for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            EtherType::IPV4 => f.write_str("IPv4"),
            EtherType::ARP => f.write_str("ARP"),
            EtherType::IPV6 => f.write_str("IPv6"),
            EtherType::VLAN => f.write_str("802.1Q"),
            EtherType::SERVICE_VLAN => f.write_str("802.1ad"),
            EtherType(other) => write!(f, "ethertype {other:#06x}"),
        }
    }
}

/// A VLAN tag's control information: priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tci(pub u16);

impl Tci {
    /// VLAN id, 0..=4095; 0 is a priority tag without a VLAN.
    pub fn vlan(self) -> u16 {
        self.0 & 0x0fff
    }

    /// Priority, 0..=7.
    pub fn priority(self) -> u8 {
        (self.0 >> 13) as u8
    }
}

/// The VLAN tags of a frame, outermost first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VlanTags {
    tags: [Tci; MAX_TAGS],
    count: u8,
}

impl VlanTags {
    /// The tags.
    pub fn as_slice(&self) -> &[Tci] {
        self.tags.get(..usize::from(self.count)).unwrap_or(&[])
    }

    /// VLAN ids, outermost first.
    pub fn ids(&self) -> impl Iterator<Item = u16> + '_ {
        self.as_slice().iter().map(|tag| tag.vlan())
    }

    /// Length of the tags in the frame.
    pub fn len_bytes(&self) -> usize {
        usize::from(self.count) * TAG_LEN
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn push(&mut self, tag: Tci) -> bool {
        match self.tags.get_mut(usize::from(self.count)) {
            Some(place) => {
                *place = tag;
                self.count += 1;
                true
            }
            None => false,
        }
    }
}

/// A view of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Frame<T> {
    /// A view of `buffer`.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] when the header is not whole.
    pub fn new_checked(buffer: T) -> Result<Self, Malformed> {
        if buffer.as_ref().len() < HEADER_LEN { Err(Malformed::Truncated) } else { Ok(Frame { buffer }) }
    }

    /// Destination.
    pub fn dst(&self) -> Mac {
        bytes::array(self.buffer.as_ref(), field::DST)
    }

    /// Source.
    pub fn src(&self) -> Mac {
        bytes::array(self.buffer.as_ref(), field::SRC)
    }

    /// EtherType of the header itself: a tag's when there is one.
    pub fn outer_ethertype(&self) -> EtherType {
        EtherType(bytes::u16(self.buffer.as_ref(), field::ETHERTYPE))
    }

    /// Tags, the EtherType behind them, and the offset of the payload. A third tag's EtherType is returned as it is.
    ///
    /// # Errors
    /// [`Malformed::Truncated`] when a tag is not whole.
    pub fn tags(&self) -> Result<(VlanTags, EtherType, usize), Malformed> {
        let data = self.buffer.as_ref();
        let mut tags = VlanTags::default();
        let mut ethertype = self.outer_ethertype();
        let mut payload = HEADER_LEN;
        while ethertype.is_tag() {
            if data.len() < payload + TAG_LEN {
                return Err(Malformed::Truncated);
            }
            if !tags.push(Tci(bytes::u16(data, payload))) {
                break;
            }
            ethertype = EtherType(bytes::u16(data, payload + 2));
            payload += TAG_LEN;
        }
        Ok((tags, ethertype, payload))
    }

    /// What follows the untagged header.
    pub fn payload(&self) -> &[u8] {
        bytes::range(self.buffer.as_ref(), HEADER_LEN, usize::MAX)
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Frame<T> {
    /// Sets the destination.
    pub fn set_dst(&mut self, mac: Mac) {
        bytes::put(self.buffer.as_mut(), field::DST, mac);
    }

    /// Sets the source.
    pub fn set_src(&mut self, mac: Mac) {
        bytes::put(self.buffer.as_mut(), field::SRC, mac);
    }

    /// Sets the EtherType of the header itself.
    pub fn set_outer_ethertype(&mut self, ethertype: EtherType) {
        bytes::put_u16(self.buffer.as_mut(), field::ETHERTYPE, ethertype.0);
    }

    /// What follows the untagged header.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        bytes::range_mut(self.buffer.as_mut(), HEADER_LEN, usize::MAX)
    }
}

/// Writes a header without tags at the start of `buffer`, which must hold [`HEADER_LEN`] bytes (else nothing is
/// written).
pub fn emit(buffer: &mut [u8], dst: Mac, src: Mac, ethertype: EtherType) {
    if let Ok(mut frame) = Frame::new_checked(buffer) {
        frame.set_dst(dst);
        frame.set_src(src);
        frame.set_outer_ethertype(ethertype);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAGGED: [u8; 24] = [
        0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x88, 0xa8, 0x20, 0x64, 0x81, 0x00, 0x00, 0xc8, 0x08, 0x00,
        0x45, 0x00,
    ];

    #[test]
    fn tags_are_read_outermost_first() {
        let frame = Frame::new_checked(&TAGGED[..]).unwrap();
        assert_eq!(frame.outer_ethertype(), EtherType::SERVICE_VLAN);
        let (tags, ethertype, payload) = frame.tags().unwrap();
        assert_eq!(tags.ids().collect::<Vec<_>>(), [100, 200]);
        assert_eq!(tags.as_slice()[0].priority(), 1);
        assert_eq!((ethertype, payload, tags.len_bytes()), (EtherType::IPV4, 22, 8));
    }

    #[test]
    fn a_third_tag_is_not_looked_behind() {
        let mut frame = TAGGED.to_vec();
        frame[20..22].copy_from_slice(&[0x81, 0x00]);
        frame.extend([0; 4]);
        let (tags, ethertype, payload) = Frame::new_checked(&frame[..]).unwrap().tags().unwrap();
        assert_eq!((tags.as_slice().len(), ethertype, payload), (2, EtherType::VLAN, 22));
    }

    #[test]
    fn short_frames_are_refused() {
        assert_eq!(Frame::new_checked(&TAGGED[..13]), Err(Malformed::Truncated));
        assert_eq!(Frame::new_checked(&TAGGED[..17]).unwrap().tags(), Err(Malformed::Truncated));
    }

    #[test]
    fn emit_writes_the_whole_header() {
        let mut buffer = [0xa5; 16];
        emit(&mut buffer, [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], EtherType::ARP);
        assert_eq!(buffer, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 8, 6, 0xa5, 0xa5]);
    }

    #[test]
    fn multicast_addresses_map() {
        let map = |a: &str| multicast_mac(a.parse().unwrap()).map(|m| show(m).to_string());
        assert_eq!(map("224.129.2.3").as_deref(), Some("01:00:5e:01:02:03"));
        assert_eq!(map("ff02::1:ff00:7").as_deref(), Some("33:33:ff:00:00:07"));
        assert_eq!(map("192.0.2.1"), None);
    }
}
