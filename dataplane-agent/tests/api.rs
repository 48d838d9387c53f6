//! The local API and HTTP over real sockets: what clients get, and what they cannot do to each other.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use dataplane_agent::{
    api::{
        answer::Api,
        cni::{CniAnswer, CniServer},
        datapath::{DatapathReader, Observation, Observations},
        instance::{Instance, socket_path},
        query::Query,
        server::{Limits, serve},
        views::{
            BackendView, ClientsView, CountView, EndpointView, EventView, FlowView, FrontendKind,
            FrontendView, IpamView, NotReady, PeerView, PodView, ServiceView, Status, TableView,
        },
    },
    cli::{self, ClientArgs, Command, Output},
    health::Health,
    metrics::{Metrics, RequestResult},
};
use serde_json::{Value, json};
use tokio::{
    runtime::Runtime,
    sync::{broadcast, mpsc, watch},
};

/// An agent's API without an agent: the seams are served with rows made here.
struct Agent {
    runtime: Runtime,
    run_dir: tempfile::TempDir,
    status: watch::Sender<Status>,
    queries: mpsc::Sender<Query>,
    api: Arc<Api>,
    metrics: Arc<Metrics>,
    live: Arc<Rows>,
    _instance: Instance,
}

/// Rows as the datapath would report them.
#[derive(Debug)]
struct Rows {
    flows: Mutex<Vec<FlowView>>,
    events: broadcast::Sender<Observation>,
}

impl DatapathReader for Rows {
    fn counts(&self) -> Result<Vec<CountView>, String> {
        let count = |outcome: &str, dropped, packets| CountView {
            hook: "from_pod".to_owned(),
            outcome: outcome.to_owned(),
            dropped,
            text: "As the reason says.".to_owned(),
            packets,
        };
        Ok(vec![count("no_backend", true, 3), count("to_pod", false, 500)])
    }

    fn flows(&self) -> Result<Vec<FlowView>, String> {
        Ok(self.flows.lock().unwrap().clone())
    }

    fn events(&self) -> Observations {
        let receiver = self.events.subscribe();
        Box::pin(futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.ok().map(|observation| (observation, receiver))
        }))
    }
}

impl Agent {
    fn start(limits: Limits) -> Self {
        let run_dir = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (status, published) = watch::channel(Status::starting("node-1"));
        let (queries, asked) = mpsc::channel(8);
        let metrics = Arc::new(Metrics::new(published.clone()));
        let api = Api::new(published, queries.clone(), Arc::clone(&metrics));
        let instance = Instance::acquire(run_dir.path()).unwrap();
        let live = Arc::new(Rows { flows: Mutex::default(), events: broadcast::channel(64).0 });
        runtime.block_on(async {
            tokio::spawn(owner(asked));
            tokio::spawn(serve(instance.listen().unwrap(), Arc::clone(&api), limits));
        });
        Self { runtime, run_dir, status, queries, api, metrics, live, _instance: instance }
    }

    fn health(&self) -> Health {
        let (published, queries) = (self.status.subscribe(), self.queries.clone());
        Health::start("127.0.0.1:0".parse().unwrap(), published, queries, Arc::clone(&self.metrics)).unwrap()
    }

    /// The datapath is loaded.
    fn load(&self) {
        let _runtime = self.runtime.enter();
        self.api.set_datapath_reader(self.live.clone());
    }

