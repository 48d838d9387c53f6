//! The executable a CNI runtime runs: environment and stdin in, stdout and exit code out.
#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, IsTerminal as _, Read as _, Write as _},
    process::ExitCode,
};

use dataplane_cni::{
    plugin::{self, Input},
    spec::{Environment, ErrorResult},
};

fn main() -> ExitCode {
    let outcome = read().and_then(|input| plugin::run(&input));
    let (line, exit) = match outcome {
        Ok(line) => (line, ExitCode::SUCCESS),
        Err(error) => (Some(error.to_string()), ExitCode::FAILURE),
    };
    let Some(line) = line else { return exit };
    match writeln!(io::stdout().lock(), "{line}") {
        Ok(()) => exit,
        Err(error) => {
            eprintln!("dataplane-cni: cannot write the result to stdout: {error}\n{line}");
            ExitCode::FAILURE
        }
    }
}

fn read() -> Result<Input, ErrorResult> {
    let environment = Environment::read(|name| env::var_os(name)).map_err(ErrorResult::new)?;
    let mut config = Vec::new();
    let mut stdin = io::stdin().lock();
    // do not wait for input when the plugin is tried in a shell
    if !stdin.is_terminal() {
        stdin
            .read_to_end(&mut config)
            .map_err(|error| ErrorResult::new(dataplane_cni::spec::Error::stdin(&error)))?;
    }
    Ok(Input { environment, config })
}
