//! Installs the CNI plugin and its configuration for the container runtime.
//!
//! Files are replaced atomically, the configuration last, because kubelet reports the node ready
//! once it exists. It stays when the agent stops (the plugin waits for the next one); only
//! `cleanup` removes it. Knows no API server.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

/// Name of the plugin: its file, and its `type` in the configuration.
pub(super) const PLUGIN: &str = "dataplane-cni";
/// File name of the configuration. Runtimes use the first file by name.
pub(super) const CONFLIST: &str = "05-dataplane.conflist";
/// Socket that the plugin uses if the configuration names none.
const DEFAULT_SOCKET: &str = "/run/dataplane/agent.sock";
/// Extensions of configuration files (go-cni, ocicni).
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// Error of a file operation.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}: {source}")]
pub struct InstallError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Files to install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Install {
    /// The plugin binary to copy.
    pub plugin: PathBuf,
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
    /// The API socket.
    pub socket: PathBuf,
}

impl Install {
    /// Installs the plugin binary that is in the same directory as the agent's.
    ///
    /// # Errors
    ///
    /// `/proc/self/exe` cannot be read.
    pub fn new(bin_dir: &Path, conf_dir: &Path, run_dir: &Path) -> Result<Self, InstallError> {
        let link = Path::new("/proc/self/exe");
        let agent = fs::read_link(link).map_err(failed("read", link))?;
        Ok(Self {
            plugin: agent.with_file_name(PLUGIN),
            bin_dir: bin_dir.to_owned(),
            conf_dir: conf_dir.to_owned(),
            socket: run_dir.join("agent.sock"),
        })
    }

    /// Installs the plugin; returns true if it changed. Running instances of an old plugin
    /// continue.
    pub fn install_plugin(&self) -> Result<bool, InstallError> {
        let target = self.bin_dir.join(PLUGIN);
        let mut plugin = File::open(&self.plugin).map_err(failed("open", &self.plugin))?;
        let mut contents = Vec::new();
        plugin.read_to_end(&mut contents).map_err(failed("read", &self.plugin))?;
        write_atomically(&target, &contents, 0o755)
    }

    /// Installs the configuration; returns true if it changed. From then on kubelet starts pods.
    pub fn install_conflist(&self) -> Result<bool, InstallError> {
        let text = format!("{:#}\n", self.configuration());
        write_atomically(&self.conf_dir.join(CONFLIST), text.as_bytes(), 0o644)
    }

    fn configuration(&self) -> Value {
        let mut plugin = json!({
            "type": PLUGIN,
            "capabilities": { "portMappings": true, "bandwidth": true },
        });
        if self.socket != Path::new(DEFAULT_SOCKET) {
            plugin["agentSocket"] = json!(self.socket);
        }
        json!({ "cniVersion": "1.0.0", "name": "dataplane", "plugins": [plugin] })
    }

    /// Configurations that sort before ours, so that the runtime uses them instead.
    pub fn competing_configs(&self) -> Result<Vec<PathBuf>, InstallError> {
        let entries = match fs::read_dir(&self.conf_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &self.conf_dir)(error)),
        };
        let mut competing: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let is_config =
                    path.extension().and_then(OsStr::to_str).is_some_and(|end| EXTENSIONS.contains(&end));
                is_config && path.file_name().is_some_and(|name| name < OsStr::new(CONFLIST))
            })
            // Multus must come first: it delegates to our plugin
            .filter(|path| !fs::read_to_string(path).is_ok_and(|text| text.contains("multus")))
            .collect();
        competing.sort();
        Ok(competing)
    }
}

/// Installed files of ours, for `cleanup`. A conflist with our name but another plugin is not ours.
pub fn installed_files(bin_dir: &Path, conf_dir: &Path) -> Vec<PathBuf> {
    let conflist = conf_dir.join(CONFLIST);
    let names_our_plugin = fs::read_to_string(&conflist).is_ok_and(|text| text.contains(PLUGIN));
    // the configuration first: without it, the plugin is not called
    let mut files = Vec::from_iter(names_our_plugin.then_some(conflist));
    files.extend(Some(bin_dir.join(PLUGIN)).filter(|path| path.exists()));
    files
}

