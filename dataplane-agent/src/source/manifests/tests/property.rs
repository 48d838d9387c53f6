//! Properties: the state follows the files after any edits, and the parser accepts any text.

use proptest::prelude::*;

use super::*;

/// A random document of a random file.
#[derive(Clone, Debug)]
enum Document {
    Service(u8, u8),
    Headless(u8),
    Broken(u8),
}

#[derive(Clone, Debug)]
enum Edit {
    Write(u8, Vec<Document>),
    Remove(u8),
}

fn edit() -> impl Strategy<Value = Edit> {
    let document = prop_oneof![
        6 => (0_u8..6, 0_u8..50).prop_map(|(name, ip)| Document::Service(name, ip)),
        1 => (0_u8..6).prop_map(Document::Headless),
        1 => (0_u8..6).prop_map(Document::Broken),
    ];
    prop_oneof![
        4 => (0_u8..3, prop::collection::vec(document, 0..4)).prop_map(|(file, document)| Edit::Write(file, document)),
        1 => (0_u8..3).prop_map(Edit::Remove),
    ]
}

fn text(document: &[Document]) -> String {
    let documents = document.iter().map(|document| match document {
        // each name has its own addresses: conflicts have their own test
        Document::Service(name, ip) => service(&format!("s{name}"), &format!("10.0.{name}.{ip}")),
        Document::Headless(name) => service(&format!("s{name}"), "None"),
        Document::Broken(name) => service(&format!("s{name}"), "10.0.0"),
    });
    documents.collect::<Vec<_>>().join("---\n")
}

/// The specification: the first document that names a Service applies; an invalid one leaves it
/// unchanged.
fn update_expected(files: &BTreeMap<u8, Vec<Document>>, applied: &mut BTreeMap<String, String>) {
    let mut first: BTreeMap<u8, &Document> = BTreeMap::new();
    for document in files.values().flatten() {
        let (Document::Service(name, _) | Document::Headless(name) | Document::Broken(name)) = document;
        first.entry(*name).or_insert(document);
    }
    applied.retain(|name, _| first.keys().any(|it| format!("s{it}") == *name));
    for (name, document) in first {
        match document {
            Document::Service(_, ip) => {
                applied.insert(format!("s{name}"), format!("10.0.{name}.{ip}"));
            }
            Document::Headless(_) => {
                applied.remove(&format!("s{name}"));
            }
            Document::Broken(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn state_matches_files_after_any_edits(
        edits in prop::collection::vec((edit(), any::<bool>()), 1..20)
    ) {
        let mut fixture = Fixture::new();
        let (mut files, mut applied) = (BTreeMap::new(), BTreeMap::new());
        for (edit, scan) in &edits {
            match edit {
                Edit::Write(file, document) => {
                    fixture.write(&format!("{file}.yaml"), &text(document));
                    files.insert(*file, document.clone());
                }
                Edit::Remove(file) => {
                    if files.remove(file).is_some() {
                        fixture.remove(&format!("{file}.yaml"));
                    }
                }
            }
            // several edits may be one scan
            if *scan {
                fixture.scan();
                update_expected(&files, &mut applied);
                prop_assert_eq!(fixture.addresses(), applied.clone());
            }
        }
        fixture.scan();
        update_expected(&files, &mut applied);
        prop_assert_eq!(fixture.addresses(), applied);
        prop_assert_eq!(fixture.scan(), 0);
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
    fn parser_never_panics(fragments in prop::collection::vec(fragment(), 0..14)) {
        let text = fragments.concat();
        for format in [Format::Yaml, Format::Json] {
            let content = parse(format, &text);
            // an incomplete file has a problem
            prop_assert!(!content.incomplete || !content.problems.is_empty());
        }
    }
}
