//! Tests of the manifests source on a real directory with inotify: which events it sends, and when.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use dataplane_agent::{
    api::views::Status,
    metrics::Metrics,
    source::{ManifestError, ManifestSource, Problem, Problems},
    state::{NamespacedName, SourceEvent, Store},
};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};

/// Timeout of every wait; all events are expected much sooner.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A running source, and a store that receives its events.
struct RunningSource {
    _root: TempDir,
    directory: PathBuf,
    events: mpsc::Receiver<SourceEvent>,
    problems: Problems,
    store: Store,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ManifestError>>,
}

impl RunningSource {
    /// Starts on a directory that `prepare` fills.
    fn start(prepare: impl FnOnce(&Path)) -> Self {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("manifests");
        fs::create_dir(&directory).unwrap();
        prepare(&directory);
        let (sender, events) = mpsc::channel(16);
        let problems = Problems::default();
        let source = ManifestSource::new(&directory, sender, problems.clone()).unwrap().on_node("n1");
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(source.run(async {
            stopped.await.ok();
        }));
        Self { _root: root, directory, events, problems, store: Store::default(), stop: Some(stop), task }
    }

    async fn synced(prepare: impl FnOnce(&Path)) -> Self {
        let mut source = Self::start(prepare);
        source.until(Store::is_synced).await;
        source
    }

    /// Applies events until the condition is true.
    async fn until(&mut self, condition: impl Fn(&Store) -> bool) {
        while !condition(&self.store) {
            self.step().await;
        }
    }

    async fn step(&mut self) {
        let event = timeout(TIMEOUT, self.events.recv()).await.expect("an event in time");
        self.store.apply(event.expect("the source is running"));
    }

    async fn until_problems(&mut self, condition: impl Fn(&[Problem]) -> bool) {
        let mut problems = self.problems.subscribe();
        let reached = problems.wait_for(|problems| condition(problems));
        timeout(TIMEOUT, reached).await.expect("the problems in time").unwrap();
    }

    /// Returns when the source has processed everything that happened before.
    async fn mark(&mut self, name: &str) {
        replace(&self.directory, "zz-mark.yaml", &node(name));
        self.until(|store| store.node(name).is_some()).await;
    }

    fn address(&self, service: &str) -> Option<String> {
        address(&self.store, service)
    }
}

fn address(store: &Store, service: &str) -> Option<String> {
    let name = NamespacedName::new("default", service);
    store.service(&name).map(|service| service.cluster_ips[0].to_string())
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {ip}\n  ports:\n  - port: 80\n"
    )
}

fn node(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nstatus: {{addresses: [{{type: InternalIP, \
         address: 172.16.0.1}}]}}\n"
    )
}

/// Writes a file atomically.
fn replace(directory: &Path, name: &str, text: &str) {
    let draft = directory.join(format!(".{name}.draft"));
    fs::write(&draft, text).unwrap();
    fs::rename(&draft, directory.join(name)).unwrap();
}

#[tokio::test]
async fn existing_objects_are_sent_before_synced() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let source = RunningSource::synced(|directory| {
        for file in fs::read_dir(fixtures).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), directory.join(file.file_name())).unwrap();
        }
    })
    .await;
    assert_eq!(source.problems.current(), []);
    assert!(source.store.node("worker-1").is_some());
    assert_eq!(source.address("kubernetes").as_deref(), Some("10.96.0.1"));
    let web = NamespacedName::new("shop", "web");
    assert_eq!(source.store.slices_of(&web).map(|slice| slice.endpoints.len()).sum::<usize>(), 2);
    assert_eq!(source.store.services().count(), 2);
}

