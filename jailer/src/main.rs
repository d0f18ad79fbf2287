//! `casemate-jailer`: see the library for what it does, and `--help` for how to call it.

use std::process::ExitCode;

use casemate_broker::exit;
use casemate_jailer::arguments::{self, Command, HELP, HELPER_HELP};
use casemate_jailer::error::say;
use casemate_jailer::execute;

fn main() -> ExitCode {
    match arguments::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Ok(Command::HelperHelp) => {
            print!("{HELPER_HELP}");
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("casemate-jailer {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Command::Run(arguments)) => ExitCode::from(execute::run(&arguments)),
        Err(error) => {
            say(format!("{error} (see --help)"));
            ExitCode::from(exit::BAD_INPUT)
        }
    }
}
