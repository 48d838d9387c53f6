//! A pod's device: a veth pair with one end in the pod's network namespace.
//!
//! Inside, the pod has its addresses alone (`/32`, `/128`), and a default route by a gateway that exists nowhere: its
//! link address is given as a permanent neighbour and is that of the host's side. So nobody ever asks (ARP, neighbour
//! discovery) and nobody waits (duplicate address detection): the addresses are known to be ours.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

use dataplane_common::abi::MacAddr;
use ipnet::IpNet;
use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::AddressHeaderFlags,
        link::{InfoData, InfoVeth},
        route::{RouteAttribute, RouteFlags, RouteMessage, RouteScope},
    },
};
use tokio::{runtime::Handle, sync::oneshot};

use super::{
    KernelRoute, Link, Neighbour, Netlink, NetlinkError, Rate, SysctlError, link::HOST_MAC, route, sysctl,
};

/// Next hop of a pod's IPv4 default route (RFC 3927 link-local; the address of no device).
pub const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// Next hop of a pod's IPv6 default route.
pub const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// Why a pod's network namespace cannot be worked in.
#[derive(Debug, thiserror::Error)]
pub enum PodNetnsError {
    #[error("network namespace {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is not a network namespace")]
    NotNamespace { path: PathBuf },
    #[error("network namespace {path} is the node's own")]
    Host { path: PathBuf },
    #[error("enter network namespace {path}: {source}")]
    Enter { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

/// A pod's network namespace. It lives at least as long as this.
#[derive(Debug)]
pub struct PodNetns {
    path: PathBuf,
    file: File,
}

/// A pod's device, both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Name of the host's side.
    pub host: String,
    /// Name inside the pod.
    pub inside: String,
    /// Link address inside the pod.
    pub mac: MacAddr,
    pub mtu: u32,
    /// At most one per family.
    pub addresses: Vec<IpAddr>,
    /// How fast packets may go to the pod.
    pub ingress: Option<Rate>,
    /// And from it. The limit is in the pod's namespace: one that may change its own network is not held by it.
    pub egress: Option<Rate>,
}

/// The next hop of pods in the family of `address`.
pub const fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => GATEWAY_V4,
        IpAddr::V6(_) => GATEWAY_V6,
    }
}

impl PodNetns {
    /// Opens the file of a namespace.
    pub fn open(path: &Path) -> Result<Self, PodNetnsError> {
        let failed = |source| PodNetnsError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        // /proc and bind mounts lead to it; a file in its place is what is left of a namespace that was unmounted
        if fstatfs(&file).map_err(|errno| failed(errno.into()))?.filesystem_type() != NSFS_MAGIC {
            return Err(PodNetnsError::NotNamespace { path: path.to_owned() });
        }
        let identity = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let own = File::open("/proc/thread-self/ns/net").map_err(failed)?;
        if identity(&file).map_err(failed)? == identity(&own).map_err(failed)? {
            return Err(PodNetnsError::Host { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), file })
    }

    /// Runs `work` in the namespace.
    ///
    /// Done by a thread that ends with it: a thread that has entered a namespace is of no use to anybody else. Sockets
    /// that are opened there stay there, wherever they are used from.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PodNetnsError> {
        let failed = |source| PodNetnsError::Enter { path: self.path.clone(), source };
        let file = self.file.try_clone().map_err(failed)?;
        let runtime = Handle::current();
        let (result, entered) = oneshot::channel();
        let path = self.path.clone();
        let work = move || {
            let _context = runtime.enter();
            let done = setns(&file, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| PodNetnsError::Enter { path, source: errno.into() })
                .map(|()| work());
            // whoever asked may have left: nothing to do about it
            let _asker = result.send(done);
        };
        thread::Builder::new().name("pod-netns".to_owned()).spawn(work).map_err(failed)?;
        entered.await.map_err(|_panicked| failed(io::Error::other("the thread died")))?
    }

    /// Runs `first` in the namespace, and opens a netlink socket there.
    async fn enter(
        &self,
        first: impl FnOnce() -> Result<(), SysctlError> + Send + 'static,
    ) -> Result<Netlink, PodNetnsError> {
        self.run(|| {
            first()?;
            Ok(Netlink::connect()?)
        })
        .await?
    }
}