#[tokio::test]
async fn only_pods_of_this_node_are_kept() {
    let pod = |node| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{nodeName: {node}}}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {{name: default, labels: {{a: b}}}}\n"
        )
    };
    let mut source = RunningSource::synced(|directory| {
        fs::write(directory.join("here.yaml"), pod("n1")).unwrap();
        fs::write(directory.join("there.yaml"), pod("n2").replace("name: p", "name: q")).unwrap();
    })
    .await;
    assert_eq!(source.store.pods().map(|pod| pod.name.name.as_str()).collect::<Vec<_>>(), ["p"]);
    assert_eq!(source.store.namespace("default").map(|namespace| namespace.labels.len()), Some(1));
    replace(&source.directory, "here.yaml", &pod("n2"));
    source.until(|store| store.pods().count() == 0).await;
}

#[tokio::test]
async fn directory_that_is_empty_or_has_only_invalid_files_is_synced() {
    RunningSource::synced(|_| {}).await;
    let source =
        RunningSource::synced(|directory| fs::write(directory.join("a.yaml"), "a: [").unwrap()).await;
    assert_eq!(source.problems.current().len(), 1);
    assert_eq!(source.problems.total(), 1);
}

#[tokio::test]
async fn missing_directory_is_an_error() {
    let (sender, _events) = mpsc::channel(1);
    let error = ManifestSource::new("/nowhere/manifests", sender, Problems::default()).unwrap_err();
    assert!(
        error.to_string().starts_with("cannot read manifest directory /nowhere/manifests: No such"),
        "{error}"
    );
}

