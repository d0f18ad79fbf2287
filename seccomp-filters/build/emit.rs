//! Templates as Rust source, included by `src/lib.rs`.

use std::fmt::Write;

use syscalls::x86_64::Sysno;

use crate::compile::{Program, Template};

/// The source.
pub fn rust(templates: &[Template]) -> Result<String, String> {
    let mut out = String::new();
    write(&mut out, templates).map_err(|error| error.to_string())?;
    Ok(out)
}

fn write(out: &mut String, templates: &[Template]) -> std::fmt::Result {
    writeln!(out, "static TEMPLATES: &[Template] = &[")?;
    for template in templates {
        writeln!(out, "Template {{")?;
        writeln!(out, "role: Role::{},", variant(&template.role.name))?;
        writeln!(out, "stage: Stage::{},", template.stage)?;
        writeln!(out, "about: {:?},", template.role.about)?;
        writeln!(out, "rules: &[")?;
        for rule in &template.rules {
            let conditions: Vec<&str> = rule
                .conditions
                .iter()
                .map(|condition| condition.text.as_str())
                .collect();
            writeln!(
                out,
                "Rule {{ syscall: {:?}, number: {}, conditions: &{:?}, errno: {:?}, reason: {:?} }},",
                rule.syscall,
                rule.number,
                conditions,
                rule.errno.as_ref().map(|(name, _)| name),
                rule.reason
            )?;
        }
        writeln!(out, "],\nprogram: ")?;
        write_program(out, &template.program)?;
        // Tests compare them.
        writeln!(out, "#[cfg(test)]\nunshrunk: ")?;
        write_program(out, &template.unshrunk)?;
        writeln!(out, "}},")?;
    }
    writeln!(out, "];\n\nstatic SYSCALL_NAMES: &[(i64, &str)] = &[")?;
    let mut names: Vec<(i32, &str)> = Sysno::iter().map(|call| (call.id(), call.name())).collect();
    names.sort_unstable();
    for (number, name) in names {
        writeln!(out, "({number}, {name:?}),")?;
    }
    writeln!(out, "];")
}

fn write_program(out: &mut String, program: &Program) -> std::fmt::Result {
    writeln!(out, "Program {{\ntgid_at: &{:?},", program.tgid_at)?;
    writeln!(out, "instructions: &[")?;
    for one in &program.instructions {
        writeln!(
            out,
            "sock_filter {{ code: {}, jt: {}, jf: {}, k: {:#x} }},",
            one.code, one.jt, one.jf, one.k
        )?;
    }
    writeln!(out, "],\n}},")
}

/// `unjailed-broker` as the variant `UnjailedBroker`.
fn variant(role: &str) -> String {
    let words = role.split('-').map(|word| {
        let (first, rest) = word.split_at(word.len().min(1));
        first.to_uppercase() + rest
    });
    words.collect()
}
