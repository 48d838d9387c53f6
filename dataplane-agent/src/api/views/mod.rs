//! The API's data types: the rows of `status`, `services`, `endpoints`, `routes`, `flows` and
//! `events`.
//!
//! Plain serialisable types, shared by the agent that fills them and the CLI that prints them.
//! Field names are lowerCamelCase with the acronyms of Kubernetes (`podCIDRs`). Knows no map, no
//! socket and no Kubernetes type.

mod objects;
mod packets;
mod status;

pub use objects::{
    BackendView, ClientsView, EndpointView, FrontendKind, FrontendView, PodView, RouteKindView, RouteView,
    ServiceView,
};
pub use packets::{CountView, EventView, FlowView, PeerView};
pub use status::{
    EgressView, IpamView, Moment, NodeView, NotReady, ObjectsView, Origin, OtherDeviceView, ProblemView,
    ReconcileView, SourceView, Status, StatusView, TableView, UplinkView, unix_seconds,
};
