//! Amounts of bytes as Kubernetes writes them.
//!
//! Invariants: the text is kept as the user wrote it; [`Quantity::bytes`] is exact or an error, it never rounds. The
//! grammar is the part of Kubernetes' `resource.Quantity` that makes sense for bytes: no sign, no exponents, no
//! fractions of a byte, nothing above 2^63 - 1 (Kubernetes' own limit).

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Suffixes and what they multiply by.
const SUFFIXES: [(&str, u64); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
];

/// Digits behind the point. 10^18 is the largest decimal unit, and 18 digits times 2^60 fit into a `u128`.
const MAX_DECIMALS: usize = 18;

/// What the API server checks: the grammar, and that some digit is not zero. Fractions of a byte and overflows are left
/// to [`Quantity::bytes`].
pub(crate) const PATTERN: &str = "^([0-9]*[1-9][0-9]*|([0-9]*[1-9][0-9]*([.][0-9]+)?|0+[.][0-9]*[1-9][0-9]*)\
                                  (Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E))$";

/// An amount of bytes: `2Ti`, `500G`, `1.5Gi` or a plain number.
#[derive(Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Quantity(String);

/// Why a text is no amount of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// It has no digits, or characters that belong to no number.
    #[error("is no amount of bytes")]
    Malformed,
    /// The number is fine, what follows it is not.
    #[error("has an unknown unit")]
    Unit,
    /// It begins with `-`.
    #[error("is negative")]
    Negative,
    /// It is zero.
    #[error("is zero")]
    Zero,
    /// It is not a whole number of bytes.
    #[error("is not a whole number of bytes (with at most {MAX_DECIMALS} decimals)")]
    Fraction,
    /// It is above 2^63 - 1.
    #[error("is more than 2^63 - 1 bytes")]
    Overflow,
}

impl Quantity {
    /// Takes any text; [`Self::bytes`] judges it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The amount in bytes, exactly; at least 1.
    pub fn bytes(&self) -> Result<u64, QuantityError> {
        let text = self.0.as_str();
        if text.starts_with('-') {
            return Err(QuantityError::Negative);
        }
        let number_len = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let (number, suffix) = text.split_at(number_len);
        let (whole, fraction) = match number.split_once('.') {
            // A fraction needs digits on both sides, as in the pattern.
            Some((whole, fraction)) if !whole.is_empty() && !fraction.is_empty() && !fraction.contains('.') => {
                (whole, fraction)
            }
            Some(_) => return Err(QuantityError::Malformed),
            None if number.is_empty() => return Err(QuantityError::Malformed),
            None => (number, ""),
        };
        let unit = match SUFFIXES.iter().find(|(name, _)| *name == suffix) {
            Some((_, unit)) => *unit,
            None if suffix.is_empty() && !number.contains('.') => 1,
            None if suffix.is_empty() => return Err(QuantityError::Fraction),
            None => return Err(QuantityError::Unit),
        };
        let bytes = exact(whole, fraction, unit)?;
        if bytes == 0 {
            return Err(QuantityError::Zero);
        }
        if i64::try_from(bytes).is_err() { Err(QuantityError::Overflow) } else { Ok(bytes) }
    }
}

/// `whole.fraction * unit`; both parts are decimal digits or empty.
fn exact(whole: &str, fraction: &str, unit: u64) -> Result<u64, QuantityError> {
    let whole = whole.trim_start_matches('0');
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| QuantityError::Overflow)? };
    let whole = whole.checked_mul(unit).ok_or(QuantityError::Overflow)?;

    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() {
        return Ok(whole);
    }
    if fraction.len() > MAX_DECIMALS {
        return Err(QuantityError::Fraction);
    }
    // fraction < 10^18 < 2^60 and unit <= 2^60: the product is below 2^120.
    let product = fraction.parse::<u128>().map_err(|_| QuantityError::Fraction)? * u128::from(unit);
    let scale = fraction.bytes().fold(1u128, |scale, _| scale * 10);
    if !product.is_multiple_of(scale) {
        return Err(QuantityError::Fraction);
    }
    let part = u64::try_from(product / scale).map_err(|_| QuantityError::Overflow)?;
    whole.checked_add(part).ok_or(QuantityError::Overflow)
}

impl QuantityError {
    /// What to write instead.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Malformed | Self::Negative => "write a number and a unit, such as 2Ti, 500G or 1.5Gi",
            Self::Unit => "use one of Ki, Mi, Gi, Ti, Pi, Ei (powers of 1024) or k, M, G, T, P, E (powers of 1000)",
            Self::Zero => "give at least one byte, or leave an optional field out",
            Self::Fraction => "use a smaller unit, such as 1536Mi for 1.5Gi",
            Self::Overflow => "give less than 8Ei",
        }
    }
}

