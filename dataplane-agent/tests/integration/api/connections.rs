//! Clients that are wrong, slow, silent or gone.

use std::{sync::Arc, time::Duration};

use dataplane_agent::{
    api::{answer::Api, server::Limits, views::Status},
    metrics::Metrics,
};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use super::{Agent, flow};

#[test]
fn a_bad_request_is_told_and_the_connection_goes_on() {
    let agent = Agent::start(Limits::default());
    let mut client = agent.client();
    for (line, word) in
        [("{]\n", "bad request"), ("{\"view\":\"secrets\"}\n", "secrets"), ("7\n", "bad request")]
    {
        client.send(line);
        let answer = client.line().unwrap();
        assert!(answer["error"].as_str().unwrap().contains(word), "{line}: {answer}");
    }
    assert_eq!(client.ask(&json!({ "view": "services" }))["result"][0]["name"], "web");
}

#[test]
fn a_line_without_end_is_refused_at_the_limit() {
    let agent = Agent::start(Limits { line: 100, ..Limits::default() });
    let mut client = agent.client();
    let fits = format!("{:100}\n", json!({ "view": "services" }));
    client.send(&fits);
    assert!(client.line().unwrap()["result"].is_array(), "a line of exactly the limit fits");
    client.send(&" ".repeat(101));
    assert!(client.line().unwrap()["error"].as_str().unwrap().contains("longer than 100 bytes"));
    assert_eq!(client.line(), None, "and the connection is closed");
}

#[test]
fn a_client_that_hangs_blocks_nobody() {
    let agent = Agent::start(Limits::default());
    let mut hung = agent.client();
    hung.send("{\"view\":");
    let mut asleep = agent.client();
    asleep.send("{\"view\":\"events\",\"follow\":true}\n");
    assert_eq!(agent.client().ask(&json!({ "view": "routes" }))["result"], json!([]));
    hung.send("\"routes\"}\n");
    assert_eq!(hung.line().unwrap()["result"], json!([]), "and is answered when it goes on");
}

#[test]
fn a_client_that_stays_silent_gives_up_its_place() {
    let agent =
        Agent::start(Limits { connections: 1, timeout: Duration::from_millis(50), ..Limits::default() });
    let mut silent = agent.client();
    let answer = agent.client().ask(&json!({ "view": "routes" }));
    assert_eq!(answer["result"], json!([]));
    assert!(silent.line().unwrap()["error"].as_str().unwrap().contains("no complete request line"));
}

#[test]
fn a_client_that_does_not_read_gives_up_its_place() {
    let agent =
        Agent::start(Limits { connections: 1, timeout: Duration::from_millis(50), ..Limits::default() });
    agent.load();
    *agent.live.flows.lock().unwrap() = vec![flow("10.1.0.5:1", None); 10_000];
    let mut lazy = agent.client();
    lazy.send("{\"view\":\"flows\"}\n");
    assert_eq!(agent.client().ask(&json!({ "view": "routes" }))["result"], json!([]));
}

#[test]
fn an_agent_that_stops_says_so() {
    let (_status, published) = watch::channel(Status::starting("node-1"));
    let (queries, asked) = mpsc::channel(1);
    drop(asked);
    let api = Api::new(published.clone(), queries, Arc::new(Metrics::new(published)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(api.answer(b"{\"view\":\"services\"}"));
    assert!(format!("{answer:?}").contains("the agent is stopping"), "{answer:?}");
}

#[test]
fn a_follower_that_leaves_frees_its_place() {
    let agent = Agent::start(Limits { connections: 1, ..Limits::default() });
    agent.load();
    let mut follower = agent.client();
    follower.send("{\"view\":\"events\",\"follow\":true}\n");
    drop(follower);
    assert_eq!(agent.client().ask(&json!({ "view": "routes" }))["result"], json!([]));
}
