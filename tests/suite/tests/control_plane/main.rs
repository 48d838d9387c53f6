//! The agent against an API server and its objects, and the manifests in `deploy/`. Needs no root;
//! tests that need it skip themselves without.

mod allocate;
mod deploy;
mod golden;
mod lifecycle;
mod manifests;
mod service_tables;
mod source_kubernetes;
