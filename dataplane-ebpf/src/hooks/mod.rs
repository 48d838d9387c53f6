//! One file per attach point: the list of stages a packet passes there. [`driver`] runs them.

pub(crate) mod driver;
mod from_overlay;
mod from_pod;
mod from_wire;
pub(crate) mod l3;
pub(crate) mod socket;
mod to_overlay;
mod to_pod;
mod to_wire;
mod xdp_wire;

pub(crate) use self::{
    from_overlay::FromOverlay, from_pod::FromPod, from_wire::FromWire, to_overlay::ToOverlay, to_pod::ToPod,
    to_wire::ToWire, xdp_wire::XdpWire,
};
