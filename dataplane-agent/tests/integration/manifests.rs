//! The manifests source on a real directory, with the kernel's own events: what reaches the state, and when.

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

/// Nothing here takes long; what does not come in this time does not come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A source that runs, and a state that hears it.
struct World {
    _root: TempDir,
    directory: PathBuf,
    events: mpsc::Receiver<SourceEvent>,
    problems: Problems,
    store: Store,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ManifestError>>,
}

impl World {
    /// Starts on a directory that `prepare` has filled.
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
        let mut world = Self::start(prepare);
        world.until(Store::is_synced).await;
        world
    }

    /// Applies events until the state is as wished.
    async fn until(&mut self, wish: impl Fn(&Store) -> bool) {
        while !wish(&self.store) {
            self.step().await;
        }
    }

    async fn step(&mut self) {
        let event = timeout(PATIENCE, self.events.recv()).await.expect("an event in time");
        self.store.apply(event.expect("the source runs"));
    }

    async fn until_problems(&mut self, wish: impl Fn(&[Problem]) -> bool) {
        let mut problems = self.problems.subscribe();
        let wished = problems.wait_for(|problems| wish(problems));
        timeout(PATIENCE, wished).await.expect("the problems in time").unwrap();
    }

    /// When this returns, the source has seen everything that happened before.
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

/// As careful programs write.
fn replace(directory: &Path, name: &str, text: &str) {
    let draft = directory.join(format!(".{name}.draft"));
    fs::write(&draft, text).unwrap();
    fs::rename(&draft, directory.join(name)).unwrap();
}

#[tokio::test]
async fn everything_there_comes_before_synced() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let world = World::synced(|directory| {
        for file in fs::read_dir(fixtures).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), directory.join(file.file_name())).unwrap();
        }
    })
    .await;
    assert_eq!(world.problems.current(), []);
    assert!(world.store.node("worker-1").is_some());
    assert_eq!(world.address("kubernetes").as_deref(), Some("10.96.0.1"));
    let web = NamespacedName::new("shop", "web");
    assert_eq!(world.store.slices_of(&web).map(|slice| slice.endpoints.len()).sum::<usize>(), 2);
    assert_eq!(world.store.services().count(), 2);
}

#[tokio::test]
async fn pods_of_this_node_are_read_as_long_as_they_are_here() {
    let pod = |node| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{nodeName: {node}}}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {{name: default, labels: {{a: b}}}}\n"
        )
    };
    let mut world = World::synced(|directory| {
        fs::write(directory.join("here.yaml"), pod("n1")).unwrap();
        fs::write(directory.join("there.yaml"), pod("n2").replace("name: p", "name: q")).unwrap();
    })
    .await;
    assert_eq!(world.store.pods().map(|pod| pod.name.name.as_str()).collect::<Vec<_>>(), ["p"]);
    assert_eq!(world.store.namespace("default").map(|namespace| namespace.labels.len()), Some(1));
    replace(&world.directory, "here.yaml", &pod("n2"));
    world.until(|store| store.pods().count() == 0).await;
}

#[tokio::test]
async fn a_directory_with_nothing_or_only_broken_files_is_synced_too() {
    World::synced(|_| {}).await;
    let world = World::synced(|directory| fs::write(directory.join("a.yaml"), "a: [").unwrap()).await;
    assert_eq!(world.problems.current().len(), 1);
    assert_eq!(world.problems.total(), 1);
}

#[tokio::test]
async fn a_directory_that_does_not_exist_is_an_error() {
    let (sender, _events) = mpsc::channel(1);
    let error = ManifestSource::new("/nowhere/manifests", sender, Problems::default()).unwrap_err();
    assert!(
        error.to_string().starts_with("cannot read manifest directory /nowhere/manifests: No such"),
        "{error}"
    );
}

#[tokio::test]
async fn files_that_come_change_and_go_are_followed() {
    let mut world = World::synced(|_| {}).await;
    fs::write(world.directory.join("a.yaml"), service("a", "10.0.0.1")).unwrap();
    world.until(|store| address(store, "a").as_deref() == Some("10.0.0.1")).await;
    // in place, of the same size
    fs::write(world.directory.join("a.yaml"), service("a", "10.0.0.2")).unwrap();
    world.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    replace(&world.directory, "a.yaml", &service("a", "10.0.0.3"));
    world.until(|store| address(store, "a").as_deref() == Some("10.0.0.3")).await;
    fs::rename(world.directory.join("a.yaml"), world.directory.join("b.yaml")).unwrap();
    fs::write(world.directory.join("c.yaml"), service("c", "10.0.0.4")).unwrap();
    world.until(|store| address(store, "c").is_some()).await;
    assert_eq!(world.address("a").as_deref(), Some("10.0.0.3"));
    fs::remove_file(world.directory.join("b.yaml")).unwrap();
    world.until(|store| address(store, "a").is_none()).await;
    assert_eq!(world.problems.total(), 0);
}

