//! What the agent makes of an API server and of its objects, and what `deploy/` holds. Needs no root; tests that do say so.

mod allocate;
mod deploy;
mod golden;
mod lifecycle;
mod manifests;
mod service_tables;
mod source_kubernetes;
