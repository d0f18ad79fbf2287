//! A policy as text for people.

use std::fmt::{Display, Formatter, Result};

use crate::{Role, Stage, template};

/// What [`crate::explain`] returns: displays as one block of lines per system call.
pub struct Explanation {
    role: Role,
    stage: Stage,
}

impl Explanation {
    pub(crate) fn new(role: Role, stage: Stage) -> Self {
        Self { role, stage }
    }
}

impl Display for Explanation {
    fn fmt(&self, out: &mut Formatter<'_>) -> Result {
        let template = template(self.role, self.stage);
        writeln!(out, "{}, {}", self.role.name(), self.stage.name())?;
        writeln!(out, "  {}", template.about)?;
        let width = template.rules.iter().map(|rule| rule.syscall.len()).max();
        let width = width.unwrap_or(0);
        for rule in template.rules {
            write!(out, "  {:width$}  ", rule.syscall)?;
            if let Some(errno) = rule.errno {
                write!(out, "[otherwise: {errno}] ")?;
            }
            if !rule.conditions.is_empty() {
                write!(out, "[{}] ", rule.conditions.join(" and "))?;
            }
            writeln!(out, "{}", rule.reason)?;
        }
        writeln!(out, "  anything else ends the process with exit code 159")
    }
}
