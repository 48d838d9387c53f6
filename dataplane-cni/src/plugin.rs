//! A call from beginning to end: what was asked, the agent's answer, what is written to stdout.

use std::path::Path;

use serde::Serialize;

use crate::{
    client::{self, ClientError},
    pending_deletes::DeletionQueue,
    protocol::{Add, Added, Check, Del, Failure, Gc, Request, Response, code},
    spec::{AddResult, Command, Config, Environment, Error, PreviousDevice, Report, Version, Versions},
};

/// All a call consists of.
#[derive(Clone, Debug)]
pub struct Input {
    pub environment: Environment,
    /// Stdin.
    pub config: Vec<u8>,
}

/// Answers a call: a line for stdout, if there is anything to say.
pub fn run(input: &Input) -> Result<Option<String>, Report> {
    let Input { environment, config } = input;
    if environment.command == Command::Version {
        return versions(config).map(Some).map_err(Report::new);
    }
    let (keys, version) = Config::version(config).map_err(Report::new)?;
    let refused = |error: Error| Report::of(version, &error);
    since(environment.command, version).map_err(refused)?;
    let config = Config::read(keys, version).map_err(refused)?;
    let request = request(environment, &config).map_err(refused)?;
    let answer = match &request {
        Request::Del(del) => ask_or_leave_note(&config.socket, &request, del),
        _ => client::ask(&config.socket, &request).map_err(Unanswered::from),
    };
    match answer {
        Ok(Response::Added(added)) => add_result(environment, &config, &added).map(Some).map_err(refused),
        Ok(Response::Done) => Ok(None),
        Ok(Response::Failed(Failure { code, message, details })) => {
            Err(Report { version, code, message, details })
        }
        Err(error) => Err(unanswered(version, environment.command, error)),
    }
}

/// No answer, and what else there is to say of it.
struct Unanswered {
    error: ClientError,
    details: String,
}

impl From<ClientError> for Unanswered {
    fn from(error: ClientError) -> Self {
        Self { error, details: String::new() }
    }
}

/// DEL. If there is no agent, the next one finds a note.
fn ask_or_leave_note(socket: &Path, request: &Request, del: &Del) -> Result<Response, Unanswered> {
    let error = match client::ask(socket, request) {
        Err(error) if error.is_nobody_there() => error,
        answer => return Ok(answer?),
    };
    let notes = DeletionQueue::beside(socket);
    if let Err(problem) = notes.leave(&del.attachment) {
        return Err(Unanswered { error, details: format!("no note for the next agent: {problem}") });
    }
    // an agent that has begun to listen may have read the notes before there was this one
    match client::ask(socket, request) {
        Err(error) if error.is_nobody_there() => Ok(Response::Done),
        answer => {
            // if it stays: the next agent will find nothing to do for it
            let _stays = notes.remove(&del.attachment);
            Ok(answer?)
        }
    }
}

/// VERSION needs nothing but itself: who sends no configuration gets an answer too.
fn versions(config: &[u8]) -> Result<String, Error> {
    let version = match Config::version(config) {
        Ok((_, version)) => version,
        // the question which versions are spoken may come in one that is not
        Err(_) => Version::NEWEST,
    };
    line(&Versions::new(version))
}

fn since(command: Command, found: Version) -> Result<(), Error> {
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
                    "there is one: this plugin makes the pod's device, so it is the first of a list",
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
        // the namespace may be gone; the agent knows by the name of the device what to remove
        Command::Del => Request::Del(Del { attachment: environment.attachment()? }),
        Command::Check => {
            let target = environment.target()?;
            let result = config.previous.as_ref().ok_or_else(|| previous("is missing; CHECK needs it"))?;
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
        // VERSION was answered without asking anybody
        Command::Status | Command::Version => Request::Status,
    })
}

fn add_result(environment: &Environment, config: &Config, added: &Added) -> Result<String, Error> {
    let target = environment.target()?;
    let sandbox = target.netns.to_string_lossy();
    line(&AddResult::new(config.version, added, &target.attachment.ifname, &sandbox, config.dns.clone()))
}

/// An agent that does not answer is one that is being replaced: the runtime is to ask again.
fn unanswered(version: Version, command: Command, unanswered: Unanswered) -> Report {
    let Unanswered { error, details } = unanswered;
    let code = match (command, &error) {
        (_, ClientError::Answer { .. }) => code::DECODE,
        (Command::Status, _) => code::NOT_AVAILABLE,
        _ => code::TRY_AGAIN,
    };
    Report { version, code, message: error.to_string(), details }
}

fn line(value: &impl Serialize) -> Result<String, Error> {
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
    use crate::{pending_deletes::Found, protocol::Attachment};

    /// DEL by a runtime, of `eth0` of `c1`.
    fn del(socket: &Path) -> Result<Option<String>, Report> {
        let variables = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        let config = json!({"cniVersion": "1.1.0", "name": "pods", "agentSocket": socket});
        run(&Input { environment: Environment::read(get).unwrap(), config: config.to_string().into() })
    }

    fn eth0() -> Attachment {
        Attachment { container_id: "c1".to_owned(), ifname: "eth0".to_owned() }
    }

    #[test]
    fn a_pod_goes_without_an_agent_and_a_note_of_it_stays() {
        let run_dir = tempfile::tempdir().unwrap();
        let socket = run_dir.path().join("agent.sock");
        let notes = DeletionQueue::of(run_dir.path());
        assert_eq!(del(&socket).unwrap(), None);
        assert_eq!(notes.read().unwrap().gone, [eth0()]);
        // and beside the remains of a killed agent
        notes.remove(&eth0()).unwrap();
        drop(UnixListener::bind(&socket).unwrap());
        assert_eq!(del(&socket).unwrap(), None);
        assert_eq!(notes.read().unwrap().gone, [eth0()]);
    }

    #[test]
    fn without_an_agent_and_a_place_for_a_note_the_runtime_is_to_ask_again() {
        let run_dir = tempfile::tempdir().unwrap();
        let report = del(&run_dir.path().join("none/agent.sock")).unwrap_err();
        assert_eq!(report.code, code::TRY_AGAIN);
        assert!(report.message.starts_with("the agent cannot be reached at "), "{}", report.message);
        assert!(report.details.starts_with("no note for the next agent: create "), "{}", report.details);
    }

    #[test]
    fn an_agent_that_is_there_gets_no_notes_whatever_it_answers() {
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
        for message in ["starting", "went away before it answered"] {
            let report = del(&socket).unwrap_err();
            assert_eq!(report.code, code::TRY_AGAIN);
            assert!(report.message.contains(message), "{}", report.message);
        }
        agent.join().unwrap();
        assert_eq!(DeletionQueue::of(run_dir.path()).read().unwrap(), Found::default());
    }
}
