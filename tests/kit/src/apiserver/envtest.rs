//! The real API server: etcd, kube-apiserver and, on request, the controller of
//! kube-controller-manager that allocates pod CIDRs.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use dataplane_fake_apiserver::kubeconfig;
use http::Request;
use serde_json::{Value, json};

use super::{Objects, User, choice::Needs};
use crate::lab::{Place, Process, wait};

/// Directory of the binaries, by the name that controller-runtime's envtest uses.
const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// Timeout for etcd and an API server to start or to end.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Binaries of the control plane.
#[derive(Clone, Debug)]
pub struct Assets {
    directory: PathBuf,
}

impl Assets {
    /// The binaries in the directory that `KUBEBUILDER_ASSETS` names, if it is set.
    ///
    /// # Errors
    ///
    /// The variable is set, but a binary is missing.
    pub fn find() -> Result<Option<Self>> {
        let Some(directory) = env::var_os(ASSETS).filter(|value| !value.is_empty()) else { return Ok(None) };
        let assets = Self { directory: directory.into() };
        for name in ["etcd", "kube-apiserver"] {
            let path = assets.path(name);
            ensure!(path.is_file(), "{ASSETS}: {} does not exist", path.display());
        }
        Ok(Some(assets))
    }

    pub fn has_controller_manager(&self) -> bool {
        self.path("kube-controller-manager").is_file()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// A real API server with etcd. Dropping it ends all processes.
#[derive(Debug)]
pub struct Envtest {
    assets: Assets,
    /// `None`: namespace and cgroup of this process.
    place: Option<Place>,
    directory: PathBuf,
    /// Address of the API server for clients.
    server: SocketAddr,
    etcd: SocketAddr,
    peers: SocketAddr,
    manager_port: u16,
    cluster_cidrs: Vec<String>,
    tokens: BTreeMap<String, String>,
    // dropped in this order
    manager: Option<Process>,
    api: Option<Process>,
    store: Option<Process>,
}

impl Envtest {
    /// Starts an API server that stores its data below `directory`. In a place it listens on
    /// `address`, else on loopback.
    pub fn start(
        assets: Assets,
        place: Option<(&Place, IpAddr)>,
        directory: &Path,
        needs: &Needs,
    ) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let loopback = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let [server, etcd, peers, manager] = match place {
            Some((_, address)) => {
                [SocketAddr::new(address, 6443), loopback(2379), loopback(2380), loopback(10257)]
            }
            None => free_ports()?,
        };
        let users = needs.users.iter().cloned().chain([User::admin()]);
        let mut envtest = Self {
            assets,
            place: place.map(|(place, _)| place.clone()),
            directory: directory.to_owned(),
            server,
            etcd,
            peers,
            manager_port: manager.port(),
            cluster_cidrs: needs.cluster_cidrs.clone(),
            tokens: BTreeMap::new(),
            manager: None,
            api: None,
            store: None,
        };
        envtest.write_credentials(users)?;
        envtest.start_etcd()?;
        envtest.start_api()?;
        if !envtest.cluster_cidrs.is_empty() {
            envtest.start_manager()?;
        }
        Ok(envtest)
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.server)
    }

    /// The version that the server reports.
    pub fn version(&self) -> Result<String> {
        let version = self.objects()?.with(|client| async move { client.apiserver_version().await })?;
        Ok(version?.git_version)
    }

    /// The token of a user of [`Needs::users`].
    pub fn token(&self, user: &User) -> Result<String> {
        let token = self.tokens.get(&user.name);
        Ok(token.with_context(|| format!("{} was not named when the server started", user.name))?.clone())
    }

    pub fn kubeconfig(&self, user: &User) -> Result<String> {
        kubeconfig(&self.url(), &self.token(user)?, Some(&self.authority()))
    }

    pub fn objects(&self) -> Result<Objects> {
        let namespace = self.place.as_ref().map(|place| place.namespace().file());
        Objects::connect(&self.kubeconfig(&User::admin())?, namespace)
    }