/// Switches of a device inside a pod, before it comes up.
fn prepare_inside(link: &PodLink) -> Result<(), SysctlError> {
    if link.addresses.iter().any(IpAddr::is_ipv6) {
        // a runtime may have switched IPv6 off for all devices to come
        sysctl::set(&format!("net/ipv6/conf/{}/disable_ipv6", link.inside), "0")?;
    }
    sysctl::prepare_device(&link.inside)?;
    Ok(())
}

impl Netlink {
    /// Makes the pair, and all that is inside the pod. Nothing of it exists yet. Returns the host's side, which is up.
    ///
    /// The host's own routes are left to [`Self::route_to_pod`]. What is made stays if a later step fails.
    pub async fn add_pod_link(&self, netns: &PodNetns, link: &PodLink) -> Result<Link, PodNetnsError> {
        self.make_pair(netns, link).await?;
        sysctl::prepare_device(&link.host)?;
        let host = self.existing(&link.host).await?;
        if let Some(rate) = link.ingress {
            self.shape(&link.host, host.ifindex, rate).await?;
        }
        self.set_up(&host).await?;
        let prepared = link.clone();
        let inside = netns.enter(move || prepare_inside(&prepared)).await?;
        inside.dress(link).await?;
        Ok(Link { up: true, ..host })
    }

    /// Makes the host's stack send to a pod's addresses, from `sources` (at most one per family).
    pub async fn route_to_pod(
        &self,
        ifindex: u32,
        link: &PodLink,
        sources: &[IpAddr],
    ) -> Result<(), NetlinkError> {
        for address in &link.addresses {
            self.ensure_neighbour(&Neighbour { ifindex, address: *address, mac: link.mac }).await?;
            self.ensure_route(&KernelRoute::to_pod(*address, ifindex, sources)).await?;
        }
        Ok(())
    }

    /// What is not as [`Self::add_pod_link`] and [`Self::route_to_pod`] leave it, as sentences.
    pub async fn pod_link_problems(
        &self,
        netns: &PodNetns,
        link: &PodLink,
    ) -> Result<Vec<String>, PodNetnsError> {
        let mut problems = Vec::new();
        let Some(host) = self.link(&link.host).await? else {
            return Ok(vec![format!("device {} is gone", link.host)]);
        };
        if !host.is_pod_device() {
            problems.push(format!("device {} has another kind or link address", link.host));
        }
        if !host.up {
            problems.push(format!("device {} is down", link.host));
        }
        let routes = self.our_routes().await?;
        for address in &link.addresses {
            let is_to = |route: &&KernelRoute| route.destination == IpNet::from(*address);
            if routes.iter().find(is_to).is_none_or(|route| route.ifindex != host.ifindex) {
                problems.push(format!("the node has no route to {address} on {}", link.host));
            }
        }
        let neighbours = self.permanent_neighbours(host.ifindex).await?;
        problems.extend(missing_neighbours(
            &neighbours,
            link.addresses.iter().copied(),
            link.mac,
            &link.host,
        ));
        let inside = netns.enter(|| Ok(())).await?;
        problems.extend(inside.problems_inside(link).await?);
        Ok(problems)
    }

