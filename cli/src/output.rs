//! Printing results: tables for people, JSON for programs.

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// A table without lines, as `kubectl` prints them. Columns whose heading ends in `>` are aligned to the right.
pub fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headings.iter().map(|heading| heading.trim_end_matches('>')));
    for (index, heading) in headings.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 3));
            if heading.ends_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    for row in rows {
        table.add_row(row);
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Prints a document.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints a line of a stream of documents.
pub fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

/// Bytes as people write them, in powers of 1,024: `0`, `512`, `1.5Ki`, `20Gi`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1023.95 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0}{}", UNITS[unit])
    } else {
        format!("{value:.1}{}", UNITS[unit])
    }
}

/// Share of `part` in `whole` in per cent; `-` when there is no whole.
pub fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".into(),
        whole => format!("{:.0}", part as f64 * 100.0 / whole as f64),
    }
}

/// A name of a directory entry, with what would break a line escaped.
pub fn name(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        for (size, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0Ki"),
            (1536, "1.5Ki"),
            (1 << 20, "1.0Mi"),
            ((1 << 20) - 1, "1.0Mi"),
            (200 << 30, "200Gi"),
            (u64::MAX, "16.0Ei"),
        ] {
            assert_eq!(bytes(size), text);
        }
    }

    #[test]
    fn names_stay_on_their_line() {
        assert_eq!(name("a\nb ü".as_bytes()), "a\\nb ü");
    }

    #[test]
    fn columns_line_up() {
        let text = table(&["NAME", "SIZE>"], [vec!["a".into(), "1".into()], vec!["long".into(), "100".into()]]);
        assert_eq!(text, "NAME   SIZE\na         1\nlong    100\n");
    }
}