    fn socket(&self) -> PathBuf {
        socket_path(self.run_dir.path())
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    fn emit(&self, event: EventView) {
        self.live.events.send(Observation::Event(event)).unwrap();
    }
}

/// The task that owns the state.
async fn owner(mut asked: mpsc::Receiver<Query>) {
    while let Some(query) = asked.recv().await {
        let answered = match query {
            Query::Ping(answer) => answer.send(()).is_ok(),
            Query::Services(answer) => answer.send(vec![service()]).is_ok(),
            Query::Endpoints(answer) => answer.send(vec![endpoint()]).is_ok(),
            Query::Routes(answer) => answer.send(Vec::new()).is_ok(),
        };
        assert!(answered, "the asker waits for its answer");
    }
}

struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream: BufReader::new(stream) }
    }

    fn send(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).unwrap();
        (read != 0).then(|| serde_json::from_str(&line).unwrap())
    }

    fn ask(&mut self, request: &Value) -> Value {
        self.send(&format!("{request}\n"));
        self.line().expect("an answer")
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn peer(text: &str) -> PeerView {
    let end: SocketAddr = text.parse().unwrap();
    PeerView { address: end.ip(), port: end.port() }
}

fn service() -> ServiceView {
    ServiceView {
        namespace: "default".to_owned(),
        name: "web".to_owned(),
        port_name: String::new(),
        cluster_ips: vec![address("10.96.0.10")],
        frontends: vec![FrontendView {
            kind: FrontendKind::ClusterIp,
            address: address("10.96.0.10"),
            port: 80,
            clients: ClientsView::All,
            local_only: false,
            has_source_ranges: false,
            backends: 1,
        }],
        port: 80,
        protocol: "TCP".to_owned(),
        id: 7,
        generation: 1,
        load_balancing: "random".to_owned(),
        forwarding: "snat".to_owned(),
        affinity_timeout: None,
        backends: vec![BackendView { address: address("10.1.1.2"), port: 8_080 }],
    }
}

fn endpoint() -> EndpointView {
    EndpointView {
        address: address("10.1.0.5"),
        pod: Some(PodView { namespace: "default".to_owned(), name: "client".to_owned() }),
        device: Some("dp0123456789a".to_owned()),
        ifindex: 12,
        mac: None,
        flow_hints: Vec::new(),
        accepts_node_ports: false,
    }
}

fn flow(source: &str, service_id: Option<u32>) -> FlowView {
    FlowView {
        protocol: "TCP".to_owned(),
        source: peer(source),
        destination: peer("10.96.0.10:80"),
        translated_source: peer(source),
        translated_destination: peer("10.1.1.2:8080"),
        state: "established".to_owned(),
        age_seconds: 5,
        idle_seconds: 1,
        service_id,
        service: None,
    }
}

fn event(timestamp_ns: u64, outcome: &str) -> EventView {
    EventView {
        timestamp_ns,
        hook: "from_pod".to_owned(),
        outcome: outcome.to_owned(),
        dropped: outcome != "to_pod",
        text: "The service has no ready backend.".to_owned(),
        protocol: "TCP".to_owned(),
        source: Some(peer("10.1.0.5:43210")),
        destination: Some(peer("10.96.0.10:80")),
        source_name: None,
        destination_name: None,
        ifindex: 12,
        device: None,
        length: 74,
    }
}

/// Waits for a condition that another thread brings about.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_starting_agent_says_why_it_is_not_ready() {
    let agent = Agent::start(Limits::default());
    let answer = agent.client().ask(&json!({ "view": "status" }));
    assert_eq!(answer["result"]["ready"], false);
    assert_eq!(answer["result"]["node"], "node-1");
    assert_eq!(answer["result"]["notReady"][0]["check"], "start");
    assert_eq!(answer["result"]["outcomes"], json!([]), "without a datapath there are no counters");
    let answer = agent.client().ask(&json!({ "view": "flows" }));
    assert_eq!(answer["error"], "the datapath is not loaded yet");
}

#[test]
fn status_shows_what_was_published_and_the_most_frequent_outcome_first() {
    let agent = Agent::start(Limits::default());
    agent.load();
    agent.status.send_modify(|status| status.not_ready.clear());
    let answer = agent.client().ask(&json!({ "view": "status" }));
    assert_eq!(answer["result"]["ready"], true);
    assert_eq!(answer["result"]["outcomes"][0]["outcome"], "to_pod");
    assert_eq!(answer["result"]["outcomes"][1]["packets"], 3);
}

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
fn flows_are_named_filtered_and_counted() {
    let agent = Agent::start(Limits::default());
    agent.load();
    *agent.live.flows.lock().unwrap() =
        vec![flow("10.1.0.5:1", Some(7)), flow("10.1.0.5:2", Some(7)), flow("10.1.0.6:1", None)];
    let mut client = agent.client();
    let answer = client.ask(&json!({ "view": "flows", "service": "default/web", "limit": 1 }));
    let list = &answer["result"];
    assert_eq!((&list["total"], &list["matching"]), (&json!(3), &json!(2)));
    assert_eq!(list["flows"].as_array().unwrap().len(), 1);
    assert_eq!(list["flows"][0]["service"], "default/web");
    let answer = client.ask(&json!({ "view": "flows", "address": "10.1.0.6", "protocol": "tcp" }));
    assert_eq!(answer["result"]["matching"], 1);
    let answer = client.ask(&json!({ "view": "flows", "address": "nowhere" }));
    assert!(answer["error"].as_str().unwrap().contains("bad request"));
}

