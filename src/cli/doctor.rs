//! `annulus doctor`: the host's facts, what is in the way, and what to choose.
//!
//! Invariant: changes nothing but a probe file that it removes. Facts and judgement come from
//! `tuning`; here they are printed. Exit 0 when a node can serve with this configuration, else 1.

use std::io::{self, Write};

use annulus_tuning::Budget;
use annulus_tuning::disk_profile;
use annulus_tuning::findings::{Choice, Facts, Finding, Grade, judge, propose};
use annulus_tuning::host::Host;
use annulus_tuning::kernel::Kernel;
use serde_json::json;

use super::arguments::DoctorArguments;
use super::output::{Output, finish};
use super::{Exit, Failure, Outcome};
use crate::config::Config;
use crate::units::Size;

pub(super) fn run(arguments: DoctorArguments) -> Outcome {
    let flags = arguments.flags.over_file(arguments.config.as_deref()).map_err(Failure::usage)?;
    let host = Host::probe();
    let resolved = Config::resolve(flags.clone(), &host);
    let data_dir = flags.data_dir.unwrap_or_else(|| "./annulus-data".into());
    let facts = Facts { host, kernel: Kernel::probe(), disk: disk_profile::probe(&data_dir) };
    let usable = u32::try_from(facts.host.cores_usable().len()).unwrap_or(u32::MAX);
    let shards = resolved.as_ref().map_or(usable, |config| config.shard_count(None));
    let budget = resolved.as_ref().ok().and_then(|config| config.budget(shards).ok());
    let reserve = resolved
        .as_ref()
        .map_or(0, |config| config.disk_reserve(facts.disk.total_bytes.unwrap_or(0)));
    let connections = budget.map_or(0, |budget| budget.connections_max);
    let mut findings = judge(&facts, shards, connections, reserve);
    if let Err(refusal) = &resolved {
        findings.push(Finding {
            area: "configuration",
            grade: Grade::Fatal,
            fact: refusal.clone(),
            remedy: "see annulus serve --help".to_owned(),
        });
    }
    let disk = resolved.as_ref().ok().zip(facts.disk.total_bytes).map(|(config, total)| Shares {
        disk: total,
        reserve,
        hint_size_max: config.hint_size_max(total),
    });
    let can_serve = findings.iter().all(|f| f.grade != Grade::Fatal);
    let report = Report { can_serve, findings, budget, disk };
    let choices = propose(&facts);
    let mut output = Output::stdout();
    let written = if arguments.json {
        output.json(&json!({
            "can_serve": report.can_serve,
            "findings": report.findings,
            "proposal": choices,
            "budget": report.budget,
            "disk": report.disk,
            "facts": facts,
        }))
    } else {
        print(&mut output, &report, &choices)
    };
    finish(output, written)?;
    Ok(if report.can_serve { Exit::Success } else { Exit::Negative })
}

struct Report {
    can_serve: bool,
    findings: Vec<Finding>,
    budget: Option<Budget>,
    disk: Option<Shares>,
}

/// How the disk is divided, in bytes.
#[derive(Clone, Copy, serde::Serialize)]
struct Shares {
    disk: u64,
    reserve: u64,
    hint_size_max: u64,
}

fn print(output: &mut Output, report: &Report, choices: &[Choice]) -> io::Result<()> {
    let colour = output.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mark = |grade: Grade| match (grade, colour) {
        (Grade::Good, false) => "ok   ",
        (Grade::Costly, false) => "COSTS",
        (Grade::Fatal, false) => "STOPS",
        (Grade::Good, true) => "\x1b[32mok   \x1b[0m",
        (Grade::Costly, true) => "\x1b[33mCOSTS\x1b[0m",
        (Grade::Fatal, true) => "\x1b[31mSTOPS\x1b[0m",
    };
    for finding in &report.findings {
        writeln!(output, "{} {:<13} {}", mark(finding.grade), finding.area, finding.fact)?;
        if !finding.remedy.is_empty() {
            writeln!(output, "      {:<13} mend: {}", "", finding.remedy)?;
        }
    }
    writeln!(output, "\nProposed configuration:")?;
    for choice in choices {
        writeln!(
            output,
            "  {:<28} # {}",
            format!("{} = {}", choice.option, choice.value),
            choice.reason
        )?;
    }
    if let Some(budget) = &report.budget {
        let (memory, shards) = (Size(budget.memory).rounded(), budget.shards);
        writeln!(output, "\nMemory of a node with {memory} and {shards} shards:")?;
        for (name, bytes, what) in budget.parts() {
            writeln!(output, "  {name:<12} {:>10}  {what}", Size(bytes).rounded())?;
        }
    }
    if let Some(shares) = &report.disk {
        writeln!(output, "\nDisk of {}:", Size(shares.disk).rounded())?;
        let parts = [
            ("reserve", shares.reserve, "kept free (disk-reserve)"),
            ("hints", shares.hint_size_max, "at most, for absent nodes (hint-size-max)"),
        ];
        for (name, bytes, what) in parts {
            writeln!(output, "  {name:<12} {:>10}  {what}", Size(bytes).rounded())?;
        }
    }
    let verdict =
        if report.can_serve { "A node can serve here." } else { "A node cannot serve here." };
    writeln!(output, "\n{verdict}")
}
