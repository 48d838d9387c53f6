//! An image of one layer as one file, which is both an OCI layout and a Docker archive, so that
//! every tool reads it.
//!
//! Owns the JSON of both formats (opencontainers/image-spec v1.1; Docker's `manifest.json`).

use anyhow::Result;
use serde_json::{Value, json};
use tar::{Builder, EntryType};

use super::{
    digest::Digest,
    layer::{Layer, append},
};

pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// The metadata of an image.
pub(super) struct Description {
    /// Name of the image: `registry/name:tag`.
    pub(super) reference: String,
    /// Go's name: amd64, arm64.
    pub(super) architecture: &'static str,
    /// Time of creation in seconds after the epoch.
    pub(super) created: u64,
    pub(super) entrypoint: Vec<String>,
    pub(super) labels: Vec<(&'static str, String)>,
}

/// The content of the file, and the digest of the image's manifest.
pub(super) fn archive(description: &Description, layer: &Layer) -> Result<(Vec<u8>, Digest)> {
    let config = text(&config(description, layer));
    let manifest = text(&json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor(CONFIG_TYPE, &config),
        "layers": [descriptor(LAYER_TYPE, &layer.blob)],
        "annotations": labels(description),
    }));
    let mut blobs = [&config, &manifest, &layer.blob].map(|blob| (Digest::of(blob).path(), blob));
    blobs.sort();

    let mut archive = Builder::new(Vec::new());
    let seconds = description.created;
    for directory in ["blobs/", "blobs/sha256/"] {
        append(&mut archive, directory, EntryType::Directory, 0o755, &[], seconds)?;
    }
    for (path, blob) in blobs {
        append(&mut archive, &path, EntryType::Regular, 0o644, blob, seconds)?;
    }
    for (path, content) in [
        ("index.json", index(description, &manifest)),
        ("manifest.json", docker_manifest(description, &config, layer)),
        ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })),
    ] {
        append(&mut archive, path, EntryType::Regular, 0o644, &text(&content), seconds)?;
    }
    Ok((archive.into_inner()?, Digest::of(&manifest)))
}

fn config(description: &Description, layer: &Layer) -> Value {
    let created = timestamp(description.created);
    json!({
        "created": created,
        "architecture": description.architecture,
        "os": "linux",
        "config": {
            "User": "0:0",
            "Env": ["PATH=/"],
            "Entrypoint": description.entrypoint,
            "WorkingDir": "/",
            "Labels": labels(description),
        },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id.to_string()] },
        "history": [{ "created": created, "created_by": "cargo xtask image" }],
    })
}

fn index(description: &Description, manifest: &[u8]) -> Value {
    let mut descriptor = descriptor(MANIFEST_TYPE, manifest);
    descriptor["platform"] = json!({ "architecture": description.architecture, "os": "linux" });
    // containerd reads the full name from its own annotation, other tools from that of the
    // specification
    descriptor["annotations"] = json!({
        "io.containerd.image.name": description.reference,
        "org.opencontainers.image.ref.name": description.reference,
    });
    json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [descriptor] })
}

fn docker_manifest(description: &Description, config: &[u8], layer: &Layer) -> Value {
    json!([{
        "Config": Digest::of(config).path(),
        "RepoTags": [description.reference],
        "Layers": [Digest::of(&layer.blob).path()],
    }])
}

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::of(content).to_string(), "size": content.len() })
}

fn labels(description: &Description) -> Value {
    description.labels.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
}

fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// A time as RFC 3339, in UTC.
pub(super) fn timestamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // days since 0000-03-01; years begin in March, so that a leap day is the last day; 400 years
    // always have 146097 days
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_match_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_078_099_199, "2004-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_795_258_097, "2026-11-21T10:48:17Z"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
    }
}
