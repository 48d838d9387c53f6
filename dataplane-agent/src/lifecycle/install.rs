//! The plugin and its configuration, where the container runtime looks for them.
//!
//! Files appear whole or not at all, the configuration last: kubelet calls a node ready that has one. An agent that
//! restarts leaves it: the plugin waits for the agent by itself, and a node without configuration would be not ready for
//! nothing. Only `cleanup` removes it. Knows no API server.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

/// Name of the plugin: what the configuration calls its type, and of its file.
pub(super) const PLUGIN: &str = "dataplane-cni";
/// Name of the configuration. Runtimes take the first by name.
pub(super) const CONFLIST: &str = "05-dataplane.conflist";
/// Where the plugin looks for the agent if nobody says.
const DEFAULT_SOCKET: &str = "/run/dataplane/agent.sock";
/// What runtimes take for a configuration (go-cni, ocicni).
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// Why something is not where it should be.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}")]
pub struct InstallError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What goes where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Install {
    /// The plugin as it came with the agent.
    pub plugin: PathBuf,
    pub bin_dir: PathBuf,
    pub conf_dir: PathBuf,
    /// The agent's socket.
    pub socket: PathBuf,
}

impl Install {
    /// The plugin that lies beside the agent's own program.
    ///
    /// # Errors
    ///
    /// The kernel does not say where that is.
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

    /// Puts the plugin where the runtime finds it, unless it is there. A pod that is being added runs the old one to its
    /// end.
    pub fn plugin(&self) -> Result<bool, InstallError> {
        let target = self.bin_dir.join(PLUGIN);
        let mut plugin = File::open(&self.plugin).map_err(failed("open", &self.plugin))?;
        let mut contents = Vec::new();
        plugin.read_to_end(&mut contents).map_err(failed("read", &self.plugin))?;
        place(&target, &contents, 0o755)
    }

    /// Puts the configuration there, unless it is. From then on kubelet starts pods.
    pub fn conflist(&self) -> Result<bool, InstallError> {
        let text = format!("{:#}\n", self.configuration());
        place(&self.conf_dir.join(CONFLIST), text.as_bytes(), 0o644)
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

    /// Configurations the runtime would take instead of ours.
    pub fn rivals(&self) -> Result<Vec<PathBuf>, InstallError> {
        let entries = match fs::read_dir(&self.conf_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("read", &self.conf_dir)(error)),
        };
        let mut rivals: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                let known =
                    path.extension().and_then(OsStr::to_str).is_some_and(|end| EXTENSIONS.contains(&end));
                known && path.file_name().is_some_and(|name| name < OsStr::new(CONFLIST))
            })
            // Multus stands before its delegates on purpose, and one of them is ours
            .filter(|path| !fs::read_to_string(path).is_ok_and(|text| text.contains("multus")))
            .collect();
        rivals.sort();
        Ok(rivals)
    }
}

/// Files of ours in these directories: what `cleanup` removes. A conflist by our name that is of another type is not.
pub fn ours(bin_dir: &Path, conf_dir: &Path) -> Vec<PathBuf> {
    let conflist = conf_dir.join(CONFLIST);
    let is_ours = fs::read_to_string(&conflist).is_ok_and(|text| text.contains(PLUGIN));
    // the configuration goes first: without it nobody calls the plugin
    let mut files = Vec::from_iter(is_ours.then_some(conflist));
    files.extend(Some(bin_dir.join(PLUGIN)).filter(|path| path.exists()));
    files
}

