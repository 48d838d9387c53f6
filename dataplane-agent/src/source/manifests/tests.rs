//! Files in a real directory, scan by scan: what is believed of them, and what is complained of.

use std::{collections::BTreeMap, fs, sync::Arc};

use proptest::prelude::*;
use tempfile::TempDir;

use super::{
    parse::{Claim, Content, Format, parse},
    *,
};
use crate::state::{NamespacedName, ObjectKey, Store};

/// A directory, its reader, and a state that hears of it.
struct World {
    directory: TempDir,
    reader: Reader,
    store: Store,
    problems: BTreeSet<Problem>,
}

impl World {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            reader: Reader::default(),
            store: Store::default(),
            problems: BTreeSet::new(),
        }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.directory.path().join(name)).unwrap();
    }

    fn scan(&mut self) -> usize {
        let look = self.reader.look(self.directory.path(), &HashSet::new());
        look.scan.unwrap();
        self.problems = look.problems;
        let count = look.changes.len();
        for change in look.changes {
            self.store.apply(change);
        }
        count
    }

    fn addresses(&self) -> BTreeMap<String, String> {
        self.store.services().map(|it| (it.name.name.to_string(), it.cluster_ips[0].to_string())).collect()
    }

    fn problems(&self) -> Vec<String> {
        self.problems.iter().map(|it| format!("{}: {}", it.subject, it.message)).collect()
    }
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {ip}\n  ports:\n  - port: 80\n"
    )
}

fn complaints(content: &Content) -> Vec<String> {
    content.complaints.iter().map(|it| format!("{}: {}", it.subject, it.message)).collect()
}

fn keys(content: &Content) -> Vec<String> {
    content.claims.iter().map(|(key, _)| key.to_string()).collect()
}

#[test]
fn documents_and_lists_are_read_alike() {
    let one = |name| {
        format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, \
        spec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}]}}}}"
        )
    };
    let yaml = format!(
        "# a comment\n%YAML 1.2\n---\n{}\n--- # another\n---\n\n--- {}\n...\n---\nkind: List\napiVersion: v1\nitems:\n\
         - {}\n---\nkind: ServiceList\napiVersion: v1\nitems:\n- metadata: {{name: d}}\n  \
         spec: {{clusterIP: None}}\n---\nkind: List\napiVersion: v1\nitems: null\n",
        one("a"),
        one("b"),
        one("c"),
    );
    let content = parse(Format::Yaml, &yaml);
    assert_eq!(complaints(&content), [""; 0]);
    assert_eq!(keys(&content), ["a", "b", "c", "d"].map(|name| format!("Service default/{name}")));
    assert!(matches!(content.claims[3].1, Claim::Nothing));
    assert!(!content.opaque);
}

#[test]
fn fixtures_of_kubectl_are_read_without_complaint() {
    let everything = parse(Format::Json, include_str!("../../../tests/fixtures/everything.json"));
    assert_eq!(complaints(&everything), [""; 0]);
    let expected = [
        "Pod shop/web-6d4b75cb6d-2kqgx",
        "Service shop/db",
        "Service shop/mirror",
        "Service default/kubernetes",
    ];
    assert_eq!(keys(&everything), expected);
    let slices = parse(Format::Yaml, include_str!("../../../tests/fixtures/endpointslices.yaml"));
    assert_eq!(complaints(&slices), [""; 0]);
    assert_eq!(keys(&slices), ["EndpointSlice shop/web-h5wqz", "EndpointSlice shop/web-zz9pl"]);
    // a JSON file is YAML too
    let as_yaml = parse(Format::Yaml, include_str!("../../../tests/fixtures/everything.json"));
    assert_eq!(as_yaml, everything);
}

