//! Tests of the local API and HTTP over real sockets: responses, and isolation of clients from each
//! other.

mod connections;
mod http;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
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
            FrontendView, IpamView, PeerView, PodView, ServiceView, Status,
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

/// The API of an agent, with test data in place of the datapath and the state.
struct Agent {
    runtime: Runtime,
    run_dir: tempfile::TempDir,
    status: watch::Sender<Status>,
    queries: mpsc::Sender<Query>,
    api: Arc<Api>,
    metrics: Arc<Metrics>,
    rows: Arc<Rows>,
    _instance: Instance,
}

/// Test data of the datapath.
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
            text: "Description of the outcome.".to_owned(),
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
        let rows = Arc::new(Rows { flows: Mutex::default(), events: broadcast::channel(64).0 });
        runtime.block_on(async {
            tokio::spawn(owner(asked));
            tokio::spawn(serve(instance.listen().unwrap(), Arc::clone(&api), limits));
        });
        Self { runtime, run_dir, status, queries, api, metrics, rows, _instance: instance }
    }

    fn health(&self) -> Health {
        let (published, queries) = (self.status.subscribe(), self.queries.clone());
        Health::start("127.0.0.1:0".parse().unwrap(), published, queries, Arc::clone(&self.metrics)).unwrap()
    }

    /// Makes the datapath available.
    fn load(&self) {
        let _runtime = self.runtime.enter();
        self.api.set_datapath_reader(self.rows.clone());
    }

    fn socket(&self) -> PathBuf {
        socket_path(self.run_dir.path())
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    fn emit(&self, event: EventView) {
        self.rows.events.send(Observation::Event(event)).unwrap();
    }
}

/// The task that answers queries about the state.
async fn owner(mut asked: mpsc::Receiver<Query>) {
    while let Some(query) = asked.recv().await {
        let answered = match query {
            Query::Ping(answer) => answer.send(()).is_ok(),
            Query::Services(answer) => answer.send(vec![service()]).is_ok(),
            Query::Endpoints(answer) => answer.send(vec![endpoint()]).is_ok(),
            Query::Routes(answer) => answer.send(Vec::new()).is_ok(),
        };
        assert!(answered, "the requester waits for its response");
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
        device_pod: None,
        length: 74,
    }
}

/// Waits for a condition that another thread fulfils.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out waiting for: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn starting_agent_reports_why_it_is_not_ready() {
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
fn status_shows_the_published_state_and_outcomes_by_frequency() {
    let agent = Agent::start(Limits::default());
    agent.load();
    agent.status.send_modify(|status| status.not_ready.clear());
    let answer = agent.client().ask(&json!({ "view": "status" }));
    assert_eq!(answer["result"]["ready"], true);
    assert_eq!(answer["result"]["outcomes"][0]["outcome"], "to_pod");
    assert_eq!(answer["result"]["outcomes"][1]["packets"], 3);
}

#[test]
fn flows_are_filtered_counted_and_have_service_names() {
    let agent = Agent::start(Limits::default());
    agent.load();
    *agent.rows.flows.lock().unwrap() =
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
fn events_are_kept_for_later_requests_and_sent_once_to_followers() {
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
    assert_eq!(late.line().unwrap(), "end", "events that are no drops are left out");

    let mut follower = agent.client();
    follower.send("{\"view\":\"events\",\"follow\":true}\n");
    assert_eq!(follower.line().unwrap()["event"]["timestampNanoseconds"], 1);
    agent.emit(event(3, "no_backend"));
    assert_eq!(follower.line().unwrap()["event"]["timestampNanoseconds"], 2);
    assert_eq!(follower.line().unwrap()["event"]["timestampNanoseconds"], 3);
}

#[test]
fn command_fails_without_an_agent() {
    let ask = ClientArgs { socket: "/nonexistent/agent.sock".into(), output: Output::Table };
    assert_eq!(cli::run(Command::Status(ask)), ExitCode::FAILURE);
}

#[test]
fn command_succeeds_with_an_agent() {
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

/// A CNI server with one verb.
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
fn plugin_requests_reach_the_cni_server_and_are_counted() {
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
