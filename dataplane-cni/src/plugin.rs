//! Runs one CNI command: validates the input, calls the agent, and builds the result for stdout.

use std::path::Path;

use serde::Serialize;

use crate::{
    client::{self, ClientError},
    pending_deletes::DeletionQueue,
    protocol::{Add, Added, Check, Del, Failure, Gc, Request, Response, code},
    spec::{
        AddResult, Command, Config, Environment, Error, ErrorResult, PreviousDevice, Version, VersionResult,
    },
};

/// The input of a command.
#[derive(Clone, Debug)]
pub struct Input {
    pub environment: Environment,
    /// The network configuration, from stdin.
    pub config: Vec<u8>,
}

/// Runs the command. Returns the result for stdout, for commands that have one.
pub fn run(input: &Input) -> Result<Option<String>, ErrorResult> {
    let Input { environment, config } = input;
    if environment.command == Command::Version {
        return version_result(config).map(Some).map_err(ErrorResult::new);
    }
    let (keys, version) = Config::version(config).map_err(ErrorResult::new)?;
    let invalid = |error: Error| ErrorResult::of(version, &error);
    check_command_version(environment.command, version).map_err(invalid)?;
    let config = Config::read(keys, version).map_err(invalid)?;
    let request = request(environment, &config).map_err(invalid)?;
    let response = match &request {
        Request::Del(del) => delete_or_queue(&config.socket, &request, del),
        _ => client::call(&config.socket, &request).map_err(CallError::from),
    };
    match response {
        Ok(Response::Added(added)) => add_result(environment, &config, &added).map(Some).map_err(invalid),
        Ok(Response::Done) => Ok(None),
        Ok(Response::Failed(Failure { code, message, details })) => {
            Err(ErrorResult { version, code, message, details })
        }
        Err(error) => Err(call_error_result(version, environment.command, error)),
    }
}

/// A failed call of the agent, with `details` for the CNI error.
struct CallError {
    error: ClientError,
    details: String,
}

impl From<ClientError> for CallError {
    fn from(error: ClientError) -> Self {
        let details = match &error {
            ClientError::Refused(_) | ClientError::Response { .. } => "",
            _ => "check the pod of DaemonSet dataplane-agent on this node",
        };
        Self { error, details: details.to_owned() }
    }
}

/// Runs DEL. If no agent runs, queues the deletion for the next one.
fn delete_or_queue(socket: &Path, request: &Request, del: &Del) -> Result<Response, CallError> {
    let error = match client::call(socket, request) {
        Err(error) if error.agent_not_running() => error,
        response => return Ok(response?),
    };
    let queue = DeletionQueue::next_to_socket(socket);
    if let Err(problem) = queue.add(&del.attachment) {
        return Err(CallError {
            error,
            details: format!("cannot queue the deletion for the next agent: {problem}"),
        });
    }
    // an agent that started in between may have read the queue before this entry was added
    match client::call(socket, request) {
        Err(error) if error.agent_not_running() => Ok(Response::Done),
        response => {
            // an entry that stays does no harm: the next agent finds no device for it
            let _may_stay = queue.remove(&del.attachment);
            Ok(response?)
        }
    }
}

/// The result of VERSION, with or without a network configuration.
fn version_result(config: &[u8]) -> Result<String, Error> {
    let version = match Config::version(config) {
        Ok((_, version)) => version,
        // a runtime may ask for the supported versions in an unsupported version
        Err(_) => Version::NEWEST,
    };
    to_json(&VersionResult::new(version))
}

fn check_command_version(command: Command, found: Version) -> Result<(), Error> {
    let since = match command {
        Command::Add | Command::Del | Command::Version => Version::V0_3_1,
        Command::Check => Version::V0_4_0,
        Command::Gc | Command::Status => Version::V1_1_0,
    };
    if found < since { Err(Error::TooOld { found, command, since }) } else { Ok(()) }
}