impl fmt::Debug for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Quantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a quantity: a string such as 2Ti, or a whole number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // Kubernetes reads a pattern for strings and a minimum for numbers; neither touches the other.
        json_schema!({
            "description": "An amount of bytes: a whole number, or a string such as 2Ti, 500G or 1.5Gi.",
            "x-kubernetes-int-or-string": true,
            "pattern": PATTERN,
            "minimum": 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::cel::Validator;
    use proptest::prelude::*;
    use serde_json::json;

    fn bytes(text: &str) -> Result<u64, QuantityError> {
        Quantity::new(text).bytes()
    }

    /// Whether the API server takes it: the pattern, run by the regular expressions of the CEL engine.
    fn matches_pattern(text: &str) -> bool {
        let schema =
            json!({"type": "string", "x-kubernetes-validations": [{"rule": format!("self.matches('{PATTERN}')")}]});
        Validator::new().validate(&schema, &json!(text), None).is_ok()
    }

    #[test]
    fn amounts_are_exact() {
        for (text, expected) in [
            ("1", 1),
            ("007", 7),
            ("1024", 1024),
            ("1Ki", 1 << 10),
            ("1k", 1_000),
            ("1.5Gi", 3 << 29),
            ("0.5Ki", 512),
            ("0.001k", 1),
            ("1.000000000000000001E", 1_000_000_000_000_000_001),
            ("0.0009765625Ki", 1),
            ("2Ti", 2 << 40),
            ("3P", 3_000_000_000_000_000),
            ("7Ei", 7 << 60),
            ("7.5Ei", 15 << 59),
            ("9223372036854775807", i64::MAX as u64),
            ("00000000000000000000000001Mi", 1 << 20),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        use QuantityError::*;
        for (text, expected) in [
            ("", Malformed),
            ("Gi", Malformed),
            (".5Gi", Malformed),
            ("5.Gi", Malformed),
            ("1.2.3Gi", Malformed),
            (" 1Gi", Malformed),
            ("+1Gi", Malformed),
            ("-1Gi", Negative),
            ("1GiB", Unit),
            ("1GB", Unit),
            ("1 Gi", Unit),
            ("1gi", Unit),
            ("1K", Unit),
            ("1500m", Unit),
            ("1e3", Unit),
            ("1Gi\n", Unit),
            ("0", Zero),
            ("0.0Gi", Zero),
            ("0.5", Fraction),
            ("2.0", Fraction),
            ("1.1Ki", Fraction),
            ("1.0000000000000000001E", Fraction),
            ("8Ei", Overflow),
            ("9223372036854775808", Overflow),
            ("7.9999999999999999999Ei", Fraction),
            ("99999999999999999999999", Overflow),
            ("99999999E", Overflow),
        ] {
            assert_eq!(bytes(text), Err(expected), "{text}");
        }
    }

    #[test]
    fn it_is_read_from_numbers_and_strings_and_nothing_else() {
        assert_eq!(serde_json::from_value::<Quantity>(json!(5)).unwrap().bytes(), Ok(5));
        assert_eq!(serde_json::from_value::<Quantity>(json!("5Gi")).unwrap().bytes(), Ok(5 << 30));
        assert_eq!(serde_json::from_value::<Quantity>(json!(-5)).unwrap().bytes(), Err(QuantityError::Negative));
        for value in [json!(1.5), json!(null), json!(true), json!([1]), json!({})] {
            assert!(serde_json::from_value::<Quantity>(value).is_err());
        }
        assert_eq!(serde_json::to_value(Quantity::new("5Gi")).unwrap(), json!("5Gi"));
    }

    #[test]
    fn the_pattern_agrees_but_for_fractions_and_overflow() {
        for text in ["1", "007", "1.5Gi", "0.5Ki", "0.001k", "7Ei", "10", "100k", "00.10Ki"] {
            assert!(matches_pattern(text), "{text}");
        }
        for text in ["", "0", "0Gi", "0.0Gi", "Gi", ".5Gi", "5.Gi", "-1", "+1", "1GB", "1K", "1e3", "1500m", " 1", "1 "]
        {
            assert!(!matches_pattern(text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_amount_or_an_error(text in "[-+ .0-9a-zA-Z]{0,24}") {
            let _ = bytes(&text);
        }

        #[test]
        fn what_is_an_amount_matches_the_pattern(text in "[0-9]{0,12}([.][0-9]{0,4})?(Ki|Mi|Ei|k|E|m|)") {
            match bytes(&text) {
                Ok(_) => prop_assert!(matches_pattern(&text)),
                Err(QuantityError::Fraction | QuantityError::Overflow) => {}
                Err(_) => prop_assert!(!matches_pattern(&text)),
            }
        }

        #[test]
        fn units_multiply(number in 1u64..1 << 20, index in 0usize..12) {
            let (suffix, unit) = SUFFIXES[index];
            let expected = u128::from(number) * u128::from(unit);
            let expected = i64::try_from(expected).map(|bytes| bytes as u64).map_err(|_| QuantityError::Overflow);
            prop_assert_eq!(bytes(&format!("{number}{suffix}")), expected);
        }
    }
}