    async fn make_pair(&self, netns: &PodNetns, link: &PodLink) -> Result<(), NetlinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(link.inside.clone())
            .mtu(link.mtu)
            .address(link.mac.bytes().to_vec())
            // made there, not moved there: no moment in which the node has a device of that name
            .setns_by_fd(netns.file.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(&link.host, &link.inside)
            .mtu(link.mtu)
            .address(HOST_MAC.bytes().to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
        self.add_link(&format!("{} (in the pod: {})", link.host, link.inside), pair).await
    }

    /// Addresses, routes and neighbours, inside the pod.
    async fn dress(&self, link: &PodLink) -> Result<(), NetlinkError> {
        let inside = self.existing(&link.inside).await?;
        for address in &link.addresses {
            self.add_pod_address(inside.ifindex, *address).await?;
        }
        if let Some(rate) = link.egress {
            self.shape(&link.inside, inside.ifindex, rate).await?;
        }
        // neighbours and routes need a device that is up
        self.set_up(&inside).await?;
        for address in &link.addresses {
            let gateway = gateway(*address);
            self.ensure_neighbour(&Neighbour { ifindex: inside.ifindex, address: gateway, mac: HOST_MAC })
                .await?;
            for route in [to_gateway(gateway, inside.ifindex), by_gateway(gateway, inside.ifindex)] {
                self.add_pod_route(route, &link.inside).await?;
            }
        }
        Ok(())
    }

    async fn add_pod_address(&self, ifindex: u32, address: IpAddr) -> Result<(), NetlinkError> {
        let prefix = IpNet::from(address).prefix_len();
        let mut request = self.handle.address().add(ifindex, address, prefix).replace();
        if address.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(|error| NetlinkError::new("add address", address, &error))
    }

    /// A route that is there already is somebody's who came first: a pod may have other networks.
    async fn add_pod_route(&self, route: RouteMessage, device: &str) -> Result<(), NetlinkError> {
        let name = route::read(&route).map_or_else(String::new, |route| route.to_string());
        match self.handle.route().add(route).execute().await {
            Ok(()) => Ok(()),
            Err(error) => {
                match NetlinkError::new("add route", format!("{name} ({device} in the pod)"), &error) {
                    error if error.errno() == Some(nix::libc::EEXIST) => Ok(()),
                    error => Err(error),
                }
            }
        }
    }

    async fn problems_inside(&self, link: &PodLink) -> Result<Vec<String>, NetlinkError> {
        let name = &link.inside;
        let Some(inside) = self.link(name).await? else {
            return Ok(vec![format!("the pod has no device {name}")]);
        };
        let mut problems = Vec::new();
        if inside.mac != Some(link.mac) {
            problems
                .push(format!("{name} in the pod is another device: its link address is not {}", link.mac));
        }
        if !inside.up {
            problems.push(format!("{name} in the pod is down"));
        }
        let addresses = self.addresses().await?;
        for address in &link.addresses {
            if !addresses.iter().any(|found| found.ifindex == inside.ifindex && found.ip() == *address) {
                problems.push(format!("{name} in the pod does not have {address}"));
            }
        }
        let gateways = link.addresses.iter().map(|address| gateway(*address));
        let neighbours = self.permanent_neighbours(inside.ifindex).await?;
        problems.extend(missing_neighbours(&neighbours, gateways.clone(), HOST_MAC, name));
        let routes: Vec<_> = self.route_messages().await?.iter().filter_map(route::read).collect();
        for gateway in gateways {
            // by whatever device: plugins after ours, and other networks of the pod, may have reasons of theirs
            let default = |route: &KernelRoute| {
                route.destination.prefix_len() == 0 && route.destination.addr().is_ipv4() == gateway.is_ipv4()
            };
            if !routes.iter().any(default) {
                let family = if gateway.is_ipv4() { "IPv4" } else { "IPv6" };
                problems.push(format!("the pod has no {family} default route"));
            }
        }
        Ok(problems)
    }

    async fn existing(&self, name: &str) -> Result<Link, NetlinkError> {
        self.link(name).await?.ok_or_else(|| NetlinkError::Protocol {
            operation: "find device",
            object: name.to_owned(),
            detail: "it is gone the moment it was made".to_owned(),
        })
    }
}

fn missing_neighbours(
    found: &[Neighbour],
    wanted: impl Iterator<Item = IpAddr>,
    mac: MacAddr,
    device: &str,
) -> Vec<String> {
    let has = |address: IpAddr| found.iter().any(|found| found.address == address && found.mac == mac);
    wanted
        .filter(|address| !has(*address))
        .map(|address| format!("{device} has no permanent neighbour {address}"))
        .collect()
}

/// `169.254.1.1 dev eth0 scope link`
fn to_gateway(gateway: IpAddr, ifindex: u32) -> RouteMessage {
    let mut message = pod_route(gateway, ifindex, RouteAttribute::Destination(gateway.into()));
    message.header.destination_prefix_length = IpNet::from(gateway).prefix_len();
    if gateway.is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    message
}

/// `default via 169.254.1.1 dev eth0`
fn by_gateway(gateway: IpAddr, ifindex: u32) -> RouteMessage {
    let mut message = pod_route(gateway, ifindex, RouteAttribute::Gateway(gateway.into()));
    if gateway.is_ipv4() {
        // another device of the pod may have the route to the gateway
        message.header.flags |= RouteFlags::Onlink;
    }
    message
}

fn pod_route(family: IpAddr, ifindex: u32, attribute: RouteAttribute) -> RouteMessage {
    let mut message = RouteMessageBuilder::<IpAddr>::new().output_interface(ifindex).build();
    message.header.address_family = route::family(family);
    message.attributes.push(attribute);
    message
}
