//! What the image is made of, for programs that look for known faults and licenses: SPDX 2.3, as JSON.

use serde_json::{Value, json};

use super::{layout::timestamp, packages::Package};

/// What the document is about.
pub(super) struct Subject<'a> {
    pub(super) version: &'a str,
    /// The commit it was made of, if it is known.
    pub(super) revision: &'a str,
    pub(super) architecture: &'a str,
    /// Seconds after the epoch.
    pub(super) created: u64,
    /// What is linked in besides packages: name, version, license.
    pub(super) runtimes: &'a [(&'static str, String, &'static str)],
}

const ROOT: &str = "SPDXRef-Image";

/// The document.
pub(super) fn document(subject: &Subject<'_>, packages: &[Package]) -> Value {
    let Subject { version, revision, architecture, .. } = *subject;
    let mut elements = vec![json!({
        "SPDXID": ROOT,
        "name": "dataplane",
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "MIT OR Apache-2.0",
        "copyrightText": "NOASSERTION",
        "primaryPackagePurpose": "CONTAINER",
    })];
    let mut relations = vec![relation("SPDXRef-DOCUMENT", "DESCRIBES", ROOT)];
    for package in packages {
        elements.push(element(package));
        relations.push(relation(ROOT, "CONTAINS", &id(package)));
        let needs = package.needs.iter().filter_map(|at| packages.get(*at));
        relations.extend(needs.map(|need| relation(&id(package), "DEPENDS_ON", &id(need))));
    }
    for (name, version, license) in subject.runtimes {
        let id = format!("SPDXRef-Runtime-{name}");
        relations.push(relation(ROOT, "CONTAINS", &id));
        elements.push(described(&id, name, version, license));
    }
    json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": format!("dataplane-{version}-{architecture}"),
        "documentNamespace": format!("https://dataplane.local/spdx/dataplane-{version}-{revision}-{architecture}"),
        "creationInfo": { "created": timestamp(subject.created), "creators": ["Tool: cargo-xtask-image"] },
        "packages": elements,
        "relationships": relations,
    })
}

/// What SPDX asks of every package, as far as it is known of all.
fn described(id: &str, name: &str, version: &str, license: &str) -> Value {
    json!({
        "SPDXID": id,
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": license,
        "copyrightText": "NOASSERTION",
    })
}

fn element(package: &Package) -> Value {
    let Package { name, version, .. } = package;
    let license = package.license.as_deref().unwrap_or("NOASSERTION");
    let mut element = described(&id(package), name, version, license);
    if let Some(checksum) = &package.checksum {
        element["downloadLocation"] =
            json!(format!("https://crates.io/api/v1/crates/{name}/{version}/download"));
        element["checksums"] = json!([{ "algorithm": "SHA256", "checksumValue": checksum }]);
        element["externalRefs"] = json!([{
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": format!("pkg:cargo/{name}@{}", version.replace('+', "%2B")),
        }]);
    }
    element
}

/// Letters, digits, `.` and `-` only.
fn id(package: &Package) -> String {
    let name = format!("{}-{}", package.name, package.version);
    let name = name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
    format!("SPDXRef-Package-{name}")
}

fn relation(from: &str, kind: &str, to: &str) -> Value {
    json!({ "spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to })
}
