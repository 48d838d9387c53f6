//! Scans of a real directory: which objects apply, and which problems are reported.

mod property;

use std::{collections::BTreeMap, fs, sync::Arc};

use tempfile::TempDir;

use super::{
    parse::{Content, Declaration, Format, parse},
    *,
};
use crate::state::{NamespacedName, ObjectKey, Store};

/// A directory, its reader, and a state fed by it.
struct Fixture {
    directory: TempDir,
    reader: Reader,
    store: Store,
    problems: BTreeSet<Problem>,
}

impl Fixture {
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
        let result = self.reader.scan(self.directory.path(), &HashSet::new());
        result.scan.unwrap();
        self.problems = result.problems;
        let count = result.changes.len();
        for change in result.changes {
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

fn problems(content: &Content) -> Vec<String> {
    content.problems.iter().map(|it| format!("{}: {}", it.subject, it.message)).collect()
}

fn keys(content: &Content) -> Vec<String> {
    content.declarations.iter().map(|(key, _)| key.to_string()).collect()
}

#[test]
fn documents_and_list_items_are_parsed_alike() {
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
    assert_eq!(problems(&content), [""; 0]);
    assert_eq!(keys(&content), ["a", "b", "c", "d"].map(|name| format!("Service default/{name}")));
    assert!(matches!(content.declarations[3].1, Declaration::Unused));
    assert!(!content.incomplete);
}

#[test]
fn kubectl_output_is_parsed_without_problems() {
    let everything = parse(Format::Json, include_str!("../../../tests/fixtures/everything.json"));
    assert_eq!(problems(&everything), [""; 0]);
    let expected = [
        "Pod shop/web-6d4b75cb6d-2kqgx",
        "Service shop/db",
        "Service shop/mirror",
        "Service default/kubernetes",
    ];
    assert_eq!(keys(&everything), expected);
    let slices = parse(Format::Yaml, include_str!("../../../tests/fixtures/endpointslices.yaml"));
    assert_eq!(problems(&slices), [""; 0]);
    assert_eq!(keys(&slices), ["EndpointSlice shop/web-h5wqz", "EndpointSlice shop/web-zz9pl"]);
    // a JSON file is YAML too
    let as_yaml = parse(Format::Yaml, include_str!("../../../tests/fixtures/everything.json"));
    assert_eq!(as_yaml, everything);
}

#[test]
fn problem_names_document_item_object_and_field() {
    let yaml = "kind: List\napiVersion: v1\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: p}}\n\
        - {apiVersion: v1, kind: Node, metadata: {name: n}, spec: {podCIDR: 10.0.0.1/8}}\n\
        ---\nkind: Service\nmetadata: [\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: x}\n\
        ---\napiVersion: v1\nkind: Servce\nmetadata: {name: s}\n---\napiVersion: discovery.k8s.io/v1beta1\n\
        kind: EndpointSlice\nmetadata: {name: e}\n---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: o}\n\
        ---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\n---\njust text\n\
        ---\napiVersion: v1\nkind: Service\n---\na: 1\na: 2\n";
    let content = parse(Format::Yaml, yaml);
    let problems = problems(&content);
    let expected = [
        "document 1, item 2: Node n: spec.podCIDR: \"10.0.0.1/8\" has bits set after its prefix",
        "document 2: did not find expected node content",
        "document 3: Deployment x/d: kind: apps/v1 Deployment is not supported",
        "document 4: Service default/s: kind: \"Servce\" is unknown: did you mean Service?",
        "document 5: EndpointSlice default/e: apiVersion: \"discovery.k8s.io/v1beta1\"; EndpointSlice is read in version",
        "document 6: Endpoints o: kind: Endpoints is not supported; use EndpointSlice",
        "document 7: Service k: kind: serving.knative.dev/v1 Service is not supported",
        "document 8: expected an object, found a string",
        "document 9: Service: metadata.name: missing",
        "document 10: duplicate entry with key \"a\"",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.starts_with(expected), "{problem}\n{expected}");
    }
    // the line in the file, not in the document
    assert!(problems[1].contains("line 9"), "{}", problems[1]);
    assert_eq!(keys(&content), ["Pod default/p", "Node n", "Service default/s", "EndpointSlice default/e"]);
}

#[test]
fn last_valid_version_of_invalid_object_stays() {
    let mut fixture = Fixture::new();
    let both = format!("{}---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.2"));
    fixture.write("s.yaml", &both);
    fixture.write("t.yaml", &service("c", "10.0.0.3"));
    assert_eq!(fixture.scan(), 3);
    for broken in [
        both.replace("10.0.0.1", "10.0.0.300"),
        both.replace("kind: Service\nmetadata:\n  name: a", "kind: Servise\nmetadata:\n  name: a"),
        both.replace("  name: a", "  nam: a"),
        both.replace("  name: a", "  name: [a"),
        format!("{}---\n{{", service("b", "10.0.0.2")),
        "\u{0}".to_owned(),
    ] {
        fixture.write("s.yaml", &broken);
        assert_eq!(fixture.scan(), 0, "{broken}");
        assert_eq!(fixture.problems.len(), 1, "{broken}: {:?}", fixture.problems);
        // the other objects are still updated
        fixture.write("s.yaml", &broken.replace("10.0.0.2", "10.0.0.9"));
        fixture.scan();
        if broken.contains("10.0.0.2") {
            assert_eq!(fixture.addresses()["b"], "10.0.0.9");
        }
        assert_eq!(fixture.addresses()["a"], "10.0.0.1");
        fixture.write("s.yaml", &both);
        fixture.scan();
        assert_eq!(fixture.problems(), [""; 0]);
    }
    // a missing object is deleted, not invalid
    fixture.write("s.yaml", &service("b", "10.0.0.2"));
    fixture.scan();
    assert_eq!(fixture.addresses().into_keys().collect::<Vec<_>>(), ["b", "c"]);
    fixture.remove("t.yaml");
    fixture.scan();
    assert_eq!(fixture.addresses().into_keys().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn declaration_in_first_file_applies() {
    let mut fixture = Fixture::new();
    fixture.write("b.yaml", &service("a", "10.0.0.2"));
    fixture.scan();
    fixture.write("c.yaml", &service("a", "10.0.0.3"));
    fixture.scan();
    assert_eq!(fixture.addresses()["a"], "10.0.0.2");
    assert_eq!(
        fixture.problems(),
        [
            "c.yaml: Service default/a: is also declared in b.yaml, which takes precedence: remove one of the two"
        ]
    );
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.scan();
    assert_eq!(fixture.addresses()["a"], "10.0.0.1");
    assert_eq!(fixture.problems.len(), 2);
    fixture.remove("a.yaml");
    fixture.remove("b.yaml");
    fixture.scan();
    assert_eq!(fixture.addresses()["a"], "10.0.0.3");
    assert_eq!(fixture.problems(), [""; 0]);
}

#[test]
fn service_that_becomes_headless_is_removed() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.scan();
    fixture.write("a.yaml", &service("a", "None"));
    assert_eq!(fixture.scan(), 1);
    assert_eq!((fixture.addresses().len(), fixture.problems.len()), (0, 0));
}

#[test]
fn conflict_problem_names_file_and_both_objects() {
    let mut fixture = Fixture::new();
    fixture.write("b.yaml", &service("first", "10.0.0.1"));
    fixture.scan();
    fixture.write("a.yaml", &service("late", "10.0.0.1"));
    fixture.scan();
    let problem = "a.yaml: Service default/late: cluster IP 10.0.0.1 is already used by Service default/first: not \
        applied until Service default/first releases it";
    assert_eq!(fixture.problems(), [problem]);
    fixture.remove("b.yaml");
    fixture.scan();
    assert_eq!(fixture.addresses().into_keys().collect::<Vec<_>>(), ["late"]);
    assert_eq!(fixture.problems(), [""; 0]);
}

#[test]
fn only_manifest_files_are_read() {
    let mut fixture = Fixture::new();
    for name in ["a.txt", ".hidden.yaml", "a.yaml~", "a.yaml.swp", "yaml", "README.md"] {
        fixture.write(name, "not: [a manifest");
    }
    fs::create_dir(fixture.directory.path().join("directory")).unwrap();
    assert_eq!((fixture.scan(), fixture.problems.len()), (0, 0));
}

#[test]
fn unreadable_file_is_a_problem_and_keeps_its_objects() {
    let mut fixture = Fixture::new();
    let path = fixture.directory.path().join("a.yaml");
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.scan();
    fs::write(&path, [0xff, 0xfe]).unwrap();
    assert_eq!(fixture.scan(), 0);
    assert!(fixture.problems()[0].starts_with("a.yaml: not UTF-8"), "{:?}", fixture.problems);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(fixture.scan(), 0);
    assert!(
        fixture.problems()[0].starts_with("a.yaml: cannot read file: No such file"),
        "{:?}",
        fixture.problems
    );
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(fixture.scan(), 0);
    assert!(
        fixture.problems()[0].starts_with("a.yaml: cannot read file: not a regular file"),
        "{:?}",
        fixture.problems
    );
    fs::remove_file(&path).unwrap();
    assert_eq!((fixture.scan(), fixture.problems.len()), (1, 0));
}

#[test]
fn file_being_written_keeps_previous_content() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.scan();
    fixture.write("a.yaml", "");
    let writing = HashSet::from([OsString::from("a.yaml")]);
    let result = fixture.reader.scan(fixture.directory.path(), &writing);
    assert_eq!(result.changes, []);
    assert!(result.scan.unwrap().being_written);
    assert_eq!(fixture.scan(), 1);
}

#[test]
fn unchanged_file_is_not_parsed_again() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    let object = |fixture: &Fixture| {
        let key = ObjectKey::Service(NamespacedName::new("default", "a"));
        fixture.reader.declarations.declaration(&key)
    };
    // wait until the file is old enough that a later change has other timestamps
    while fixture.reader.scan(fixture.directory.path(), &HashSet::new()).scan.unwrap().too_recent {}
    let before = object(&fixture);
    fixture.scan();
    let after = object(&fixture);
    assert!(
        matches!((before, after), (Some(Declaration::Valid(one)), Some(Declaration::Valid(two))) if Arc::ptr_eq(&one, &two))
    );
}

#[test]
fn missing_directory_changes_nothing() {
    let mut fixture = Fixture::new();
    fixture.write("a.yaml", &service("a", "10.0.0.1"));
    fixture.scan();
    let result = fixture.reader.scan(Path::new("/nowhere"), &HashSet::new());
    assert!(result.scan.is_err());
    assert_eq!(result.changes, []);
}