/// Writes `contents` to `path` atomically. Returns false if it was up to date.
fn write_atomically(path: &Path, contents: &[u8], mode: u32) -> Result<bool, InstallError> {
    let is_current = fs::read(path).is_ok_and(|found| found == contents)
        && fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o777 == mode);
    if is_current {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(failed("create", directory))?;
    // an extension that runtimes ignore
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = File::options().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(contents)?;
        // regardless of the umask
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(failed("write", &temporary))?;
    fs::rename(&temporary, path).map_err(failed("write", path))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("sync", directory))?;
    Ok(true)
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError { operation, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(at: &Path) -> Install {
        fs::write(at.join("plugin"), "program 1").unwrap();
        Install {
            plugin: at.join("plugin"),
            bin_dir: at.join("opt/cni/bin"),
            conf_dir: at.join("etc/cni/net.d"),
            socket: DEFAULT_SOCKET.into(),
        }
    }

    #[test]
    fn plugin_and_configuration_are_written_once_and_updated_on_change() {
        let at = tempfile::tempdir().unwrap();
        let mut install = install(at.path());
        assert!(install.install_plugin().unwrap());
        assert!(!install.install_plugin().unwrap());
        let program = install.bin_dir.join(PLUGIN);
        assert_eq!(fs::read(&program).unwrap(), b"program 1");
        assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(install.install_conflist().unwrap());
        assert!(!install.install_conflist().unwrap());
        let text = fs::read_to_string(install.conf_dir.join(CONFLIST)).unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(found["plugins"][0]["type"], "dataplane-cni");
        assert_eq!(found["plugins"][0]["capabilities"], json!({"portMappings": true, "bandwidth": true}));
        assert_eq!(found["plugins"][0].get("agentSocket"), None);

        fs::write(&install.plugin, "program 2").unwrap();
        install.socket = "/run/other/agent.sock".into();
        assert!(install.install_plugin().unwrap() && install.install_conflist().unwrap());
        assert_eq!(fs::read(&program).unwrap(), b"program 2");
        let text = fs::read_to_string(install.conf_dir.join(CONFLIST)).unwrap();
        assert!(text.contains("/run/other/agent.sock"), "{text}");
        let files: Vec<_> =
            fs::read_dir(&install.conf_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, [CONFLIST], "no temporary file remains");
    }

    #[test]
    fn running_plugin_is_replaced() {
        let at = tempfile::tempdir().unwrap();
        let mut install = install(at.path());
        install.plugin = "/bin/sleep".into();
        install.install_plugin().unwrap();
        let mut running =
            std::process::Command::new(install.bin_dir.join(PLUGIN)).arg("100").spawn().unwrap();
        install.plugin = at.path().join("plugin");
        let replaced = install.install_plugin();
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(replaced.unwrap());
    }

    #[test]
    fn configurations_that_sort_before_ours_are_found_except_multus() {
        let at = tempfile::tempdir().unwrap();
        let install = install(at.path());
        assert_eq!(install.competing_configs().unwrap(), Vec::<PathBuf>::new());
        fs::create_dir_all(&install.conf_dir).unwrap();
        for (name, text) in [
            ("00-multus.conf", r#"{"type": "multus"}"#),
            ("00-first.conflist", "{}"),
            ("01-readme.txt", ""),
            ("10-flannel.conflist", "{}"),
        ] {
            fs::write(install.conf_dir.join(name), text).unwrap();
        }
        assert_eq!(install.competing_configs().unwrap(), [install.conf_dir.join("00-first.conflist")]);
    }

    #[test]
    fn only_our_files_are_found_for_removal() {
        let at = tempfile::tempdir().unwrap();
        let install = install(at.path());
        let found = || installed_files(&install.bin_dir, &install.conf_dir);
        assert_eq!(found(), Vec::<PathBuf>::new());
        install.install_plugin().unwrap();
        install.install_conflist().unwrap();
        assert_eq!(found(), [install.conf_dir.join(CONFLIST), install.bin_dir.join(PLUGIN)]);
        fs::write(install.conf_dir.join(CONFLIST), r#"{"plugins": [{"type": "bridge"}]}"#).unwrap();
        assert_eq!(found(), [install.bin_dir.join(PLUGIN)]);
    }

    #[test]
    fn error_names_the_file() {
        let at = tempfile::tempdir().unwrap();
        let mut install = install(at.path());
        install.bin_dir = at.path().join("plugin");
        let error = install.install_plugin().unwrap_err().to_string();
        assert!(error.contains(&install.bin_dir.display().to_string()), "{error}");
        install.plugin = at.path().join("absent");
        let error = install.install_plugin().unwrap_err().to_string();
        assert!(error.starts_with("cannot open ") && error.contains("absent"), "{error}");
    }
}
