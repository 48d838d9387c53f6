//! Reads an image back by the formats' specifications and reports what is wrong with it.
//!
//! Shares no assumption with the writer: it follows descriptors from `index.json` down and computes
//! all digests and sizes again.

use std::{collections::BTreeMap, io::Read as _};

use anyhow::{Context as _, Result, bail, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;

use super::{
    digest::Digest,
    layout::{CONFIG_TYPE, LAYER_TYPE, MANIFEST_TYPE},
};

/// The content of a valid image.
#[derive(Debug)]
pub(super) struct Contents {
    pub(super) config: Value,
    /// Regular files of the root file system.
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

/// Reads an image. Fails unless it is valid.
pub(super) fn read(archive: &[u8], reference: &str) -> Result<Contents> {
    let files = entries(archive).context("read the image file")?;
    let layout = json(&files, "oci-layout")?;
    ensure!(layout["imageLayoutVersion"] == "1.0.0", "oci-layout: {layout}");

    let index = json(&files, "index.json")?;
    let descriptor = &index["manifests"][0];
    for name in ["io.containerd.image.name", "org.opencontainers.image.ref.name"] {
        let found = &descriptor["annotations"][name];
        ensure!(found == reference, "index.json: {name} is {found}, not {reference}");
    }
    let manifest = parse(blob(&files, descriptor, MANIFEST_TYPE)?)?;
    let config_blob = blob(&files, &manifest["config"], CONFIG_TYPE)?;
    let config = parse(config_blob)?;
    ensure!(
        config["architecture"] == descriptor["platform"]["architecture"],
        "architecture of configuration and index differ"
    );

    let layers = manifest["layers"].as_array().context("manifest: layers")?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().context("config: diff_ids")?;
    ensure!(layers.len() == diff_ids.len(), "{} layers, {} diff_ids", layers.len(), diff_ids.len());
    let mut root = BTreeMap::new();
    let mut paths = Vec::new();
    for (layer, diff_id) in layers.iter().zip(diff_ids) {
        let blob = blob(&files, layer, LAYER_TYPE)?;
        let mut unpacked = Vec::new();
        GzDecoder::new(blob).read_to_end(&mut unpacked).context("unpack a layer")?;
        let digest = Digest::of(&unpacked).to_string();
        ensure!(*diff_id == digest, "diff_id {diff_id}, but the layer is {digest}");
        root.append(&mut entries(&unpacked).context("read a layer")?);
        paths.push(Digest::of(blob).path());
    }
    docker(&json(&files, "manifest.json")?, reference, config_blob, &paths)?;
    Ok(Contents { config, files: root })
}

/// Fails unless Docker's manifest describes the same image.
fn docker(manifest: &Value, reference: &str, config: &[u8], layers: &[String]) -> Result<()> {
    let image = &manifest[0];
    ensure!(image["Config"] == Digest::of(config).path(), "manifest.json: wrong configuration: {image}");
    ensure!(image["RepoTags"] == serde_json::json!([reference]), "manifest.json: wrong name: {image}");
    ensure!(image["Layers"] == serde_json::json!(layers), "manifest.json: wrong layers: {image}");
    Ok(())
}

/// The blob of a descriptor. Fails unless digest, size and media type match.
fn blob<'a>(files: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value, media_type: &str) -> Result<&'a [u8]> {
    ensure!(descriptor["mediaType"] == media_type, "{descriptor} has not the media type {media_type}");
    let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
    let digest = digest.with_context(|| format!("no digest in {descriptor}"))?;
    let blob = files.get(&format!("blobs/sha256/{digest}"));
    let blob = blob.with_context(|| format!("no blob for {descriptor}"))?;
    let found = Digest::of(blob);
    ensure!(found.hex() == digest, "blob {digest} is {found}");
    ensure!(descriptor["size"] == blob.len(), "blob {digest} has {} bytes: {descriptor}", blob.len());
    Ok(blob)
}

/// The regular files of an archive. Fails unless paths are relative and sorted, and the owner is
/// root.
fn entries(archive: &[u8]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    let mut last = String::new();
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = String::from_utf8(entry.path_bytes().into_owned()).context("read a path")?;
        let header = entry.header();
        if (header.uid()?, header.gid()?) != (0, 0) {
            bail!("{path} is not owned by root");
        }
        ensure!(!path.starts_with('/') && !path.contains(".."), "{path} leads out of the root");
        ensure!(last < path, "{path} comes after {last}");
        if header.entry_type().is_file() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).with_context(|| format!("read {path}"))?;
            files.insert(path.clone(), content);
        }
        last = path;
    }
    Ok(files)
}

fn json(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Result<Value> {
    parse(files.get(name).with_context(|| format!("no {name}"))?).with_context(|| name.to_owned())
}

fn parse(text: &[u8]) -> Result<Value> {
    Ok(serde_json::from_slice(text)?)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            layer::Files,
            layout::{self, Description},
        },
        *,
    };

    const NAME: &str = "example.org/thing:1";

    fn image() -> Vec<u8> {
        let mut files = Files::default();
        files.program("bin/thing", vec![7; 2_000]);
        files.text("etc/passwd", "root:x:0:0:root:/:/thing\n");
        let description = Description {
            reference: NAME.to_owned(),
            architecture: "arm64",
            created: 1_700_000_000,
            entrypoint: vec!["/bin/thing".to_owned()],
            labels: vec![("org.opencontainers.image.title", "thing".to_owned())],
        };
        layout::archive(&description, &files.layer(1_700_000_000).unwrap()).unwrap().0
    }

    #[test]
    fn files_and_configuration_are_read_back() {
        let contents = read(&image(), NAME).unwrap();
        assert_eq!(contents.files["bin/thing"], vec![7; 2_000]);
        assert_eq!(contents.config["architecture"], "arm64");
        assert_eq!(contents.config["config"]["Labels"]["org.opencontainers.image.title"], "thing");
        assert_eq!(contents.config["created"], "2023-11-14T22:13:20Z");
    }

    #[test]
    fn image_written_twice_has_the_same_bytes() {
        assert_eq!(image(), image());
    }

    #[test]
    fn changed_byte_or_other_name_is_an_error() {
        assert!(
            read(&image(), "example.org/other:1").unwrap_err().to_string().contains("ref.name")
                || read(&image(), "example.org/other:1").unwrap_err().to_string().contains("image.name")
        );
        let image = image();
        let text = String::from_utf8_lossy(&image);
        // in the configuration: its digest does not match
        let at = text.find("\"os\":\"linux\",\"rootfs\"").unwrap_or_else(|| text.find("\"rootfs\"").unwrap());
        let mut broken = image.clone();
        broken[at + 1] ^= 1;
        let error = read(&broken, NAME).unwrap_err().to_string();
        assert!(error.contains("blob") && error.contains(" is sha256:"), "{error}");
    }
}
