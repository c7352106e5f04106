//! Amounts for people, and whether a number changed enough to be written down.

/// An amount of bytes with at most three digits and a unit of powers of 1024: `0`, `512`, `1.5Gi`, `138Gi`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    if bytes < 1024 {
        return bytes.to_string();
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        // 1023.5 would be shown as 1024.
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    // One decimal below ten, unless it is zero.
    let text = if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{}{unit}", text.trim_end_matches(".0"))
}

/// An amount of bytes as Kubernetes writes it, exactly: with the largest unit that needs no fraction.
pub fn quantity(bytes: u64) -> String {
    const UNITS: [(&str, u32); 6] = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    match UNITS.iter().find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift) {
        Some((unit, shift)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// Whether `new` is one percent or more away from `old`, or there was none.
pub fn differs(old: Option<u64>, new: Option<u64>) -> bool {
    match (old, new) {
        (Some(old), Some(new)) => old != new && u128::from(old.abs_diff(new)) * 100 >= u128::from(old),
        (old, new) => old != new,
    }
}

/// `part` of `part` and `rest` together, in percent, rounded down; `None` when both are zero.
pub fn percent(part: u64, rest: u64) -> Option<u8> {
    let whole = u128::from(part) + u128::from(rest);
    let percent = (u128::from(part) * 100).checked_div(whole)?;
    u8::try_from(percent).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        for (bytes, text) in [
            (0, "0"),
            (1023, "1023"),
            (1024, "1Ki"),
            (1536, "1.5Ki"),
            (10 * 1024, "10Ki"),
            (1 << 20, "1Mi"),
            ((1 << 20) - 1, "1Mi"),
            (147_897_477_120, "138Gi"),
            (16 << 40, "16Ti"),
            (u64::MAX, "16Ei"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn quantities_are_exact() {
        for (bytes, text) in
            [(0, "0"), (1, "1"), (1 << 30, "1Gi"), (3 << 29, "1536Mi"), ((1 << 40) + 1, "1099511627777")]
        {
            assert_eq!(quantity(bytes), text);
        }
    }

    #[test]
    fn one_percent_is_a_difference() {
        assert!(differs(None, Some(0)) && differs(Some(0), None) && differs(Some(0), Some(1)));
        assert!(!differs(None, None) && !differs(Some(7), Some(7)));
        assert!(differs(Some(100), Some(101)) && differs(Some(100), Some(99)));
        assert!(!differs(Some(1000), Some(1009)) && differs(Some(1000), Some(1010)));
        assert!(!differs(Some(u64::MAX), Some(u64::MAX - 1)));
    }

    #[test]
    fn ratios_are_rounded_down() {
        assert_eq!(percent(0, 0), None);
        assert_eq!(percent(0, 5), Some(0));
        assert_eq!(percent(999, 1), Some(99));
        assert_eq!(percent(u64::MAX, 0), Some(100));
        assert_eq!(percent(u64::MAX, u64::MAX), Some(50));
    }
}
