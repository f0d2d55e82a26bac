//! Links, addresses, routes and filters over netlink, inside a namespace.

use std::future::Future;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::pin;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio_stream::StreamExt;

use crate::error::{LabError, Result};
use crate::netns::Namespace;

/// A netlink connection of one namespace.
pub(crate) struct Netlink {
    handle: Handle,
}

/// Runs `f` with a netlink connection of `ns`.
pub(crate) fn with_netlink<R, F, Fut>(ns: &Namespace, f: F) -> Result<R>
where
    R: Send,
    F: FnOnce(Netlink) -> Fut + Send,
    Fut: Future<Output = Result<R>>,
{
    ns.run(|| {
        let doing = || format!("open netlink in {}", ns.name());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(|e| LabError::system(doing(), e))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(|e| LabError::system(doing(), e))?;
            let connection = tokio::spawn(connection);
            let result = f(Netlink { handle }).await;
            connection.abort();
            result
        })
    })
}

impl Netlink {
    /// Index of a link.
    pub async fn index(&self, name: &str) -> Result<u32> {
        let mut stream = pin!(self.handle.link().get().match_name(name).execute());
        match stream.next().await {
            Some(Ok(message)) => Ok(message.header.index),
            Some(Err(e)) => Err(LabError::netlink(format!("look up link {name}"))(e)),
            None => {
                Err(LabError::Unknown { what: "link", name: name.to_owned(), known: "others".to_owned() })
            }
        }
    }

    /// A switch that forwards at once: no spanning tree, no delay, and multicast to every port as an unmanaged one does.
    pub async fn add_bridge(&self, name: &str) -> Result<u32> {
        let message = LinkBridge::new(name).forward_delay(0).mcast_snooping(false).up().build();
        let doing = format!("make switch {name}");
        self.handle.link().add(message).execute().await.map_err(LabError::netlink(doing))?;
        self.index(name).await
    }

    /// Takes a link away, and with it the other end of its cable.
    pub async fn remove_link(&self, index: u32) -> Result<()> {
        self.handle.link().del(index).execute().await.map_err(LabError::netlink("remove a link".to_owned()))
    }

    /// A cable: port `port` on the switch `bridge`, its other end named `end` in the namespace `to`. The port gets
    /// `index`, when given.
    pub async fn add_cable(
        &self,
        port: &str,
        index: Option<u32>,
        bridge: u32,
        end: &str,
        to: &Namespace,
    ) -> Result<()> {
        let doing = format!("lay cable {port}");
        let peer = format!("{port}~");
        let link = self.handle.link();
        let mut cable = LinkVeth::new(port, &peer);
        if let Some(index) = index {
            cable = cable.index(index);
        }
        link.add(cable.build()).execute().await.map_err(LabError::netlink(doing.clone()))?;
        let near = self.index(port).await?;
        let far = self.index(&peer).await?;
        let step = |message| {
            let doing = doing.clone();
            let link = self.handle.link();
            async move { link.change(message).execute().await.map_err(LabError::netlink(doing)) }
        };
        step(LinkUnspec::new_with_index(near).controller(bridge).up().build()).await?;
        step(LinkUnspec::new_with_index(far).name(end).setns_by_fd(to.as_fd().as_raw_fd()).build()).await
    }

    /// A cable between two namespaces, its ends named as told.
    pub async fn add_direct_cable(&self, name: &str, ends: [(&str, &Namespace); 2]) -> Result<()> {
        let doing = || format!("lay cable {name}");
        let names = [format!("{name}<"), format!("{name}>")];
        let link = self.handle.link();
        let pair = LinkVeth::new(&names[0], &names[1]).build();
        link.add(pair).execute().await.map_err(LabError::netlink(doing()))?;
        for (own, (end, to)) in names.iter().zip(ends) {
            let index = self.index(own).await?;
            let moved = LinkUnspec::new_with_index(index).name(end).setns_by_fd(to.as_fd().as_raw_fd());
            self.change(&doing(), moved.build()).await?;
        }
        Ok(())
    }

    /// Sets MAC address (only while the link is down) and MTU.
    pub async fn configure(&self, index: u32, mac: [u8; 6], mtu: Option<u32>) -> Result<()> {
        let mut message = LinkUnspec::new_with_index(index).address(mac.to_vec());
        if let Some(mtu) = mtu {
            message = message.mtu(mtu);
        }
        self.change("configure a link", message.build()).await
    }

    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<()> {
        self.change("set an MTU", LinkUnspec::new_with_index(index).mtu(mtu).build()).await
    }

    pub async fn set_up(&self, index: u32, up: bool) -> Result<()> {
        let message = LinkUnspec::new_with_index(index);
        let message = if up { message.up() } else { message.down() };
        self.change("set a link up or down", message.build()).await
    }

