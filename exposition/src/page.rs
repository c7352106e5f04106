//! The documentation of metrics, from what they say about themselves.

use std::fmt::Write;

/// A Markdown table of every metric in an OpenMetrics text, in its order: name of the samples, type, labels, help. A metric
/// without a sample is left out: whoever documents a family puts an example into it.
pub fn table(text: &str) -> String {
    let mut page = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines {
        let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) else { continue };
        let kind = lines.iter().find_map(|line| line.strip_prefix("# TYPE ")?.strip_prefix(name)?.strip_prefix(' '));
        let is_sample = |line: &&&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ', '_']));
        let Some((kind, sample)) = kind.zip(lines.iter().find(is_sample)) else { continue };
        let sample_name = sample.split(['{', ' ']).next().unwrap_or(name);
        let labels = match (sample.find('{'), sample.find('}')) {
            (Some(open), Some(close)) => sample[open + 1..close]
                .split(',')
                .map(|label| label.split('=').next().unwrap_or_default())
                .collect::<Vec<_>>()
                .join(", "),
            _ => String::new(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(page, "| `{sample_name}` | {kind} | {labels} | {} |", help.trim_end_matches('.'));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_metric() {
        let text = "# HELP a_bytes Bytes.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\na_bytes_total{x=\"1\",y=\"2\"} 3\n\
                    # HELP b A level.\n# TYPE b gauge\nb 4\n# HELP c Nothing yet.\n# TYPE c gauge\n# EOF\n";
        let page = table(text);
        let rows: Vec<&str> = page.lines().skip(2).collect();
        assert_eq!(rows, ["| `a_bytes_total` | counter | x, y | Bytes |", "| `b` | gauge |  | A level |"]);
    }
}
