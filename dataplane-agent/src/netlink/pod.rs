//! A pod's device: a veth pair with one end in the pod's network namespace.
//!
//! In the pod, each address has a host prefix (`/32`, `/128`), and the default route goes to a
//! virtual gateway, whose permanent neighbour entry has the MAC address of the host side. So there
//! is no ARP, no neighbour discovery, and no duplicate address detection.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    thread,
};

use dataplane_common::{abi::MacAddr, net};
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

/// Next hop of a pod's IPv4 default route; the datapath answers ARP requests for it.
pub const GATEWAY_V4: IpAddr = IpAddr::V4(net::GATEWAY_V4);
/// Next hop of a pod's IPv6 default route; the datapath answers neighbour solicitations for it.
pub const GATEWAY_V6: IpAddr = IpAddr::V6(net::GATEWAY_V6);

/// Why an operation in a pod's network namespace failed.
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

/// An open network namespace of a pod. It exists at least as long as this value.
#[derive(Debug)]
pub struct PodNetns {
    path: PathBuf,
    file: File,
}

/// Settings of a pod's veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Name of the host side.
    pub host_device: String,
    /// Name in the pod.
    pub ifname: String,
    /// MAC address in the pod.
    pub mac: MacAddr,
    pub mtu: u32,
    /// At most one per family.
    pub addresses: Vec<IpAddr>,
    /// Rate limit of packets to the pod.
    pub ingress: Option<Rate>,
    /// Rate limit of packets from the pod. It is set in the pod's namespace: a pod with `NET_ADMIN`
    /// can remove it.
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
    /// Opens a namespace by its path. Refuses the node's own.
    pub fn open(path: &Path) -> Result<Self, PodNetnsError> {
        let failed = |source| PodNetnsError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        // a regular file is left where a namespace was bind-mounted and is unmounted now
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

    /// Runs `work` in the namespace, on a thread of its own that ends afterwards.
    ///
    /// Sockets that `work` opens stay in the namespace, on whatever thread they are used later.
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
            // the receiver may be cancelled
            let _cancelled = result.send(done);
        };
        thread::Builder::new().name("pod-netns".to_owned()).spawn(work).map_err(failed)?;
        entered.await.map_err(|_panicked| failed(io::Error::other("the thread panicked")))?
    }

    /// Runs `prepare` in the namespace, and opens a netlink socket there.
    async fn connect(
        &self,
        prepare: impl FnOnce() -> Result<(), SysctlError> + Send + 'static,
    ) -> Result<Netlink, PodNetnsError> {
        self.run(|| {
            prepare()?;
            Ok(Netlink::connect()?)
        })
        .await?
    }
}

/// Sets the sysctls of a device in the pod, before it is up.
fn prepare_pod_device(link: &PodLink) -> Result<(), SysctlError> {
    if link.addresses.iter().any(IpAddr::is_ipv6) {
        // the runtime may have disabled IPv6 by default
        sysctl::set(&format!("net/ipv6/conf/{}/disable_ipv6", link.ifname), "0")?;
    }
    sysctl::prepare_device(&link.ifname)?;
    Ok(())
}

impl Netlink {
    /// Creates the veth pair and configures its end in the pod. Returns the host side, which is up.
    ///
    /// Does not add the host's routes: see [`Self::route_to_pod`]. Does not clean up if a step
    /// fails.
    pub async fn add_pod_link(&self, netns: &PodNetns, link: &PodLink) -> Result<Link, PodNetnsError> {
        self.create_veth(netns, link).await?;
        sysctl::prepare_device(&link.host_device)?;
        let host = self.created_link(&link.host_device).await?;
        if let Some(rate) = link.ingress {
            self.shape(&link.host_device, host.ifindex, rate).await?;
        }
        self.set_up(&host).await?;
        let prepared = link.clone();
        let pod_netlink = netns.connect(move || prepare_pod_device(&prepared)).await?;
        pod_netlink.configure_pod_device(link).await?;
        Ok(Link { up: true, ..host })
    }

    /// Adds the host's routes and neighbours for a pod's addresses, with preferred source addresses
    /// `sources` (at most one per family).
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

    /// Differences from what [`Self::add_pod_link`] and [`Self::route_to_pod`] created, as
    /// sentences.
    pub async fn pod_link_problems(
        &self,
        netns: &PodNetns,
        link: &PodLink,
    ) -> Result<Vec<String>, PodNetnsError> {
        let mut problems = Vec::new();
        let name = &link.host_device;
        let Some(host) = self.link(name).await? else {
            return Ok(vec![format!("device {name} does not exist")]);
        };
        if !host.is_pod_device() {
            problems.push(format!("device {name} is not a veth, or its MAC address was changed"));
        }
        if !host.up {
            problems.push(format!("device {name} is down"));
        }
        let routes = self.agent_routes().await?;
        for address in &link.addresses {
            let is_to = |route: &&KernelRoute| route.destination == IpNet::from(*address);
            if routes.iter().find(is_to).is_none_or(|route| route.ifindex != host.ifindex) {
                problems.push(format!("the node has no route to {address} on {name}"));
            }
        }
        let neighbours = self.permanent_neighbours(host.ifindex).await?;
        problems.extend(missing_neighbours(&neighbours, link.addresses.iter().copied(), link.mac, name));
        let pod_netlink = netns.connect(|| Ok(())).await?;
        problems.extend(pod_netlink.pod_device_problems(link).await?);
        Ok(problems)
    }

