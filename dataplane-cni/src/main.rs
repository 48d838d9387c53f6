//! The executable a CNI runtime calls: environment and stdin in, stdout and exit code out.
#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, IsTerminal as _, Read as _, Write as _},
    process::ExitCode,
};

use dataplane_cni::{
    plugin::{self, Input},
    spec::{Environment, Report},
};

fn main() -> ExitCode {
    let outcome = read().and_then(|input| plugin::run(&input));
    let (line, exit) = match outcome {
        Ok(line) => (line, ExitCode::SUCCESS),
        Err(report) => (Some(report.to_string()), ExitCode::FAILURE),
    };
    let Some(line) = line else { return exit };
    match writeln!(io::stdout().lock(), "{line}") {
        Ok(()) => exit,
        Err(error) => {
            eprintln!("dataplane-cni: write the answer to stdout: {error}\n{line}");
            ExitCode::FAILURE
        }
    }
}

fn read() -> Result<Input, Report> {
    let environment = Environment::read(|name| env::var_os(name)).map_err(Report::new)?;
    let mut config = Vec::new();
    let mut stdin = io::stdin().lock();
    // a person who tries the plugin in a shell is not to sit before a silent prompt
    if !stdin.is_terminal() {
        stdin
            .read_to_end(&mut config)
            .map_err(|error| Report::new(dataplane_cni::spec::Error::stdin(&error)))?;
    }
    Ok(Input { environment, config })
}
