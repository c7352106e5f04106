//! What a policy asks of a run, as workers are told.

use forebay_api::{
    Apply, Limits, Load, LoadOrder, ManifestRef, PreloadPolicySpec, Quantity, QuantityError, Select, rules,
};
use forebay_protocol::worker::{self as wire, LoadTerms, Selection, selection};
use jiff::{SignedDuration, Timestamp};

/// Which files a run that begins now loads.
pub fn selection(spec: &PreloadPolicySpec, begin: Timestamp) -> Result<Selection, QuantityError> {
    let Select { path: _, include, exclude, min_size, max_size, min_age, max_age, manifest } = &spec.select;
    // What is in a ConfigMap is told by who can read it.
    let ManifestRef { path, config_map_ref: _ } = &manifest.clone().unwrap_or_default();
    let before = |age: &Option<String>| Some(nanoseconds(modified(begin, age.as_deref()?)?));
    Ok(Selection {
        include: include.clone(),
        exclude: exclude.clone(),
        min_size: min_size.as_ref().map(Quantity::bytes).transpose()?.unwrap_or_default(),
        max_size: max_size.as_ref().map(Quantity::bytes).transpose()?,
        modified_after_ns: before(max_age),
        modified_before_ns: before(min_age),
        manifest: path.clone().map(|path| selection::Manifest::ManifestPath(path.into())),
    })
}

/// How it loads them.
pub fn terms(spec: &PreloadPolicySpec) -> Result<LoadTerms, QuantityError> {
    let Load { pin, verify, replicas } = spec.load;
    let Limits { bandwidth, requests_per_second } = &spec.limits;
    Ok(LoadTerms {
        pin: pin == Apply::Always,
        verify: verify == Apply::Always,
        bytes_per_second: bandwidth.as_ref().map(Quantity::bytes).transpose()?.unwrap_or_default(),
        requests_per_second: requests_per_second.unwrap_or_default().into(),
        replicas: replicas.unwrap_or_default(),
        order: order(spec.order).into(),
        priority: spec.priority,
    })
}

/// As workers are told it.
fn order(order: Option<LoadOrder>) -> wire::LoadOrder {
    match order {
        // A manifest is loaded in its order unless they are told another.
        None | Some(LoadOrder::Manifest) => wire::LoadOrder::Unspecified,
        Some(LoadOrder::Name) => wire::LoadOrder::Name,
        Some(LoadOrder::Size) => wire::LoadOrder::Size,
    }
}

/// When a file was modified that is of this age at a run's begin; `None` if the age is no duration.
pub fn modified(begin: Timestamp, age: &str) -> Option<Timestamp> {
    let age = SignedDuration::from_secs(i64::try_from(rules::seconds(age)?).ok()?);
    Some(begin.checked_sub(age).unwrap_or(Timestamp::MIN))
}

/// Since 1970, as far as 64 bits hold it.
pub fn nanoseconds(time: Timestamp) -> i64 {
    let nanoseconds = time.as_nanosecond();
    i64::try_from(nanoseconds).unwrap_or(if nanoseconds < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ages_are_told_as_times_and_limits_as_numbers() {
        let spec: PreloadPolicySpec = serde_json::from_value(json!({
            "datasetRef": {"name": "d"},
            "select": {"minAge": "1h", "maxAge": "24h", "maxSize": "1Ki"},
            "load": {"pin": "Always", "replicas": 3},
            "order": "Size",
            "priority": -3,
            "limits": {"bandwidth": "2Mi", "requestsPerSecond": 7},
        }))
        .unwrap();
        let begin = Timestamp::from_second(100_000).unwrap();
        let selection = selection(&spec, begin).unwrap();
        assert_eq!(selection.modified_before_ns, Some(96_400_000_000_000));
        assert_eq!(selection.modified_after_ns, Some(13_600_000_000_000));
        assert_eq!((selection.min_size, selection.max_size), (0, Some(1024)));
        let limits = LoadTerms { bytes_per_second: 2 << 20, requests_per_second: 7, ..LoadTerms::default() };
        let order = wire::LoadOrder::Size.into();
        let expected = LoadTerms { pin: true, verify: false, replicas: 3, order, priority: -3, ..limits };
        assert_eq!(terms(&spec).unwrap(), expected);
        let usual: PreloadPolicySpec = serde_json::from_value(json!({"datasetRef": {"name": "d"}})).unwrap();
        assert_eq!(terms(&usual).unwrap(), LoadTerms::default());
        assert_eq!(super::selection(&usual, begin).unwrap(), Selection::default());
    }
}