    async fn create_veth(&self, netns: &PodNetns, link: &PodLink) -> Result<(), NetlinkError> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(link.ifname.clone())
            .mtu(link.mtu)
            .address(link.mac.bytes().to_vec())
            // created in the namespace, not moved there, so that the node never has a device of
            // that name
            .setns_by_fd(netns.file.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new(&link.host_device, &link.ifname)
            .mtu(link.mtu)
            .address(HOST_MAC.bytes().to_vec())
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)));
        self.add_link(&format!("{} (in the pod: {})", link.host_device, link.ifname), pair).await
    }

    /// Adds addresses, routes and neighbours in the pod. `self` is connected to the pod's
    /// namespace.
    async fn configure_pod_device(&self, link: &PodLink) -> Result<(), NetlinkError> {
        let device = self.created_link(&link.ifname).await?;
        for address in &link.addresses {
            self.add_pod_address(device.ifindex, *address).await?;
        }
        if let Some(rate) = link.egress {
            self.shape(&link.ifname, device.ifindex, rate).await?;
        }
        // neighbours and routes need a device that is up
        self.set_up(&device).await?;
        for address in &link.addresses {
            let gateway = gateway(*address);
            self.ensure_neighbour(&Neighbour { ifindex: device.ifindex, address: gateway, mac: HOST_MAC })
                .await?;
            for route in [gateway_route(gateway, device.ifindex), default_route(gateway, device.ifindex)] {
                self.add_pod_route(route, &link.ifname).await?;
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

    /// Adds a route unless one exists: a pod may have other networks with their own routes.
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

    /// `self` is connected to the pod's namespace.
    async fn pod_device_problems(&self, link: &PodLink) -> Result<Vec<String>, NetlinkError> {
        let name = &link.ifname;
        let Some(device) = self.link(name).await? else {
            return Ok(vec![format!("the pod has no device {name}")]);
        };
        let mut problems = Vec::new();
        if device.mac != Some(link.mac) {
            problems.push(format!("the MAC address of {name} in the pod is not {}", link.mac));
        }
        if !device.up {
            problems.push(format!("{name} in the pod is down"));
        }
        let addresses = self.addresses().await?;
        for address in &link.addresses {
            if !addresses.iter().any(|found| found.ifindex == device.ifindex && found.ip() == *address) {
                problems.push(format!("{name} in the pod does not have {address}"));
            }
        }
        let gateways = link.addresses.iter().map(|address| gateway(*address));
        let neighbours = self.permanent_neighbours(device.ifindex).await?;
        problems.extend(missing_neighbours(&neighbours, gateways.clone(), HOST_MAC, name));
        let routes: Vec<_> = self.route_messages().await?.iter().filter_map(route::read).collect();
        for gateway in gateways {
            // on any device: later plugins and other networks of the pod may have replaced it
            let is_default = |route: &KernelRoute| {
                route.destination.prefix_len() == 0 && route.destination.addr().is_ipv4() == gateway.is_ipv4()
            };
            if !routes.iter().any(is_default) {
                let family = if gateway.is_ipv4() { "IPv4" } else { "IPv6" };
                problems.push(format!("the pod has no {family} default route"));
            }
        }
        Ok(problems)
    }

    async fn created_link(&self, name: &str) -> Result<Link, NetlinkError> {
        self.link(name).await?.ok_or_else(|| NetlinkError::Protocol {
            operation: "find device",
            object: name.to_owned(),
            detail: "another process deleted it right after it was created".to_owned(),
        })
    }
}

fn missing_neighbours(
    found: &[Neighbour],
    expected: impl Iterator<Item = IpAddr>,
    mac: MacAddr,
    device: &str,
) -> Vec<String> {
    let has = |address: IpAddr| found.iter().any(|found| found.address == address && found.mac == mac);
    expected
        .filter(|address| !has(*address))
        .map(|address| format!("{device} has no permanent neighbour {address}"))
        .collect()
}

/// `169.254.1.1 dev eth0 scope link`
fn gateway_route(gateway: IpAddr, ifindex: u32) -> RouteMessage {
    let mut message = pod_route(gateway, ifindex, RouteAttribute::Destination(gateway.into()));
    message.header.destination_prefix_length = IpNet::from(gateway).prefix_len();
    if gateway.is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    message
}

/// `default via 169.254.1.1 dev eth0`
fn default_route(gateway: IpAddr, ifindex: u32) -> RouteMessage {
    let mut message = pod_route(gateway, ifindex, RouteAttribute::Gateway(gateway.into()));
    if gateway.is_ipv4() {
        // the gateway need not be reachable by this device's routes: another device of the pod may
        // have that route
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
