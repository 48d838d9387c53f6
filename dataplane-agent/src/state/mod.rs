//! The cluster state of the agent: plain types, one writer, a revision. No Kubernetes type, no map
//! type.

mod name;
mod store;
mod types;
mod uid;

pub use name::Name;
pub use store::{Changes, Store};
pub use types::{
    Endpoint, EndpointPort, EndpointSlice, Forwarding, Hints, LoadBalancing, Namespace, NamespacedName, Node,
    Object, ObjectKey, Owner, Pod, Service, ServiceCidr, ServicePort, SourceEvent, TrafficPolicy,
    TransportProtocol,
};
pub use uid::Uid;
