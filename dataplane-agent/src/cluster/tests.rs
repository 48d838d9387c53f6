//! The client against servers on real sockets that respond, fail, close or do not listen.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;

/// The behaviour of a test server.
#[derive(Clone, Copy)]
enum Behaviour {
    Version(&'static str),
    Unavailable,
    HangUp,
}

/// The format of k8s.io/apiserver.
const UNAVAILABLE: &str =
    r#"{"kind":"Status","status":"Failure","message":"starting","reason":"ServiceUnavailable","code":503}"#;

/// A server with this behaviour, and its request counter.
async fn server(behaviour: Behaviour) -> (Uri, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = url(listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                    count.fetch_add(1, Ordering::SeqCst);
                    let (status, body) = match behaviour {
                        Behaviour::Version(version) => {
                            let fields =
                                ["major", "minor", "gitCommit", "gitTreeState", "buildDate", "goVersion"]
                                    .map(|field| format!("\"{field}\":\"\","))
                                    .concat();
                            let body = format!(
                                "{{{fields}\"compiler\":\"\",\"platform\":\"\",\"gitVersion\":\"{version}\"}}"
                            );
                            ("200 OK", body)
                        }
                        Behaviour::Unavailable => ("503 Service Unavailable", UNAVAILABLE.to_owned()),
                        Behaviour::HangUp => return,
                    };
                    let head = format!(
                        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                        body.len()
                    );
                    stream.write_all((head + &body).as_bytes()).await.unwrap();
                }
            });
        }
    });
    (url, requests)
}

fn url(address: SocketAddr) -> Uri {
    format!("http://{address}").parse().unwrap()
}

/// An address without a listener.
async fn closed_port() -> Uri {
    url(TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap())
}

fn access(servers: &[&Uri]) -> Access {
    Access { servers: servers.iter().map(|url| (*url).clone()).collect(), ..Access::default() }
}

async fn version(client: &Client) -> Result<String, String> {
    client.apiserver_version().await.map(|info| info.git_version).map_err(|error| explain(&error))
}

#[tokio::test]
async fn working_server_is_found_and_remembered() {
    let (works, requests) = server(Behaviour::Version("v1")).await;
    let (hangs_up, hung_up) = server(Behaviour::HangUp).await;
    let access = access(&[&closed_port().await, &hangs_up, &works]);
    let client = connect(&access).await.unwrap();
    for _ in 0..10 {
        assert_eq!(version(&client).await.unwrap(), "v1");
    }
    assert_eq!(requests.load(Ordering::SeqCst), 10);
    assert!(hung_up.load(Ordering::SeqCst) <= 1, "a failed server is not used again");
    assert!(access.failover_stats.failovers() <= 2);
}

#[tokio::test]
async fn failing_server_is_switched() {
    let (unavailable, _) = server(Behaviour::Unavailable).await;
    let (works, _) = server(Behaviour::Version("v1")).await;
    let access = access(&[&unavailable, &works]);
    let client = connect(&access).await.unwrap();
    let first = version(&client).await;
    // the first server is random
    match first {
        Ok(version) => assert_eq!(version, "v1"),
        Err(error) => assert_eq!(error, "API server responded with status 503: starting"),
    }
    assert_eq!(version(&client).await.unwrap(), "v1");
}

#[tokio::test]
async fn error_names_every_failed_server() {
    let (one, other) = (closed_port().await, closed_port().await);
    let client = connect(&access(&[&one, &other])).await.unwrap();
    let sentence = version(&client).await.unwrap_err();
    assert!(sentence.starts_with("cannot reach any API server: "), "{sentence}");
    for url in [one, other] {
        assert!(sentence.contains(&format!("{url} (Connection refused")), "{sentence}");
    }
}

#[tokio::test]
async fn request_that_may_have_been_executed_is_not_repeated() {
    let (one, requests_one) = server(Behaviour::HangUp).await;
    let (other, requests_other) = server(Behaviour::HangUp).await;
    let client = connect(&access(&[&one, &other])).await.unwrap();
    let request = http::Request::post("/api/v1/namespaces").body(b"{}".to_vec()).unwrap();
    client.request_text(request).await.unwrap_err();
    assert_eq!(requests_one.load(Ordering::SeqCst) + requests_other.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn missing_configuration_is_explained() {
    let error = connect(&Access::default()).await.err().unwrap().to_string();
    assert!(error.contains("set api_server"), "{error}");
    let nowhere = Access { kubeconfig: Some("/nowhere/kubeconfig".into()), ..Access::default() };
    let error = connect(&nowhere).await.err().unwrap().to_string();
    assert!(error.starts_with("cannot read kubeconfig /nowhere/kubeconfig: "), "{error}");
}
