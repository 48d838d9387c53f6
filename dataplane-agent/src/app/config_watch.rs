//! Follows the configuration file: keys that can change while the agent runs take effect, other
//! changed keys and invalid files are problems.
//!
//! The file is read periodically: a Kubernetes ConfigMap replaces a symbolic link to a directory,
//! editors replace the file or write to it, and all of that is the same to who compares its text.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use crate::{
    api::views::{Origin, ProblemView},
    config::{Config, Egress, RunArgs},
};

/// How often the file is read. A change takes effect once two reads agree: the file is complete.
const INTERVAL: Duration = Duration::from_secs(1);
/// Keys that take effect while the agent runs.
const LIVE_KEYS: [&str; 1] = ["egress"];

/// What the file says now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LiveConfig {
    pub egress: Egress,
    pub problems: Vec<ProblemView>,
}

/// Starts a task that follows the file. Without a file nothing changes.
pub(super) fn watch(args: RunArgs, started: Config) -> watch::Receiver<LiveConfig> {
    let first = LiveConfig { egress: started.egress, problems: Vec::new() };
    let (sender, receiver) = watch::channel(first);
    if let Some(path) = args.config.clone() {
        tokio::spawn(follow(path, args, started, sender));
    }
    receiver
}

async fn follow(path: PathBuf, args: RunArgs, started: Config, sender: watch::Sender<LiveConfig>) {
    // what was loaded is unknown: the first text is loaded once more
    let mut loaded = None;
    let mut last = None;
    while !sender.is_closed() {
        let text = tokio::fs::read(&path).await.map_err(|error| error.kind());
        if last.as_ref() == Some(&text) && loaded.as_ref() != Some(&text) {
            let egress = sender.borrow().egress;
            publish(&load(&args, &started, &path, egress), &sender);
            loaded = Some(text.clone());
        }
        last = Some(text);
        sleep(INTERVAL).await;
    }
}

fn load(args: &RunArgs, started: &Config, path: &Path, egress: Egress) -> LiveConfig {
    let problem =
        |message: String| ProblemView { origin: Origin::Node, subject: path.display().to_string(), message };
    match Config::load(args) {
        Ok(config) => {
            let keys = changed_keys(started, &config);
            let problems =
                keys.iter().map(|key| problem(format!("{key} has changed; restart the agent to apply it")));
            LiveConfig { egress: config.egress, problems: problems.collect() }
        }
        Err(error) => {
            let message = format!("the file is invalid; the last valid configuration is used: {error}");
            LiveConfig { egress, problems: vec![problem(message)] }
        }
    }
}

/// Keys whose values in the file differ, without those that need no restart.
fn changed_keys(started: &Config, now: &Config) -> BTreeSet<String> {
    let keys: BTreeSet<&String> = started.file_values.keys().chain(now.file_values.keys()).collect();
    keys.into_iter()
        .filter(|key| started.file_values.get(*key) != now.file_values.get(*key))
        .filter(|key| !LIVE_KEYS.contains(&key.as_str()))
        .cloned()
        .collect()
}

fn publish(config: &LiveConfig, sender: &watch::Sender<LiveConfig>) {
    sender.send_if_modified(|published| {
        if published == config {
            return false;
        }
        if published.egress != config.egress {
            tracing::info!("the configuration has changed: egress is {}", config.egress.name());
        }
        for problem in config.problems.iter().filter(|problem| !published.problems.contains(problem)) {
            tracing::warn!("{}: {}", problem.subject, problem.message);
        }
        published.clone_from(config);
        true
    });
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::Source;

    /// Loads `before`, then what the file says `after`.
    fn changed(before: &str, after: &str, flags: impl FnOnce(&mut RunArgs)) -> LiveConfig {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.yaml");
        let mut args = RunArgs { config: Some(path.clone()), ..RunArgs::default() };
        flags(&mut args);
        fs::write(&path, before).unwrap();
        let started = Config::load(&args).unwrap();
        fs::write(&path, after).unwrap();
        load(&args, &started, &path, started.egress)
    }

    fn messages(config: &LiveConfig) -> Vec<&str> {
        config.problems.iter().map(|problem| problem.message.as_str()).collect()
    }

    #[test]
    fn egress_needs_no_restart() {
        let config = changed("node_name: n", "node_name: n\negress: stack", |_| {});
        assert_eq!((config.egress, messages(&config)), (Egress::Stack, vec![]));
        let config = changed("egress: stack", "", |_| {});
        assert_eq!((config.egress, messages(&config)), (Egress::Direct, vec![]));
    }

    #[test]
    fn other_keys_need_a_restart() {
        let config =
            changed("mtu: 1400\nvxlan: {vni: 2}", "mtu: 1300\nvxlan: {port: 4789}\negress: stack", |_| {});
        assert_eq!(config.egress, Egress::Stack);
        let keys: Vec<_> = messages(&config).into_iter().filter_map(|text| text.split(' ').next()).collect();
        assert_eq!(keys, ["mtu", "vxlan.port", "vxlan.vni"]);
    }

    #[test]
    fn flag_wins_over_the_file() {
        let config = changed("source: manifests", "source: kubernetes\negress: stack", |args| {
            args.settings.egress = Some(Egress::Direct);
            args.settings.source = Some(Source::Manifests);
        });
        assert_eq!((config.egress, messages(&config)), (Egress::Direct, vec![]));
    }

    #[test]
    fn invalid_file_changes_nothing() {
        let config = changed("egress: stack", "egress: sideways\nmtu: 1300", |_| {});
        assert_eq!(config.egress, Egress::Stack);
        let [message] = messages(&config)[..] else { panic!("{config:?}") };
        assert!(message.contains("egress") && message.contains("sideways"), "{message}");
    }
}