    /// Kills the API server; etcd keeps running.
    pub fn stop(&mut self) -> Result<()> {
        match self.api.take() {
            Some(mut api) => api.kill(),
            None => Ok(()),
        }
    }

    /// Starts the API server again.
    pub fn restart(&mut self) -> Result<()> {
        if self.api.is_some() { Ok(()) } else { self.start_api() }
    }

    /// Compacts etcd: only the last revision remains.
    pub fn compact(&self) -> Result<()> {
        let response =
            self.request_etcd("/v3/kv/range", &json!({"key": "AA==", "range_end": "AA==", "limit": 1}))?;
        let revision = response["header"]["revision"].as_str().context("etcd's response has no revision")?;
        self.request_etcd("/v3/kv/compaction", &json!({"revision": revision, "physical": true})).map(drop)
    }

    /// The audit log: requests with user and result.
    pub(super) fn audit_log(&self) -> PathBuf {
        self.directory.join("audit.log")
    }

    fn authority(&self) -> PathBuf {
        self.directory.join("tls/apiserver.crt")
    }

    fn write_credentials(&mut self, users: impl Iterator<Item = User>) -> Result<()> {
        let mut lines = String::new();
        for user in users {
            let token = format!("token-of-{}", user.name.replace(':', "."));
            let groups = user.groups.join(",");
            lines.push_str(&format!("{token},{name},{name},\"{groups}\"\n", name = user.name));
            self.tokens.insert(user.name, token);
        }
        fs::write(self.directory.join("tokens.csv"), lines)?;
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata"}],
        });
        fs::write(self.directory.join("audit.yaml"), serde_norway::to_string(&policy)?)?;
        let key = self.directory.join("sa.key");
        if !key.exists() {
            let mut openssl = Command::new("openssl");
            openssl.args(["genrsa", "-out"]).arg(&key).arg("2048");
            let made = openssl.output().context("run openssl (package openssl)")?;
            ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        }
        Ok(())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let data = self.directory.join("etcd").display().to_string();
        let (clients, peers) = (format!("http://{}", self.etcd), format!("http://{}", self.peers));
        let standard = [
            format!("--data-dir={data}"),
            format!("--listen-client-urls={clients}"),
            format!("--advertise-client-urls={clients}"),
            format!("--listen-peer-urls={peers}"),
            format!("--initial-advertise-peer-urls={peers}"),
            format!("--initial-cluster=default={peers}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        // for a reduced build of etcd that has only these flags
        let few = [format!("-data-dir={data}"), format!("-client={clients}"), format!("-peer={peers}")];
        let started = self.try_etcd(&standard).or_else(|error| {
            self.try_etcd(&few).with_context(|| format!("it failed with the usual flags, too: {error:#}"))
        });
        self.store = Some(started.context("start etcd")?);
        Ok(())
    }

    fn try_etcd(&self, arguments: &[String]) -> Result<Process> {
        let mut process = self.daemon("etcd", arguments)?;
        wait::until("etcd", TIMEOUT, || {
            if let Err(error) = process.check_running() {
                return Ok(Some(Err(error)));
            }
            self.request_etcd("/v3/kv/range", &json!({"key": "AA=="})).map(|_| Some(Ok(())))
        })??;
        Ok(process)
    }

    fn start_api(&mut self) -> Result<()> {
        let path = |name: &str| self.directory.join(name).display().to_string();
        let arguments = [
            format!("--etcd-servers=http://{}", self.etcd),
            format!("--bind-address={}", if self.place.is_some() { "0.0.0.0" } else { "127.0.0.1" }),
            format!("--advertise-address={}", self.server.ip()),
            format!("--secure-port={}", self.server.port()),
            format!("--cert-dir={}", path("tls")),
            format!("--token-auth-file={}", path("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            // no controller creates service accounts and tokens for pods here
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("sa.key")),
            format!("--service-account-signing-key-file={}", path("sa.key")),
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112".to_owned(),
            format!("--audit-policy-file={}", path("audit.yaml")),
            format!("--audit-log-path={}", self.audit_log().display()),
            // no other server to go to: tests need to notice dead connections
            "--goaway-chance=0".to_owned(),
        ];
        let mut process = self.daemon("kube-apiserver", &arguments)?;
        wait::until("ready kube-apiserver", TIMEOUT, || {
            if let Err(error) = process.check_running() {
                return Ok(Some(Err(error)));
            }
            self.check_ready().map(|()| Some(Ok(())))
        })??;
        self.api = Some(process);
        Ok(())
    }

    fn check_ready(&self) -> Result<()> {
        ensure!(self.authority().exists(), "no certificate yet");
        let objects = self.objects()?;
        let response = objects.with(|client| async move {
            let request = Request::get("/readyz").body(Vec::new())?;
            anyhow::Ok(client.request_text(request).await?)
        })?;
        response.context("GET /readyz")?;
        for namespace in ["default", "kube-system"] {
            objects
                .get("v1", "Namespace", "", namespace)?
                .with_context(|| format!("no namespace {namespace}"))?;
        }
        Ok(())
    }

    fn start_manager(&mut self) -> Result<()> {
        ensure!(self.assets.has_controller_manager(), "{ASSETS} has no kube-controller-manager");
        let file = self.directory.join("manager.kubeconfig");
        fs::write(&file, self.kubeconfig(&User::admin())?)?;
        let mut arguments = vec![
            format!("--kubeconfig={}", file.display()),
            format!("--secure-port={}", self.manager_port),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--cert-dir={}", self.directory.join("manager").display()),
            "--leader-elect=false".to_owned(),
            // other controllers would delete the tests' EndpointSlices
            "--controllers=node-ipam-controller".to_owned(),
            "--allocate-node-cidrs=true".to_owned(),
            format!("--cluster-cidr={}", self.cluster_cidrs.join(",")),
        ];
        if self.cluster_cidrs.len() == 2 {
            arguments.extend([
                "--node-cidr-mask-size-ipv4=24".to_owned(),
                "--node-cidr-mask-size-ipv6=64".to_owned(),
            ]);
        }
        let mut process = self.daemon("kube-controller-manager", &arguments)?;
        process.check_running()?;
        self.manager = Some(process);
        Ok(())
    }

    fn daemon(&self, name: &str, arguments: &[String]) -> Result<Process> {
        let program = self.assets.path(name);
        let mut command = match &self.place {
            Some(place) => place.command(&program)?,
            None => Command::new(&program),
        };
        command.args(arguments);
        Process::daemon(command, &self.directory.join(format!("{name}.log")))
    }

    /// Sends a request to etcd's HTTP gateway.
    fn request_etcd(&self, path: &str, body: &Value) -> Result<Value> {
        let address = self.etcd;
        let body = body.to_string();
        let exchange = || -> Result<String> {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            write!(
                stream,
                "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )?;
            let mut response = String::new();
            stream.read_to_string(&mut response)?;
            Ok(response)
        };
        let response = match &self.place {
            Some(place) => place.namespace().enter(exchange)?,
            None => exchange(),
        };
        let response = response.with_context(|| format!("request to etcd at {address}"))?;
        let (head, body) = response.split_once("\r\n\r\n").context("etcd's response has no body")?;
        let status = head.lines().next().unwrap_or_default();
        ensure!(status.contains(" 200 "), "etcd responded to {path} with {status}: {body}");
        serde_json::from_str(body).with_context(|| format!("etcd's response to {path}: {body}"))
    }
}

/// Free ports on loopback. They are not reserved: another process may take one first.
fn free_ports() -> Result<[SocketAddr; 4]> {
    let listeners = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0"));
    let mut found = [SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0); 4];
    for (listener, address) in listeners.into_iter().zip(&mut found) {
        *address = listener?.local_addr()?;
    }
    if found.iter().any(|address| address.port() == 0) {
        bail!("no free ports");
    }
    Ok(found)
}
