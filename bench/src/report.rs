//! What was promised, what was found, and the table of both.

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

/// Which side of a ratio is the good one.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// Throughput.
    AtLeast(f64),
    /// Cost.
    AtMost(f64),
}

/// A line of the table, and when it is met.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// What is done.
    pub row: &'static str,
    /// In which state, and what the ratio is of.
    pub phase: &'static str,
    /// The goal.
    pub limit: Limit,
    /// What else must hold, in words.
    pub also: Option<&'static str>,
}

impl Claim {
    /// A claim about a ratio alone.
    pub const fn new(row: &'static str, phase: &'static str, limit: Limit) -> Self {
        Self { row, phase, limit, also: None }
    }

    /// Whether one of the words is in its name; no words choose everything.
    pub fn is_named(&self, words: &[String]) -> bool {
        let name = format!("{} {}", self.row, self.phase).to_lowercase();
        words.is_empty() || words.iter().any(|word| name.contains(&word.to_lowercase()))
    }

    fn goal(&self) -> String {
        let limit = match self.limit {
            Limit::AtLeast(limit) => format!(">= {limit}"),
            Limit::AtMost(limit) => format!("<= {limit}"),
        };
        match self.also {
            Some(also) => format!("{limit}, {also}"),
            None => limit,
        }
    }

    fn is_met(&self, ratio: f64) -> bool {
        match self.limit {
            Limit::AtLeast(limit) => ratio >= limit,
            Limit::AtMost(limit) => ratio <= limit,
        }
    }
}

/// What was found about a claim.
#[derive(Clone, Debug)]
struct Finding {
    claim: Claim,
    /// None: not measured, `detail` says why.
    ratio: Option<f64>,
    met: bool,
    detail: String,
}

/// All findings, in the order in which they came.
#[derive(Debug, Default)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// A measured ratio; `also` says whether the rest of the claim holds.
    pub fn measured(&mut self, claim: &Claim, ratio: f64, also: bool, detail: String) {
        let met = claim.is_met(ratio) && also;
        self.findings.push(Finding { claim: *claim, ratio: Some(ratio), met, detail });
    }

    /// Why there is no ratio.
    pub fn unmeasured(&mut self, claim: &Claim, reason: impl Into<String>) {
        self.findings.push(Finding { claim: *claim, ratio: None, met: false, detail: reason.into() });
    }

    /// Gives the reason for those of the claims that nothing was said about.
    pub fn complete(&mut self, claims: &[Claim], reason: &str) {
        for claim in claims {
            let said = |finding: &Finding| (finding.claim.row, finding.claim.phase) == (claim.row, claim.phase);
            if !self.findings.iter().any(said) {
                self.unmeasured(claim, reason);
            }
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        table.set_header(["row", "phase", "ratio", "goal", "met"]);
        for Finding { claim, ratio, met, .. } in &self.findings {
            let ratio = ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
            let met = if *met { "yes" } else { "no" };
            table.add_row([claim.row, claim.phase, &ratio, &claim.goal(), met]);
        }
        if let Some(column) = table.column_mut(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let details = self
            .findings
            .iter()
            .map(|Finding { claim, detail, .. }| format!("\n{}, {}: {detail}", claim.row, claim.phase))
            .collect::<String>();
        format!("{table}\n{details}")
    }

    /// For programs.
    pub fn json(&self) -> anyhow::Result<String> {
        let rows: Vec<Value> = self
            .findings
            .iter()
            .map(|Finding { claim, ratio, met, detail }| {
                json!({
                    "row": claim.row,
                    "phase": claim.phase,
                    "ratio": ratio,
                    "goal": claim.goal(),
                    "met": met,
                    "detail": detail,
                })
            })
            .collect();
        serde_json::to_string_pretty(&rows).context("writing the report")
    }
}

/// The middle one; of an even number the lower. NaN of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count => values[(count - 1) / 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_met_on_its_good_side_only() {
        let mut report = Report::default();
        let fast = Claim::new("read", "warm", Limit::AtLeast(0.9));
        let cheap = Claim { also: Some("no requests"), ..Claim::new("read", "CPU", Limit::AtMost(1.2)) };
        report.measured(&fast, 0.95, true, String::new());
        report.measured(&fast, 0.85, true, String::new());
        report.measured(&cheap, 1.1, true, String::new());
        report.measured(&cheap, 1.1, false, String::new());
        report.measured(&cheap, f64::NAN, true, String::new());
        assert_eq!(report.findings.iter().map(|f| f.met).collect::<Vec<_>>(), [true, false, true, false, false]);
    }

    #[test]
    fn what_was_not_measured_is_there_with_its_reason() {
        let claims = [Claim::new("a", "x", Limit::AtMost(1.0)), Claim::new("a", "y", Limit::AtMost(1.0))];
        let mut report = Report::default();
        report.measured(&claims[0], 0.5, true, String::new());
        report.complete(&claims, "the disk is full");
        let rows: Vec<Value> = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!((rows.len(), &rows[1]["ratio"], &rows[1]["met"]), (2, &Value::Null, &json!(false)));
        assert_eq!(rows[1]["detail"], "the disk is full");
    }

    #[test]
    fn words_choose_rows() {
        let claim = Claim::new("walk and stat", "second", Limit::AtMost(1.0));
        assert!(claim.is_named(&[]) && claim.is_named(&["Walk".into()]) && claim.is_named(&["x".into(), "sec".into()]));
        assert!(!claim.is_named(&["mmap".into()]));
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert!(median([]).is_nan());
    }
}