/// Makes `path` hold `contents`, whole or as before. Returns whether it was not so.
fn place(path: &Path, contents: &[u8], mode: u32) -> Result<bool, InstallError> {
    let is_so = fs::read(path).is_ok_and(|found| found == contents)
        && fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o777 == mode);
    if is_so {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(failed("make", directory))?;
    // a name no runtime takes for a configuration
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let draft = path.with_file_name(name);
    let write = || {
        let mut file = File::options().write(true).create(true).truncate(true).mode(mode).open(&draft)?;
        file.write_all(contents)?;
        // whatever the umask left of it
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(failed("write", &draft))?;
    fs::rename(&draft, path).map_err(failed("write", path))?;
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
    fn plugin_and_configuration_are_placed_whole_and_once() {
        let at = tempfile::tempdir().unwrap();
        let mut install = install(at.path());
        assert!(install.plugin().unwrap());
        assert!(!install.plugin().unwrap());
        let program = install.bin_dir.join(PLUGIN);
        assert_eq!(fs::read(&program).unwrap(), b"program 1");
        assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(install.conflist().unwrap());
        assert!(!install.conflist().unwrap());
        let text = fs::read_to_string(install.conf_dir.join(CONFLIST)).unwrap();
        let found: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(found["plugins"][0]["type"], "dataplane-cni");
        assert_eq!(found["plugins"][0]["capabilities"], json!({"portMappings": true, "bandwidth": true}));
        assert_eq!(found["plugins"][0].get("agentSocket"), None);

        fs::write(&install.plugin, "program 2").unwrap();
        install.socket = "/run/other/agent.sock".into();
        assert!(install.plugin().unwrap() && install.conflist().unwrap());
        assert_eq!(fs::read(&program).unwrap(), b"program 2");
        let text = fs::read_to_string(install.conf_dir.join(CONFLIST)).unwrap();
        assert!(text.contains("/run/other/agent.sock"), "{text}");
        let left: Vec<_> =
            fs::read_dir(&install.conf_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [CONFLIST], "no draft stays");
    }

    #[test]
    fn a_program_in_use_is_replaced() {
        let at = tempfile::tempdir().unwrap();
        let mut install = install(at.path());
        install.plugin = "/bin/sleep".into();
        install.plugin().unwrap();
        let mut running =
            std::process::Command::new(install.bin_dir.join(PLUGIN)).arg("100").spawn().unwrap();
        install.plugin = at.path().join("plugin");
        let replaced = install.plugin();
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(replaced.unwrap());
    }

    #[test]
    fn configurations_before_ours_are_named_but_multus() {
        let at = tempfile::tempdir().unwrap();
        let install = install(at.path());
        assert_eq!(install.rivals().unwrap(), Vec::<PathBuf>::new());
        fs::create_dir_all(&install.conf_dir).unwrap();
        for (name, text) in [
            ("00-multus.conf", r#"{"type": "multus"}"#),
            ("00-first.conflist", "{}"),
            ("01-readme.txt", ""),
            ("10-flannel.conflist", "{}"),
        ] {
            fs::write(install.conf_dir.join(name), text).unwrap();
        }
        assert_eq!(install.rivals().unwrap(), [install.conf_dir.join("00-first.conflist")]);
    }

    #[test]
    fn only_what_is_ours_is_ours() {
        let at = tempfile::tempdir().unwrap();
        let install = install(at.path());
        let found = || ours(&install.bin_dir, &install.conf_dir);
        assert_eq!(found(), Vec::<PathBuf>::new());
        install.plugin().unwrap();
        install.conflist().unwrap();
        assert_eq!(found(), [install.conf_dir.join(CONFLIST), install.bin_dir.join(PLUGIN)]);
        fs::write(install.conf_dir.join(CONFLIST), r#"{"plugins": [{"type": "bridge"}]}"#).unwrap();
        assert_eq!(found(), [install.bin_dir.join(PLUGIN)]);
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let at = tempfile::tempdir().unwrap();
        let mut install = install(at.path());
        install.bin_dir = at.path().join("plugin");
        let error = install.plugin().unwrap_err().to_string();
        assert!(error.contains(&install.bin_dir.display().to_string()), "{error}");
        install.plugin = at.path().join("absent");
        let error = install.plugin().unwrap_err().to_string();
        assert!(error.starts_with("open ") && error.contains("absent"), "{error}");
    }
}