fn request(environment: &Environment, config: &Config) -> Result<Request, Error> {
    let previous = |problem: &str| Error::Config { key: "prevResult", problem: problem.to_owned() };
    Ok(match environment.command {
        Command::Add => {
            if config.previous.is_some() {
                return Err(previous(
                    "must not be set for ADD: dataplane-cni creates the pod's interface and must be the first plugin \
                     of the list",
                ));
            }
            let target = environment.target()?;
            Request::Add(Add {
                attachment: target.attachment,
                network: config.name.clone(),
                netns: target.netns,
                pod: environment.pod()?,
                port_mappings: config.port_mappings()?,
                bandwidth: config.bandwidth()?,
            })
        }
        // the namespace may not exist; the agent finds the device by its name
        Command::Del => Request::Del(Del { attachment: environment.attachment()? }),
        Command::Check => {
            let target = environment.target()?;
            let result = config.previous.as_ref().ok_or_else(|| previous("is missing; CHECK requires it"))?;
            let sandbox = target.netns.to_string_lossy();
            let device = PreviousDevice::find(result, &target.attachment.ifname, &sandbox)?;
            Request::Check(Check {
                attachment: target.attachment,
                netns: target.netns,
                addresses: device.addresses,
                mac: device.mac,
            })
        }
        Command::Gc => Request::Gc(Gc { network: config.name.clone(), valid: config.gc()?.valid }),
        // VERSION does not reach this: it needs no agent
        Command::Status | Command::Version => Request::Status,
    })
}

fn add_result(environment: &Environment, config: &Config, added: &Added) -> Result<String, Error> {
    let target = environment.target()?;
    let sandbox = target.netns.to_string_lossy();
    to_json(&AddResult::new(config.version, added, &target.attachment.ifname, &sandbox, config.dns.clone()))
}

/// A call error as a CNI error. An agent that does not respond is usually being replaced, so the
/// runtime should retry.
fn call_error_result(version: Version, command: Command, error: CallError) -> ErrorResult {
    let CallError { error, details } = error;
    let code = match (command, &error) {
        (_, ClientError::Response { .. }) => code::DECODE,
        (Command::Status, _) => code::NOT_AVAILABLE,
        _ => code::TRY_AGAIN,
    };
    ErrorResult { version, code, message: error.to_string(), details }
}

fn to_json(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|problem| Error::Decode(problem.to_string()))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::net::UnixListener,
        thread,
    };

    use serde_json::json;

    use super::*;
    use crate::{pending_deletes::PendingDeletes, protocol::Attachment};

    /// Runs DEL for `eth0` of container `c1`.
    fn del(socket: &Path) -> Result<Option<String>, ErrorResult> {
        let variables = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        let config = json!({"cniVersion": "1.1.0", "name": "pods", "agentSocket": socket});
        run(&Input { environment: Environment::read(get).unwrap(), config: config.to_string().into() })
    }

    fn eth0() -> Attachment {
        Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() }
    }

    #[test]
    fn del_without_an_agent_succeeds_and_queues_the_deletion() {
        let run_dir = tempfile::tempdir().unwrap();
        let socket = run_dir.path().join("agent.sock");
        let queue = DeletionQueue::in_run_dir(run_dir.path());
        assert_eq!(del(&socket).unwrap(), None);
        assert_eq!(queue.read().unwrap().attachments, [eth0()]);
        // also with the socket of a killed agent
        queue.remove(&eth0()).unwrap();
        drop(UnixListener::bind(&socket).unwrap());
        assert_eq!(del(&socket).unwrap(), None);
        assert_eq!(queue.read().unwrap().attachments, [eth0()]);
    }

    #[test]
    fn del_without_an_agent_and_a_run_directory_is_to_be_retried() {
        let run_dir = tempfile::tempdir().unwrap();
        let error = del(&run_dir.path().join("none/agent.sock")).unwrap_err();
        assert_eq!(error.code, code::TRY_AGAIN);
        assert!(error.message.starts_with("the agent cannot be reached at "), "{}", error.message);
        assert!(
            error.details.starts_with("cannot queue the deletion for the next agent: create "),
            "{}",
            error.details
        );
    }

    #[test]
    fn del_queues_nothing_while_an_agent_runs() {
        let run_dir = tempfile::tempdir().unwrap();
        let socket = run_dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            for answer in ["{\"error\":\"starting\"}\n", ""] {
                let (mut stream, _) = listener.accept().unwrap();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        for message in ["starting", "closed the connection without a response"] {
            let error = del(&socket).unwrap_err();
            assert_eq!(error.code, code::TRY_AGAIN);
            assert!(error.message.contains(message), "{}", error.message);
        }
        agent.join().unwrap();
        assert_eq!(DeletionQueue::in_run_dir(run_dir.path()).read().unwrap(), PendingDeletes::default());
    }
}
