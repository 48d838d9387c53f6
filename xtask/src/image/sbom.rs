//! The SBOM of the image in SPDX 2.3 JSON, for scanners of vulnerabilities and licenses.

use serde_json::{Value, json};

use super::{layout::timestamp, packages::Package};

/// The image that the document describes.
pub(super) struct Subject<'a> {
    pub(super) version: &'a str,
    /// The commit that the image is built from.
    pub(super) revision: &'a str,
    pub(super) architecture: &'a str,
    /// Seconds after the epoch.
    pub(super) created: u64,
    /// Linked libraries that are not packages: name, version, license.
    pub(super) runtimes: &'a [(&'static str, String, &'static str)],
}

const ROOT: &str = "SPDXRef-Image";

/// The SPDX document.
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
        let dependencies = package.dependencies.iter().filter_map(|index| packages.get(*index));
        relations
            .extend(dependencies.map(|dependency| relation(&id(package), "DEPENDS_ON", &id(dependency))));
    }
    for (name, version, license) in subject.runtimes {
        let id = format!("SPDXRef-Runtime-{name}");
        relations.push(relation(ROOT, "CONTAINS", &id));
        elements.push(common_fields(&id, name, version, license));
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

/// The fields that every package has.
fn common_fields(id: &str, name: &str, version: &str, license: &str) -> Value {
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
    let mut element = common_fields(&id(package), name, version, license);
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

/// SPDX identifier of a package: letters, digits, `.` and `-`.
fn id(package: &Package) -> String {
    let name = format!("{}-{}", package.name, package.version);
    let name = name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
    format!("SPDXRef-Package-{name}")
}

fn relation(from: &str, kind: &str, to: &str) -> Value {
    json!({ "spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to })
}
