//! The benchmark: our datapath beside what it replaces and beside the limit, in one interleaved run.
//!
//! [`load`] makes the traffic between the ends of a [`site`], [`forward`] that through a node ([`work`] is either); [`ours`] and, with [`rules`],
//! [`peers`] build what is compared, [`bed`] all of it; [`plan`] says which measurements make which row, [`measure`] takes them in random order, [`stats`]
//! turns rounds into ratios with an interval, [`report`] and [`markdown`] tell them. [`scale`] stands aside: one agent in a large cluster. Numbers of different runs never
//! meet: only ratios inside one run mean anything here.
#![expect(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "counts and positive ratios, far below what a float can tell apart"
)]

pub mod bed;
pub mod forward;
pub mod load;
pub mod machine;
pub mod markdown;
pub mod measure;
pub mod network;
pub mod ours;
pub mod peers;
pub mod plan;
pub mod report;
pub mod rules;
pub mod scale;
pub mod services;
pub mod site;
pub mod stats;
pub mod work;