#[tokio::test]
async fn created_changed_and_removed_files_are_applied() {
    let mut source = RunningSource::synced(|_| {}).await;
    fs::write(source.directory.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
    source.until(|store| address(store, "a").as_deref() == Some("10.0.0.1")).await;
    // in place, with the same size
    fs::write(source.directory.join("a.yaml"), service("a", "10.0.0.2")).unwrap();
    source.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    replace(&source.directory, "a.yaml", &service("a", "10.0.0.3"));
    source.until(|store| address(store, "a").as_deref() == Some("10.0.0.3")).await;
    fs::rename(source.directory.join("a.yaml"), source.directory.join("b.yaml")).unwrap();
    fs::write(source.directory.join("c.yaml"), service("c", "10.0.0.4")).unwrap();
    source.until(|store| address(store, "c").is_some()).await;
    assert_eq!(source.address("a").as_deref(), Some("10.0.0.3"));
    fs::remove_file(source.directory.join("b.yaml")).unwrap();
    source.until(|store| address(store, "a").is_none()).await;
    assert_eq!(source.problems.total(), 0);
}

#[tokio::test]
async fn update_of_a_config_map_volume_is_applied() {
    let version = |directory: &Path, version: &str, ip: &str| {
        let data = directory.join(version);
        fs::create_dir(&data).unwrap();
        fs::write(data.join("a.yaml"), service("a", ip)).unwrap();
        symlink(version, directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    };
    let mut source = RunningSource::synced(|directory| {
        version(directory, "..2026_1", "10.0.0.1");
        symlink("..data/a.yaml", directory.join("a.yaml")).unwrap();
    })
    .await;
    assert_eq!(source.address("a").as_deref(), Some("10.0.0.1"));
    version(&source.directory, "..2026_2", "10.0.0.2");
    source.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    assert_eq!(source.problems.total(), 0);
}

#[tokio::test]
async fn partly_written_file_is_not_applied() {
    let mut source = RunningSource::synced(|directory| {
        fs::write(
            directory.join("a.yaml"),
            format!("{}---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.2")),
        )
        .unwrap();
    })
    .await;
    let mut file = File::create(source.directory.join("a.yaml")).unwrap();
    file.write_all(service("a", "10.0.0.3").as_bytes()).unwrap();
    replace(&source.directory, "zz-mark.yaml", &node("n1"));
    while source.store.node("n1").is_none() {
        // the writer is still writing
        file.write_all(b"# more\n").unwrap();
        if let Ok(event) = timeout(Duration::from_millis(100), source.events.recv()).await {
            source.store.apply(event.expect("the source is running"));
        }
    }
    assert_eq!(source.address("a").as_deref(), Some("10.0.0.1"));
    assert_eq!(source.address("b").as_deref(), Some("10.0.0.2"));
    file.write_all(format!("---\n{}", service("b", "10.0.0.4")).as_bytes()).unwrap();
    drop(file);
    source.until(|store| address(store, "b").as_deref() == Some("10.0.0.4")).await;
    assert_eq!(source.address("a").as_deref(), Some("10.0.0.3"));
}

#[tokio::test]
async fn invalid_file_is_a_problem_until_it_is_corrected() {
    let mut source = RunningSource::synced(|directory| {
        fs::write(directory.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
    })
    .await;
    replace(&source.directory, "a.yaml", &service("a", "10.0.0.256"));
    source.until_problems(|problems| problems.len() == 1).await;
    assert_eq!(source.problems.current()[0].subject, "a.yaml: Service default/a");
    source.mark("n1").await;
    assert_eq!(source.address("a").as_deref(), Some("10.0.0.1"));
    replace(&source.directory, "a.yaml", &service("a", "10.0.0.2"));
    source.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    source.until_problems(<[_]>::is_empty).await;
    let (_status, seen) = watch::channel(Status::starting("n1"));
    let metrics = Metrics::new(seen);
    metrics.set_source(source.problems.clone());
    assert!(metrics.encode().contains("dataplane_source_problems_total 1\n"), "{}", metrics.encode());
}

#[tokio::test]
async fn removed_directory_removes_no_objects_and_is_read_when_recreated() {
    let mut source = RunningSource::synced(|directory| {
        fs::write(directory.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
    })
    .await;
    let away = source.directory.with_file_name("away");
    fs::rename(&source.directory, &away).unwrap();
    source.until_problems(|problems| problems.len() == 1).await;
    assert!(source.problems.current()[0].message.starts_with("cannot read directory: No such file"));
    fs::create_dir(&source.directory).unwrap();
    fs::write(source.directory.join("b.yaml"), service("b", "10.0.0.2")).unwrap();
    // the new directory does not have the file of the old one
    source.until(|store| address(store, "b").is_some() && address(store, "a").is_none()).await;
    source.until_problems(<[_]>::is_empty).await;
    // the new directory is watched
    source.mark("n1").await;
}

#[tokio::test]
async fn changed_target_of_a_symlinked_directory_is_applied() {
    let root = tempfile::tempdir().unwrap();
    let create = |name: &str, ip: &str| {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("a.yaml"), service("a", ip)).unwrap();
    };
    create("one", "10.0.0.1");
    create("two", "10.0.0.2");
    let mut source = RunningSource::synced(|directory| {
        fs::remove_dir(directory).unwrap();
        symlink(root.path().join("one"), directory).unwrap();
    })
    .await;
    let next = source.directory.with_file_name("next");
    symlink(root.path().join("two"), &next).unwrap();
    fs::rename(&next, &source.directory).unwrap();
    source.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    source.mark("n1").await;
}

#[tokio::test]
async fn a_thousand_services_send_one_event_each() {
    let mut source = RunningSource::synced(|_| {}).await;
    for n in 0..1_000 {
        let ip = format!("10.1.{}.{}", n / 250, n % 250 + 1);
        fs::write(source.directory.join(format!("s{n}.yaml")), service(&format!("s{n}"), &ip)).unwrap();
    }
    let mut events = 0;
    while source.store.services().count() < 1_000 {
        source.step().await;
        events += 1;
    }
    assert_eq!(events, 1_000);
    assert_eq!(source.problems.total(), 0);
}

#[tokio::test]
async fn source_stops_on_request() {
    let mut source = RunningSource::synced(|_| {}).await;
    source.stop.take().unwrap().send(()).unwrap();
    timeout(TIMEOUT, source.task).await.expect("the source stops in time").unwrap().unwrap();
}
