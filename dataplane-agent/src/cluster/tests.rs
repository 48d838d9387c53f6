//! Real sockets: servers that answer, refuse, hang up, fall silent.

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

/// What a server does with a request.
#[derive(Clone, Copy)]
enum Answer {
    Version(&'static str),
    Trouble,
    HangUp,
}

/// As k8s.io/apiserver writes it.
const TROUBLE: &str =
    r#"{"kind":"Status","status":"Failure","message":"starting","reason":"ServiceUnavailable","code":503}"#;

/// A server of one answer, and how often it was asked.
async fn server(answer: Answer) -> (Uri, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = url(listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                    count.fetch_add(1, Ordering::SeqCst);
                    let (status, body) = match answer {
                        Answer::Version(version) => {
                            let fields =
                                ["major", "minor", "gitCommit", "gitTreeState", "buildDate", "goVersion"]
                                    .map(|field| format!("\"{field}\":\"\","))
                                    .concat();
                            let body = format!(
                                "{{{fields}\"compiler\":\"\",\"platform\":\"\",\"gitVersion\":\"{version}\"}}"
                            );
                            ("200 OK", body)
                        }
                        Answer::Trouble => ("503 Service Unavailable", TROUBLE.to_owned()),
                        Answer::HangUp => return,
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
    (url, asked)
}

fn url(address: SocketAddr) -> Uri {
    format!("http://{address}").parse().unwrap()
}

/// An address nobody listens at.
async fn nobody() -> Uri {
    url(TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap())
}

fn access(servers: &[&Uri]) -> Access {
    Access { servers: servers.iter().map(|url| (*url).clone()).collect(), ..Access::default() }
}

async fn version(client: &Client) -> Result<String, String> {
    client.apiserver_version().await.map(|info| info.git_version).map_err(|error| explain(&error))
}

#[tokio::test]
async fn a_server_that_works_is_found_and_remembered() {
    let (works, asked) = server(Answer::Version("v1")).await;
    let (hangs_up, hung_up) = server(Answer::HangUp).await;
    let access = access(&[&nobody().await, &hangs_up, &works]);
    let client = connect(&access).await.unwrap();
    for _ in 0..10 {
        assert_eq!(version(&client).await.unwrap(), "v1");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 10);
    assert!(hung_up.load(Ordering::SeqCst) <= 1, "a server that failed is left alone");
    assert!(access.failover_stats.failovers() <= 2);
}

#[tokio::test]
async fn a_server_in_trouble_is_left() {
    let (trouble, _) = server(Answer::Trouble).await;
    let (works, _) = server(Answer::Version("v1")).await;
    let access = access(&[&trouble, &works]);
    let client = connect(&access).await.unwrap();
    let first = version(&client).await;
    // which of the two is asked first is left to chance
    match first {
        Ok(version) => assert_eq!(version, "v1"),
        Err(said) => assert_eq!(said, "the API server answers 503: starting"),
    }
    assert_eq!(version(&client).await.unwrap(), "v1");
}

#[tokio::test]
async fn every_server_that_failed_is_named() {
    let (one, other) = (nobody().await, nobody().await);
    let client = connect(&access(&[&one, &other])).await.unwrap();
    let sentence = version(&client).await.unwrap_err();
    assert!(sentence.starts_with("no API server can be asked: "), "{sentence}");
    for url in [one, other] {
        assert!(sentence.contains(&format!("{url} (Connection refused")), "{sentence}");
    }
}

#[tokio::test]
async fn what_may_have_been_done_is_not_done_twice() {
    let (one, asked_one) = server(Answer::HangUp).await;
    let (other, asked_other) = server(Answer::HangUp).await;
    let client = connect(&access(&[&one, &other])).await.unwrap();
    let request = http::Request::post("/api/v1/namespaces").body(b"{}".to_vec()).unwrap();
    client.request_text(request).await.unwrap_err();
    assert_eq!(asked_one.load(Ordering::SeqCst) + asked_other.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn without_servers_and_credentials_the_way_is_explained() {
    let error = connect(&Access::default()).await.err().unwrap().to_string();
    assert!(error.contains("name api_server"), "{error}");
    let nowhere = Access { kubeconfig: Some("/nowhere/kubeconfig".into()), ..Access::default() };
    let error = connect(&nowhere).await.err().unwrap().to_string();
    assert!(error.starts_with("kubeconfig /nowhere/kubeconfig: "), "{error}");
}