#[test]
fn events_are_kept_for_who_asks_late_and_come_once_to_who_follows() {
    let agent = Agent::start(Limits::default());
    agent.load();
    agent.emit(event(1, "no_backend"));
    agent.emit(event(2, "to_pod"));
    eventually("both events are kept", || {
        let mut client = agent.client();
        client.send("{\"view\":\"events\"}\n");
        std::iter::from_fn(|| client.line()).filter(|line| line.get("event").is_some()).count() == 2
    });

    let mut late = agent.client();
    late.send("{\"view\":\"events\",\"dropped\":true}\n");
    let line = late.line().unwrap();
    assert_eq!(line["event"]["destinationName"], "Service default/web");
    assert_eq!(line["event"]["sourceName"], "Pod default/client");
    assert_eq!(line["event"]["device"], "dp0123456789a");
    assert_eq!(late.line().unwrap(), "end", "the event that was no drop is left out");

    let mut follower = agent.client();
    follower.send("{\"view\":\"events\",\"follow\":true}\n");
    assert_eq!(follower.line().unwrap()["event"]["timestampNanoseconds"], 1);
    agent.emit(event(3, "no_backend"));
    assert_eq!(follower.line().unwrap()["event"]["timestampNanoseconds"], 2);
    assert_eq!(follower.line().unwrap()["event"]["timestampNanoseconds"], 3);
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

#[test]
fn a_command_without_an_agent_fails() {
    let ask = ClientArgs { socket: "/nonexistent/agent.sock".into(), output: Output::Table };
    assert_eq!(cli::run(Command::Status(ask)), ExitCode::FAILURE);
}

#[test]
fn a_command_with_an_agent_succeeds() {
    let agent = Agent::start(Limits::default());
    agent.load();
    for output in [Output::Table, Output::Json] {
        let ask = ClientArgs { socket: agent.socket(), output };
        assert_eq!(cli::run(Command::Status(ask.clone())), ExitCode::SUCCESS);
        assert_eq!(cli::run(Command::Services(ask.clone())), ExitCode::SUCCESS);
        assert_eq!(cli::run(Command::Endpoints(ask.clone())), ExitCode::SUCCESS);
        assert_eq!(cli::run(Command::Routes(ask)), ExitCode::SUCCESS);
    }
}

fn get(server: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
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
fn http_answers_while_the_agents_own_runtime_is_stuck() {
    let agent = Agent::start(Limits::default());
    let health = agent.health();
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    for _ in 0..2 {
        let held = Arc::clone(&held);
        // both workers of the runtime
        agent.runtime.spawn(async move { assert!(held.lock().unwrap().recv().is_err(), "until released") });
    }
    assert_eq!(get(health.address(), "/readyz").0, 503);
    assert_eq!(get(health.address(), "/metrics").0, 200);
    drop(release);
}

#[test]
fn metrics_hold_what_was_published_counted_and_read() {
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
        "dataplane_api_request_duration_seconds_count{request=\"services\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

/// Answers like a CNI server that knows one verb.
#[derive(Debug)]
struct Adder;

impl CniServer for Adder {
    fn answer(&self, request: Value) -> futures::future::BoxFuture<'_, CniAnswer> {
        let result = if request["verb"] == "add" { RequestResult::Ok } else { RequestResult::Error };
        Box::pin(async move { CniAnswer { verb: "add", result, response: json!({ "asked": request }) } })
    }

    fn ranges(&self) -> Vec<IpamView> {
        vec![IpamView { cidr: "10.1.0.0/24".parse().unwrap(), used: 3, free: 250 }]
    }
}

#[test]
fn the_plugins_requests_reach_the_cni_server_and_are_counted() {
    let agent = Agent::start(Limits::default());
    let mut client = agent.client();
    let early = client.ask(&json!({ "verb": "add" }));
    assert!(early["error"].as_str().unwrap().contains("starting"), "{early}");
    agent.api.set_cni(Arc::new(Adder));
    assert_eq!(client.ask(&json!({ "verb": "add", "pod": 1 }))["asked"]["pod"], 1);
    let text = agent.metrics.encode();
    for line in [
        "dataplane_cni_requests_total{verb=\"add\",result=\"ok\"} 1",
        "dataplane_cni_request_duration_seconds_count{verb=\"add\"} 1",
        "dataplane_ipam_addresses_used{cidr=\"10.1.0.0/24\"} 3",
        "dataplane_ipam_addresses_free{cidr=\"10.1.0.0/24\"} 250",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert_eq!(client.ask(&json!({ "view": "status" }))["result"]["ipam"][0]["used"], 3);
}
