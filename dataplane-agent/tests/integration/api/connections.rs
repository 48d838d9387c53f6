//! Tests of clients that send invalid requests, are slow or silent, or disconnect.

use std::{sync::Arc, time::Duration};

use dataplane_agent::{
    api::{answer::Api, server::Limits, views::Status},
    metrics::Metrics,
};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use super::{Agent, flow};

#[test]
fn bad_request_is_an_error_and_the_connection_stays_open() {
    let agent = Agent::start(Limits::default());
    let mut client = agent.client();
    for (line, word) in
        [("{]\n", "bad request"), ("{\"view\":\"secrets\"}\n", "secrets"), ("7\n", "bad request")]
    {
        client.send(line);
        let response = client.line().unwrap();
        assert!(response["error"].as_str().unwrap().contains(word), "{line}: {response}");
    }
    assert_eq!(client.ask(&json!({ "view": "services" }))["result"][0]["name"], "web");
}

#[test]
fn line_longer_than_the_limit_is_rejected() {
    let agent = Agent::start(Limits { line: 100, ..Limits::default() });
    let mut client = agent.client();
    let fits = format!("{:100}\n", json!({ "view": "services" }));
    client.send(&fits);
    assert!(client.line().unwrap()["result"].is_array(), "a line of exactly the limit is accepted");
    client.send(&" ".repeat(101));
    assert!(client.line().unwrap()["error"].as_str().unwrap().contains("longer than 100 bytes"));
    assert_eq!(client.line(), None, "the connection is closed");
}

#[test]
fn hanging_client_does_not_block_others() {
    let agent = Agent::start(Limits::default());
    let mut hung = agent.client();
    hung.send("{\"view\":");
    let mut idle = agent.client();
    idle.send("{\"view\":\"events\",\"follow\":true}\n");
    assert_eq!(agent.client().ask(&json!({ "view": "routes" }))["result"], json!([]));
    hung.send("\"routes\"}\n");
    assert_eq!(hung.line().unwrap()["result"], json!([]), "answered once the request is complete");
}

#[test]
fn silent_client_is_disconnected_after_the_timeout() {
    let agent =
        Agent::start(Limits { connections: 1, timeout: Duration::from_millis(50), ..Limits::default() });
    let mut silent = agent.client();
    let response = agent.client().ask(&json!({ "view": "routes" }));
    assert_eq!(response["result"], json!([]));
    assert!(silent.line().unwrap()["error"].as_str().unwrap().contains("no complete request line"));
}

#[test]
fn client_that_does_not_read_is_disconnected_after_the_timeout() {
    let agent =
        Agent::start(Limits { connections: 1, timeout: Duration::from_millis(50), ..Limits::default() });
    agent.load();
    *agent.rows.flows.lock().unwrap() = vec![flow("10.1.0.5:1", None); 10_000];
    let mut reader = agent.client();
    reader.send("{\"view\":\"flows\"}\n");
    assert_eq!(agent.client().ask(&json!({ "view": "routes" }))["result"], json!([]));
}

#[test]
fn request_to_a_stopping_agent_is_an_error() {
    let (_status, published) = watch::channel(Status::starting("node-1"));
    let (queries, asked) = mpsc::channel(1);
    drop(asked);
    let api = Api::new(published.clone(), queries, Arc::new(Metrics::new(published)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let response = runtime.block_on(api.answer(b"{\"view\":\"services\"}"));
    assert!(format!("{response:?}").contains("the agent is stopping"), "{response:?}");
}

#[test]
fn disconnected_follower_frees_its_connection() {
    let agent = Agent::start(Limits { connections: 1, ..Limits::default() });
    agent.load();
    let mut follower = agent.client();
    follower.send("{\"view\":\"events\",\"follow\":true}\n");
    drop(follower);
    assert_eq!(agent.client().ask(&json!({ "view": "routes" }))["result"], json!([]));
}
