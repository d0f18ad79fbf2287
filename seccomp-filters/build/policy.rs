//! The policy files: their schema, what makes one wrong, and which rules a role has in a stage.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;
use syscalls::x86_64::Sysno;

use crate::condition::Condition;

/// Merged into every role.
const COMMON: &str = "common";

/// One file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// What runs under this policy.
    about: String,
    /// The file whose rules this role has besides its own and the common ones: another role's, or a shared one.
    over: Option<String>,
    /// No role of its own.
    #[serde(default)]
    shared: bool,
    /// Roles of the threads that this one starts. They inherit its setup filter, which
    /// therefore has to allow all that their own policies do.
    #[serde(default)]
    starts: Vec<String>,
    /// Allowed in the setup stage, in addition to `sealed`.
    #[serde(default)]
    setup: Vec<FileRule>,
    /// Allowed for the whole life of the thread.
    #[serde(default)]
    sealed: Vec<FileRule>,
}

/// One rule as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRule {
    syscall: String,
    /// All of them must hold.
    #[serde(default)]
    when: Vec<String>,
    /// Answer the call with this error where no other rule of the stage allows it.
    errno: Option<String>,
    reason: String,
}

/// One rule, understood.
#[derive(Clone)]
pub struct Rule {
    pub number: i64,
    pub syscall: String,
    pub conditions: Vec<Condition>,
    /// Set when the call is answered with an error where no other rule allows it.
    pub errno: Option<(String, u64)>,
    pub reason: String,
}

impl Rule {
    fn same_call(&self, other: &Rule) -> bool {
        self.number == other.number
            && self.errno == other.errno
            && self.conditions == other.conditions
    }
}

/// All rules of one role.
pub struct Role {
    pub name: String,
    pub about: String,
    pub setup: Vec<Rule>,
    pub sealed: Vec<Rule>,
}

/// Reads every policy file in `folder`; the roles come back sorted by name.
pub fn load(folder: &Path) -> Result<Vec<Role>, String> {
    let mut files = BTreeMap::new();
    let entries =
        std::fs::read_dir(folder).map_err(|error| format!("read {}: {error}", folder.display()))?;
    for entry in entries {
        let path = entry.map_err(|error| error.to_string())?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".json"))
            .ok_or_else(|| format!("{}: not a .json file", path.display()))?
            .to_owned();
        let at = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| at(&error))?;
        let file: File = serde_json::from_str(&text).map_err(|error| at(&error))?;
        let parsed = Parsed::new(file).map_err(|error| at(&error))?;
        files.insert(name, parsed);
    }
    let common = files
        .remove(COMMON)
        .ok_or_else(|| format!("{COMMON}.json is missing"))?;
    files
        .iter()
        .filter(|(_, file)| !file.shared)
        .map(|(name, file)| {
            role(name, file, &common, &files).map_err(|error| format!("{name}.json: {error}"))
        })
        .collect()
}

/// One file whose rules are understood.
struct Parsed {
    about: String,
    over: Option<String>,
    shared: bool,
    starts: Vec<String>,
    setup: Vec<Rule>,
    sealed: Vec<Rule>,
}

impl Parsed {
    fn new(file: File) -> Result<Self, String> {
        if file.about.trim().is_empty() {
            return Err("`about` is empty".into());
        }
        let rules = |rules: Vec<FileRule>| {
            rules
                .into_iter()
                .map(parse_rule)
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            about: file.about,
            over: file.over,
            shared: file.shared,
            starts: file.starts,
            setup: rules(file.setup)?,
            sealed: rules(file.sealed)?,
        })
    }
}

fn parse_rule(rule: FileRule) -> Result<Rule, String> {
    let syscall = &rule.syscall;
    if rule.reason.trim().is_empty() {
        return Err(format!("{syscall}: a rule without a reason"));
    }
    let number = Sysno::from_str(syscall)
        .map_err(|_| format!("{syscall}: no such system call"))?
        .id();
    let conditions = rule
        .when
        .iter()
        .map(|text| Condition::parse(syscall, text).map_err(|error| format!("{syscall}: {error}")))
        .collect::<Result<_, _>>()?;
    let errno = match rule.errno {
        None => None,
        Some(_) if !rule.when.is_empty() => {
            return Err(format!("{syscall}: a rule with `errno` takes no `when`"));
        }
        Some(name) => {
            let value = crate::constants::value(&name)
                .ok_or_else(|| format!("{syscall}: unknown errno `{name}`"))?;
            Some((name, value))
        }
    };
    Ok(Rule {
        number: i64::from(number),
        syscall: rule.syscall,
        conditions,
        errno,
        reason: rule.reason,
    })
}

fn role(
    name: &str,
    file: &Parsed,
    common: &Parsed,
    files: &BTreeMap<String, Parsed>,
) -> Result<Role, String> {
    let mut layers = vec![common];
    if let Some(below) = &file.over {
        let below = files
            .get(below)
            .ok_or_else(|| format!("`over` names `{below}`, which is no file"))?;
        if below.over.is_some() {
            return Err("what `over` names is not over another file".into());
        }
        layers.push(below);
    }
    layers.push(file);
    let mut sealed = Vec::new();
    for rule in layers.iter().flat_map(|layer| &layer.sealed) {
        add(&mut sealed, rule)?;
    }
    let mut setup = sealed.clone();
    // The threads' rules come before the process's own: a rule costs time on each call that the
    // kernel has to compare with it, and a vCPU's KVM_RUN passes the inherited filter every time.
    for thread in layers.iter().flat_map(|layer| &layer.starts) {
        let thread = files
            .get(thread)
            .ok_or_else(|| format!("`starts` names `{thread}`, which has no policy"))?;
        if thread.over.is_some() {
            return Err("a role over another file cannot be started as a thread".into());
        }
        for rule in thread.sealed.iter().chain(&thread.setup) {
            add_shared(&mut setup, rule);
        }
    }
    let mut own = Vec::new();
    for rule in layers.iter().flat_map(|layer| &layer.setup) {
        // What several threads of a process share is no repetition within one file.
        add(&mut own, rule)?;
        add_shared(&mut setup, rule);
    }
    Ok(Role {
        name: name.to_owned(),
        about: file.about.clone(),
        setup,
        sealed,
    })
}

/// Adds `rule`, unless the rules there make it, or it makes them, superfluous.
fn add(rules: &mut Vec<Rule>, rule: &Rule) -> Result<(), String> {
    for other in rules.iter().filter(|other| other.number == rule.number) {
        // Beside rules with conditions, an `errno` answers what none of them allows.
        let unlimited = |rule: &Rule| rule.conditions.is_empty() && rule.errno.is_none();
        let repeated = other.same_call(rule) || unlimited(other) || unlimited(rule);
        if repeated {
            return Err(format!(
                "{}: repeats or contradicts another rule of the same stage (or of a file below it)",
                rule.syscall
            ));
        }
    }
    rules.push(rule.clone());
    Ok(())
}

/// Adds another thread's `rule`; of a limited and an unlimited one, the unlimited one stays.
fn add_shared(rules: &mut Vec<Rule>, rule: &Rule) {
    if rule.conditions.is_empty() && rule.errno.is_none() {
        rules.retain(|other| other.number != rule.number);
    }
    let known = rules.iter().any(|other| {
        let unlimited = other.conditions.is_empty() && other.errno.is_none();
        other.same_call(rule) || (other.number == rule.number && unlimited)
    });
    if !known {
        rules.push(rule.clone());
    }
}