#[tokio::test]
async fn a_config_map_volume_is_followed() {
    let version = |directory: &Path, version: &str, ip: &str| {
        let data = directory.join(version);
        fs::create_dir(&data).unwrap();
        fs::write(data.join("a.yaml"), service("a", ip)).unwrap();
        symlink(version, directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    };
    let mut world = World::synced(|directory| {
        version(directory, "..2026_1", "10.0.0.1");
        symlink("..data/a.yaml", directory.join("a.yaml")).unwrap();
    })
    .await;
    assert_eq!(world.address("a").as_deref(), Some("10.0.0.1"));
    version(&world.directory, "..2026_2", "10.0.0.2");
    world.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    assert_eq!(world.problems.total(), 0);
}

#[tokio::test]
async fn a_file_half_written_is_not_believed() {
    let mut world = World::synced(|directory| {
        fs::write(
            directory.join("a.yaml"),
            format!("{}---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.2")),
        )
        .unwrap();
    })
    .await;
    let mut file = File::create(world.directory.join("a.yaml")).unwrap();
    file.write_all(service("a", "10.0.0.3").as_bytes()).unwrap();
    replace(&world.directory, "zz-mark.yaml", &node("n1"));
    while world.store.node("n1").is_none() {
        // the writer is alive
        file.write_all(b"# more\n").unwrap();
        if let Ok(event) = timeout(Duration::from_millis(100), world.events.recv()).await {
            world.store.apply(event.expect("the source runs"));
        }
    }
    assert_eq!(world.address("a").as_deref(), Some("10.0.0.1"));
    assert_eq!(world.address("b").as_deref(), Some("10.0.0.2"));
    file.write_all(format!("---\n{}", service("b", "10.0.0.4")).as_bytes()).unwrap();
    drop(file);
    world.until(|store| address(store, "b").as_deref() == Some("10.0.0.4")).await;
    assert_eq!(world.address("a").as_deref(), Some("10.0.0.3"));
}

#[tokio::test]
async fn a_broken_file_is_a_problem_until_it_is_mended() {
    let mut world =
        World::synced(|directory| fs::write(directory.join("a.yaml"), service("a", "10.0.0.1")).unwrap())
            .await;
    replace(&world.directory, "a.yaml", &service("a", "10.0.0.256"));
    world.until_problems(|problems| problems.len() == 1).await;
    assert_eq!(world.problems.current()[0].subject, "a.yaml: Service default/a");
    world.mark("n1").await;
    assert_eq!(world.address("a").as_deref(), Some("10.0.0.1"));
    replace(&world.directory, "a.yaml", &service("a", "10.0.0.2"));
    world.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    world.until_problems(<[_]>::is_empty).await;
    let (_status, seen) = watch::channel(Status::starting("n1"));
    let metrics = Metrics::new(seen);
    metrics.set_source(world.problems.clone());
    assert!(metrics.encode().contains("dataplane_source_problems_total 1\n"), "{}", metrics.encode());
}

#[tokio::test]
async fn a_directory_that_vanishes_removes_nothing_and_may_come_back() {
    let mut world =
        World::synced(|directory| fs::write(directory.join("a.yaml"), service("a", "10.0.0.1")).unwrap())
            .await;
    let away = world.directory.with_file_name("away");
    fs::rename(&world.directory, &away).unwrap();
    world.until_problems(|problems| problems.len() == 1).await;
    assert!(world.problems.current()[0].message.starts_with("cannot read directory: No such file"));
    fs::create_dir(&world.directory).unwrap();
    fs::write(world.directory.join("b.yaml"), service("b", "10.0.0.2")).unwrap();
    // the directory is back, and the file that was in the old one is not in it
    world.until(|store| address(store, "b").is_some() && address(store, "a").is_none()).await;
    world.until_problems(<[_]>::is_empty).await;
    // the new one is the one that is watched
    world.mark("n1").await;
}

#[tokio::test]
async fn a_directory_behind_a_link_is_followed_when_the_link_moves() {
    let root = tempfile::tempdir().unwrap();
    let place = |name: &str, ip: &str| {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("a.yaml"), service("a", ip)).unwrap();
    };
    place("one", "10.0.0.1");
    place("two", "10.0.0.2");
    let mut world = World::synced(|directory| {
        fs::remove_dir(directory).unwrap();
        symlink(root.path().join("one"), directory).unwrap();
    })
    .await;
    let next = world.directory.with_file_name("next");
    symlink(root.path().join("two"), &next).unwrap();
    fs::rename(&next, &world.directory).unwrap();
    world.until(|store| address(store, "a").as_deref() == Some("10.0.0.2")).await;
    world.mark("n1").await;
}

#[tokio::test]
async fn a_thousand_services_at_once_come_once_each() {
    let mut world = World::synced(|_| {}).await;
    for n in 0..1_000 {
        let ip = format!("10.1.{}.{}", n / 250, n % 250 + 1);
        fs::write(world.directory.join(format!("s{n}.yaml")), service(&format!("s{n}"), &ip)).unwrap();
    }
    let mut events = 0;
    while world.store.services().count() < 1_000 {
        world.step().await;
        events += 1;
    }
    assert_eq!(events, 1_000);
    assert_eq!(world.problems.total(), 0);
}

#[tokio::test]
async fn it_stops_when_told() {
    let mut world = World::synced(|_| {}).await;
    world.stop.take().unwrap().send(()).unwrap();
    timeout(PATIENCE, world.task).await.expect("it stops in time").unwrap().unwrap();
}