#[test]
fn a_complaint_names_document_item_object_and_field() {
    let yaml = "kind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: p}}\n\
        - {apiVersion: v1, kind: Node, metadata: {name: n}, spec: {podCIDR: 10.0.0.1/8}}\n\
        ---\nkind: Service\nmetadata: [\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: x}\n\
        ---\napiVersion: v1\nkind: Servce\nmetadata: {name: s}\n---\napiVersion: discovery.k8s.io/v1beta1\n\
        kind: EndpointSlice\nmetadata: {name: e}\n---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: o}\n\
        ---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\n---\njust text\n\
        ---\napiVersion: v1\nkind: Service\n---\na: 1\na: 2\n";
    let content = parse(Format::Yaml, yaml);
    let complaints = complaints(&content);
    let expected = [
        "document 1, item 2: Node n: spec.podCIDR: \"10.0.0.1/8\" has bits set after its prefix",
        "document 2: did not find expected node content",
        "document 3: Deployment x/d: kind: apps/v1 Deployment is unknown",
        "document 4: Service default/s: kind: \"Servce\" is unknown: is Service meant?",
        "document 5: EndpointSlice default/e: apiVersion: \"discovery.k8s.io/v1beta1\"; EndpointSlice is read as",
        "document 6: Endpoints o: kind: Endpoints is not supported; EndpointSlice is",
        "document 7: Service k: kind: serving.knative.dev/v1 Service is unknown",
        "document 8: expected an object, found a string",
        "document 9: Service: metadata.name: missing",
        "document 10: duplicate entry with key \"a\"",
    ];
    assert_eq!(complaints.len(), expected.len(), "{complaints:#?}");
    for (complaint, expected) in complaints.iter().zip(expected) {
        assert!(complaint.starts_with(expected), "{complaint}\n{expected}");
    }
    // where in the file, not in the document
    assert!(complaints[1].contains("line 9"), "{}", complaints[1]);
    assert_eq!(keys(&content), ["Pod default/p", "Node n", "Service default/s", "EndpointSlice default/e"]);
}