    async fn change(&self, doing: &str, message: netlink_packet_route::link::LinkMessage) -> Result<()> {
        self.handle.link().change(message).execute().await.map_err(LabError::netlink(doing))
    }

    /// An address that is usable at once: IPv6 without duplicate address detection.
    pub async fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let mut request = self.handle.address().add(index, address, prefix);
        if address.is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request.execute().await.map_err(LabError::netlink(format!("add address {address}/{prefix}")))
    }

    pub async fn remove_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<()> {
        let message = self.handle.address().add(index, address, prefix).message_mut().clone();
        self.handle
            .address()
            .del(message)
            .execute()
            .await
            .map_err(LabError::netlink(format!("remove address {address}/{prefix}")))
    }

    /// A route to `to`/`prefix`; `0.0.0.0/0` and `::/0` are the default routes.
    pub async fn add_route(&self, to: IpAddr, prefix: u8, via: IpAddr) -> Result<()> {
        self.handle
            .route()
            .add(route(to, prefix, via)?)
            .execute()
            .await
            .map_err(LabError::netlink(format!("add route {to}/{prefix} via {via}")))
    }

    pub async fn remove_route(&self, to: IpAddr, prefix: u8, via: IpAddr) -> Result<()> {
        self.handle
            .route()
            .del(route(to, prefix, via)?)
            .execute()
            .await
            .map_err(LabError::netlink(format!("remove route {to}/{prefix} via {via}")))
    }

    /// A neighbour entry that the kernel neither doubts nor changes.
    pub async fn set_neighbour(&self, index: u32, address: IpAddr, mac: [u8; 6]) -> Result<()> {
        self.handle
            .neighbours()
            .add(index, address)
            .link_layer_address(&mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(LabError::netlink(format!("set neighbour {address}")))
    }

    /// Puts `program` on the way out of a port, in place of what was there; without a program the port is free again.
    pub async fn set_egress_filter(&mut self, index: u32, program: Option<OwnedFd>) -> Result<()> {
        let mut qdisc = TcMessage::with_index(index as i32);
        qdisc.header.parent = TcHandle::CLSACT;
        qdisc.header.handle = TcHandle { major: 0xffff, minor: 0 };
        qdisc.attributes.push(TcAttribute::Kind("clsact".to_owned()));
        // Deleting the hook deletes its filters; when there is none the kernel says so, and that is as well.
        let _ = self.ask(RouteNetlinkMessage::DelQueueDiscipline(qdisc.clone()), 0, "clear a port").await;
        let Some(program) = program else { return Ok(()) };

        let create = NLM_F_CREATE | NLM_F_EXCL;
        self.ask(RouteNetlinkMessage::NewQueueDiscipline(qdisc), create, "add a filter hook").await?;
        let mut filter = TcMessage::with_index(index as i32);
        filter.header.parent = TcHandle { major: 0xffff, minor: TcHandle::MIN_EGRESS };
        // Priority 1, protocol ETH_P_ALL in network byte order.
        filter.header.info = (1 << 16) | u32::from((libc::ETH_P_ALL as u16).to_be());
        filter.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(vec![
                TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
                TcOption::Bpf(TcFilterBpfOption::ProgName("cut".to_owned())),
                TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
            ]),
        ];
        self.ask(RouteNetlinkMessage::NewTrafficFilter(filter), create, "add a filter").await
    }

    async fn ask(&mut self, message: RouteNetlinkMessage, flags: u16, doing: &str) -> Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self
            .handle
            .request(request)
            .map_err(|e| LabError::Netlink { doing: doing.to_owned(), source: e })?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(e) = answer.payload
                && e.code.is_some()
            {
                return Err(LabError::netlink(doing)(rtnetlink::Error::NetlinkError(e)));
            }
        }
        Ok(())
    }
}

fn route(to: IpAddr, prefix: u8, via: IpAddr) -> Result<RouteMessage> {
    match (to, via) {
        (IpAddr::V4(to), IpAddr::V4(via)) => Ok(RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(to, prefix)
            .gateway(via)
            .build()),
        (IpAddr::V6(to), IpAddr::V6(via)) => Ok(RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(to, prefix)
            .gateway(via)
            .build()),
        _ => Err(LabError::Topology(format!("route to {to} via {via}: two address families"))),
    }
}

/// Writes a kernel setting under `/proc/sys/net` as `ns` sees it, e.g. `ipv4/ip_forward`.
pub(crate) fn write_sysctl(ns: &Namespace, key: &str, value: &str) -> Result<()> {
    // /proc/sys/net shows the namespace of the thread that looks.
    ns.run(|| write_sysctl_here(key, value))
}

pub(crate) fn write_sysctl_here(key: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/{key}");
    std::fs::write(&path, value).map_err(|e| LabError::system(format!("write {value} to {path}"), e))
}
