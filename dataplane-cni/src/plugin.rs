//! A call from beginning to end: what was asked, the agent's answer, what is written to stdout.

use serde::Serialize;

use crate::{
    client::{self, ClientError},
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
    match client::ask(&config.socket, &request) {
        Ok(Response::Added(added)) => add_result(environment, &config, &added).map(Some).map_err(refused),
        Ok(Response::Done) => Ok(None),
        Ok(Response::Failed(Failure { code, message, details })) => {
            Err(Report { version, code, message, details })
        }
        Err(error) => Err(unanswered(version, environment.command, &error)),
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
fn unanswered(version: Version, command: Command, error: &ClientError) -> Report {
    let code = match (command, error) {
        (_, ClientError::Answer { .. }) => code::DECODE,
        (Command::Status, _) => code::NOT_AVAILABLE,
        _ => code::TRY_AGAIN,
    };
    Report { version, code, message: error.to_string(), details: String::new() }
}

fn line(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|problem| Error::Decode(problem.to_string()))
}
