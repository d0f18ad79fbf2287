//! Rules to BPF. The compiler is seccompiler; what it has no words for (x32, a call answered
//! with an error, values known only at install) is added here.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter};

use crate::condition::Value;
use crate::policy::{Role, Rule};
use crate::shrink::{JUMP, JUMP_IF_EQUAL, JUMP_IF_GREATER_OR_EQUAL, LOAD_WORD, RETURN, shrink};

/// Instructions with which seccompiler's output begins: load the architecture, compare it, kill. The
/// kill becomes a trap, so that such a call is reported like every other.
const ARCH_CHECK: usize = 3;
/// Calls with this bit are x32's: another ABI for the same architecture value.
const X32_BIT: u32 = 0x4000_0000;

/// One compiled filter.
pub struct Template<'a> {
    pub role: &'a Role,
    pub stage: &'static str,
    pub rules: Vec<&'a Rule>,
    /// What seccompiler made of them.
    pub unshrunk: Program,
    /// The same, shrunk.
    pub program: Program,
}

/// A filter for every process.
pub struct Program {
    pub instructions: BpfProgram,
    /// Instructions whose constant is replaced by the process's id.
    pub tgid_at: Vec<usize>,
}

/// Compiles every stage of every role.
pub fn templates(roles: &[Role]) -> Result<Vec<Template<'_>>, String> {
    roles
        .iter()
        .flat_map(|role| [(role, "Setup", &role.setup), (role, "Sealed", &role.sealed)])
        .map(|(role, stage, rules)| {
            template(role, stage, rules).map_err(|error| format!("{}, {stage}: {error}", role.name))
        })
        .collect()
}

fn template<'a>(
    role: &'a Role,
    stage: &'static str,
    rules: &'a [Rule],
) -> Result<Template<'a>, String> {
    let [one, other] = TGIDS.map(|tgid| compile(rules, tgid));
    let (one, other) = (one?, other?);
    let program = Program::from_two(shrink(&one)?, &shrink(&other)?)?;
    let unshrunk = Program::from_two(one, &other)?;
    let placeholders = rules
        .iter()
        .flat_map(|rule| &rule.conditions)
        .filter(|condition| condition.value == Value::Tgid)
        .count();
    if unshrunk.tgid_at.len() != placeholders {
        return Err("the places of $TGID are ambiguous".into());
    }
    let mut rules: Vec<&Rule> = rules.iter().collect();
    rules.sort_by_key(|rule| (&rule.syscall, rule.errno.is_some()));
    Ok(Template {
        role,
        stage,
        rules,
        unshrunk,
        program,
    })
}

/// Two values for a process's id, neither of which a policy names: what is one node when shrinking must not be so for one
/// of them alone.
const TGIDS: [u32; 2] = [0xca5e_3a7e, 0x35a1_c581];

impl Program {
    /// Where a placeholder ended up shows when two values of it are compiled: exactly those instructions differ. Looking for
    /// one chosen value could find a real constant instead.
    fn from_two(one: BpfProgram, other: &[sock_filter]) -> Result<Self, String> {
        let mut tgid_at = Vec::new();
        for (at, (one, other)) in one.iter().zip(other).enumerate() {
            if one.k != other.k {
                tgid_at.push(at);
            }
            if (one.code, one.jt, one.jf) != (other.code, other.jt, other.jf)
                || (one.k != other.k && [one.k, other.k] != TGIDS)
            {
                return Err("the places of $TGID are ambiguous".into());
            }
        }
        if one.len() != other.len() {
            return Err("the places of $TGID are ambiguous".into());
        }
        Ok(Self {
            instructions: one,
            tgid_at,
        })
    }
}

fn compile(rules: &[Rule], tgid: u32) -> Result<BpfProgram, String> {
    let mut alternatives: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.errno.is_none()) {
        let alternatives = alternatives.entry(rule.number).or_default();
        if !rule.conditions.is_empty() {
            let conditions = rule
                .conditions
                .iter()
                .map(|condition| condition.compile(tgid))
                .collect::<Result<_, _>>()?;
            alternatives.push(SeccompRule::new(conditions).map_err(|error| error.to_string())?);
        }
    }
    let mut prologue = refuse_x32();
    for rule in rules {
        if let Some((name, errno)) = &rule.errno {
            let errno = u16::try_from(*errno).map_err(|_| format!("{name} is no errno"))?;
            let allowed = alternatives.remove(&rule.number).unwrap_or_default();
            prologue.extend(answer(rule.number, allowed, errno)?);
        }
    }
    let filter = SeccompFilter::new(
        alternatives,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .map_err(|error| error.to_string())?;
    let mut program: BpfProgram = filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())?;
    match program.get_mut(ARCH_CHECK - 1) {
        Some(answer) if (answer.code, answer.k) == (RETURN, libc::SECCOMP_RET_KILL_PROCESS) => {
            answer.k = libc::SECCOMP_RET_TRAP;
        }
        _ => return Err("seccompiler's output does not begin with the check of the ABI".into()),
    }
    // All jumps are relative and lead forward, so instructions may be put in after the check.
    program.splice(ARCH_CHECK..ARCH_CHECK, prologue);
    Ok(program)
}

/// Loads the number of the call, and traps if it is x32's.
fn refuse_x32() -> BpfProgram {
    vec![
        instruction(LOAD_WORD, 0, 0, 0),
        instruction(JUMP_IF_GREATER_OR_EQUAL, 0, 1, X32_BIT),
        instruction(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
    ]
}

/// Allows call `number` where one of `allowed` holds, and answers it with `errno` where none does.
/// Leaves the loaded number alone for every other call.
fn answer(number: i64, allowed: Vec<SeccompRule>, errno: u16) -> Result<BpfProgram, String> {
    let mut body = BpfProgram::new();
    for rule in allowed {
        // Falls through when the rule holds, and jumps behind the next instruction when not.
        body.extend(BpfProgram::from(rule));
        body.push(instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    let answer = libc::SECCOMP_RET_ERRNO | u32::from(errno);
    body.push(instruction(RETURN, 0, 0, answer));

    let number = u32::try_from(number).map_err(|error| error.to_string())?;
    let length = u32::try_from(body.len()).map_err(|error| error.to_string())?;
    let mut program = vec![
        instruction(JUMP_IF_EQUAL, 1, 0, number),
        instruction(JUMP, 0, 0, length),
    ];
    program.extend(body);
    Ok(program)
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