#[test]
fn the_last_good_state_of_a_broken_object_stays() {
    let mut world = World::new();
    let both = format!("{}---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.2"));
    world.write("s.yaml", &both);
    world.write("t.yaml", &service("c", "10.0.0.3"));
    assert_eq!(world.scan(), 3);
    for broken in [
        both.replace("10.0.0.1", "10.0.0.300"),
        both.replace("kind: Service\nmetadata:\n  name: a", "kind: Servise\nmetadata:\n  name: a"),
        both.replace("  name: a", "  nam: a"),
        both.replace("  name: a", "  name: [a"),
        format!("{}---\n{{", service("b", "10.0.0.2")),
        "\u{0}".to_owned(),
    ] {
        world.write("s.yaml", &broken);
        assert_eq!(world.scan(), 0, "{broken}");
        assert_eq!(world.problems.len(), 1, "{broken}: {:?}", world.problems);
        // the others go on
        world.write("s.yaml", &broken.replace("10.0.0.2", "10.0.0.9"));
        world.scan();
        if broken.contains("10.0.0.2") {
            assert_eq!(world.addresses()["b"], "10.0.0.9");
        }
        assert_eq!(world.addresses()["a"], "10.0.0.1");
        world.write("s.yaml", &both);
        world.scan();
        assert_eq!(world.problems(), [""; 0]);
    }
    // not there is not broken
    world.write("s.yaml", &service("b", "10.0.0.2"));
    world.scan();
    assert_eq!(world.addresses().into_keys().collect::<Vec<_>>(), ["b", "c"]);
    world.remove("t.yaml");
    world.scan();
    assert_eq!(world.addresses().into_keys().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn the_first_of_two_files_counts() {
    let mut world = World::new();
    world.write("b.yaml", &service("a", "10.0.0.2"));
    world.scan();
    world.write("c.yaml", &service("a", "10.0.0.3"));
    world.scan();
    assert_eq!(world.addresses()["a"], "10.0.0.2");
    assert_eq!(world.problems(), ["c.yaml: Service default/a: is in b.yaml too, which counts"]);
    world.write("a.yaml", &service("a", "10.0.0.1"));
    world.scan();
    assert_eq!(world.addresses()["a"], "10.0.0.1");
    assert_eq!(world.problems.len(), 2);
    world.remove("a.yaml");
    world.remove("b.yaml");
    world.scan();
    assert_eq!(world.addresses()["a"], "10.0.0.3");
    assert_eq!(world.problems(), [""; 0]);
}

#[test]
fn a_service_that_becomes_headless_goes() {
    let mut world = World::new();
    world.write("a.yaml", &service("a", "10.0.0.1"));
    world.scan();
    world.write("a.yaml", &service("a", "None"));
    assert_eq!(world.scan(), 1);
    assert_eq!((world.addresses().len(), world.problems.len()), (0, 0));
}

#[test]
fn a_conflict_names_both_and_the_file() {
    let mut world = World::new();
    world.write("b.yaml", &service("held", "10.0.0.1"));
    world.scan();
    world.write("a.yaml", &service("late", "10.0.0.1"));
    world.scan();
    let problem = "a.yaml: Service default/late: cluster IP 10.0.0.1 is held by Service default/held: refused \
        until that goes";
    assert_eq!(world.problems(), [problem]);
    world.remove("b.yaml");
    world.scan();
    assert_eq!(world.addresses().into_keys().collect::<Vec<_>>(), ["late"]);
    assert_eq!(world.problems(), [""; 0]);
}

#[test]
fn only_manifests_are_read() {
    let mut world = World::new();
    for name in ["a.txt", ".hidden.yaml", "a.yaml~", "a.yaml.swp", "yaml", "README.md"] {
        world.write(name, "not: [a manifest");
    }
    fs::create_dir(world.directory.path().join("directory")).unwrap();
    assert_eq!((world.scan(), world.problems.len()), (0, 0));
}

#[test]
fn a_file_that_cannot_be_read_is_a_problem_and_keeps_its_objects() {
    let mut world = World::new();
    let path = world.directory.path().join("a.yaml");
    world.write("a.yaml", &service("a", "10.0.0.1"));
    world.scan();
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert_eq!(world.scan(), 0);
    assert!(world.problems()[0].starts_with("a.yaml: not UTF-8"), "{:?}", world.problems);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(world.scan(), 0);
    assert!(world.problems()[0].starts_with("a.yaml: read: No such file"), "{:?}", world.problems);
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(world.scan(), 0);
    assert!(world.problems()[0].starts_with("a.yaml: read: not a regular file"), "{:?}", world.problems);
    fs::remove_file(&path).unwrap();
    assert_eq!((world.scan(), world.problems.len()), (1, 0));
}

#[test]
fn a_file_that_is_being_written_waits() {
    let mut world = World::new();
    world.write("a.yaml", &service("a", "10.0.0.1"));
    world.scan();
    world.write("a.yaml", "");
    let writing = HashSet::from([OsString::from("a.yaml")]);
    let look = world.reader.look(world.directory.path(), &writing);
    assert_eq!(look.changes, []);
    assert!(look.scan.unwrap().unsettled);
    assert_eq!(world.scan(), 1);
}

#[test]
fn an_unchanged_file_is_not_parsed_again() {
    let mut world = World::new();
    world.write("a.yaml", &service("a", "10.0.0.1"));
    let object = |world: &World| {
        let key = ObjectKey::Service(NamespacedName::new("default", "a"));
        world.reader.claims.claim(&key)
    };
    // until the file is old enough that a later change cannot have the same times
    while world.reader.look(world.directory.path(), &HashSet::new()).scan.unwrap().too_fresh {}
    let before = object(&world);
    world.scan();
    let after = object(&world);
    assert!(
        matches!((before, after), (Some(Claim::Is(one)), Some(Claim::Is(two))) if Arc::ptr_eq(&one, &two))
    );
}

#[test]
fn a_directory_that_is_gone_changes_nothing() {
    let mut world = World::new();
    world.write("a.yaml", &service("a", "10.0.0.1"));
    world.scan();
    let look = world.reader.look(Path::new("/nowhere"), &HashSet::new());
    assert!(look.scan.is_err());
    assert_eq!(look.changes, []);
}

/// What a random document of a random file says.
#[derive(Clone, Debug)]
enum Said {
    Service(u8, u8),
    Headless(u8),
    Broken(u8),
}

#[derive(Clone, Debug)]
enum Edit {
    Write(u8, Vec<Said>),
    Remove(u8),
}

fn edit() -> impl Strategy<Value = Edit> {
    let said = prop_oneof![
        6 => (0_u8..6, 0_u8..50).prop_map(|(name, ip)| Said::Service(name, ip)),
        1 => (0_u8..6).prop_map(Said::Headless),
        1 => (0_u8..6).prop_map(Said::Broken),
    ];
    prop_oneof![
        4 => (0_u8..3, prop::collection::vec(said, 0..4)).prop_map(|(file, said)| Edit::Write(file, said)),
        1 => (0_u8..3).prop_map(Edit::Remove),
    ]
}

fn text(said: &[Said]) -> String {
    let documents = said.iter().map(|said| match said {
        // an address that belongs to the name: conflicts have their own test
        Said::Service(name, ip) => service(&format!("s{name}"), &format!("10.0.{name}.{ip}")),
        Said::Headless(name) => service(&format!("s{name}"), "None"),
        Said::Broken(name) => service(&format!("s{name}"), "10.0.0"),
    });
    documents.collect::<Vec<_>>().join("---\n")
}

/// The same, by the book: the first that names a service counts; a broken one leaves it as it is.
fn expect(files: &BTreeMap<u8, Vec<Said>>, believed: &mut BTreeMap<String, String>) {
    let mut first: BTreeMap<u8, &Said> = BTreeMap::new();
    for said in files.values().flatten() {
        let (Said::Service(name, _) | Said::Headless(name) | Said::Broken(name)) = said;
        first.entry(*name).or_insert(said);
    }
    believed.retain(|name, _| first.keys().any(|it| format!("s{it}") == *name));
    for (name, said) in first {
        match said {
            Said::Service(_, ip) => {
                believed.insert(format!("s{name}"), format!("10.0.{name}.{ip}"));
            }
            Said::Headless(_) => {
                believed.remove(&format!("s{name}"));
            }
            Said::Broken(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn after_any_edits_the_state_is_what_the_files_say(
        edits in prop::collection::vec((edit(), any::<bool>()), 1..20)
    ) {
        let mut world = World::new();
        let (mut files, mut believed) = (BTreeMap::new(), BTreeMap::new());
        for (edit, scan) in &edits {
            match edit {
                Edit::Write(file, said) => {
                    world.write(&format!("{file}.yaml"), &text(said));
                    files.insert(*file, said.clone());
                }
                Edit::Remove(file) => {
                    if files.remove(file).is_some() {
                        world.remove(&format!("{file}.yaml"));
                    }
                }
            }
            // several edits may be one scan
            if *scan {
                world.scan();
                expect(&files, &mut believed);
                prop_assert_eq!(world.addresses(), believed.clone());
            }
        }
        world.scan();
        expect(&files, &mut believed);
        prop_assert_eq!(world.addresses(), believed);
        prop_assert_eq!(world.scan(), 0);
    }
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("apiVersion: v1\n".to_owned()),
        Just("apiVersion: discovery.k8s.io/v1\n".to_owned()),
        Just("kind: Service\n".to_owned()),
        Just("kind: List\nitems:\n- ".to_owned()),
        Just("kind: EndpointSlice\n".to_owned()),
        Just("kind: Node\n".to_owned()),
        Just("metadata: {name: a}\n".to_owned()),
        Just("spec: {clusterIP: 10.0.0.1, ports: [{port: 1}]}\n".to_owned()),
        Just("spec:\n  podCIDRs: [10.0.0.0/8, &a {b: *a}]\n".to_owned()),
        Just("---\n".to_owned()),
        Just("...".to_owned()),
        Just("{\"kind\": \"Service\", \"metadata\": {\"name\": \"x\"}}".to_owned()),
        "\\PC{0,12}",
        "[-:\\[\\]{}&*!|>'\"%@`#?, \n\ta-z0-9]{0,20}",
    ]
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(fragments in prop::collection::vec(fragment(), 0..14)) {
        let text = fragments.concat();
        for format in [Format::Yaml, Format::Json] {
            let content = parse(format, &text);
            // what is not understood is said
            prop_assert!(!content.opaque || !content.complaints.is_empty());
        }
    }
}
