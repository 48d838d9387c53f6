//! Tests of health, readiness and metrics over HTTP.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use dataplane_agent::api::{
    server::Limits,
    views::{NotReady, TableView},
};
use serde_json::{Value, json};

use super::Agent;

fn get(server: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let code = response.split(' ').nth(1).unwrap().parse().unwrap();
    let body = response.split_once("\r\n\r\n").unwrap().1.to_owned();
    (code, body)
}

#[test]
fn readiness_follows_the_published_status() {
    let agent = Agent::start(Limits::default());
    let health = agent.health();
    agent.status.send_modify(|status| {
        status.not_ready = vec![NotReady { check: "source".to_owned(), reason: "not synced".to_owned() }];
    });
    let (code, body) = get(health.address(), "/readyz");
    assert_eq!(code, 503);
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["notReady"][0]["reason"], "not synced");
    agent.status.send_modify(|status| status.not_ready.clear());
    assert_eq!(get(health.address(), "/readyz").0, 200);
    assert_eq!(get(health.address(), "/healthz").0, 200);
    assert_eq!(get(health.address(), "/else").0, 404);
}

#[test]
fn http_responds_while_the_agents_runtime_is_blocked() {
    let agent = Agent::start(Limits::default());
    let health = agent.health();
    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Arc::new(Mutex::new(blocked));
    for _ in 0..2 {
        let blocked = Arc::clone(&blocked);
        // blocks both worker threads of the runtime
        agent
            .runtime
            .spawn(async move { assert!(blocked.lock().unwrap().recv().is_err(), "until released") });
    }
    assert_eq!(get(health.address(), "/readyz").0, 503);
    assert_eq!(get(health.address(), "/metrics").0, 200);
    drop(release);
}

#[test]
fn metrics_show_tables_packets_and_requests() {
    let agent = Agent::start(Limits::default());
    agent.load();
    agent.status.send_modify(|status| {
        status.tables =
            vec![TableView { name: "SERVICES".to_owned(), used: 3, capacity: 100, writes: 9, removals: 1 }];
    });
    agent.client().ask(&json!({ "view": "services" }));
    let text = agent.metrics.encode();
    for line in [
        "dataplane_table_entries{table=\"SERVICES\"} 3",
        "dataplane_table_capacity{table=\"SERVICES\"} 100",
        "dataplane_table_writes_total{table=\"SERVICES\"} 9",
        "dataplane_packets_total{hook=\"from_pod\",outcome=\"no_backend\",action=\"drop\"} 3",
        "dataplane_flows 0",
        "dataplane_ready 0",
        "dataplane_problems{origin=\"source\"} 0",
        "dataplane_api_requests_total{view=\"services\",result=\"ok\"} 1",
        "dataplane_api_request_duration_seconds_count{view=\"services\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}
