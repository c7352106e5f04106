//! Names of the objects that are made for a CacheRuntime, as everybody who looks for them computes them.

use sha2::{Digest, Sha256};

/// Longest name of a StatefulSet: Kubernetes labels its pods with it and a hash of 11 characters, in 63.
pub const MAX_OBJECT_NAME: usize = 52;

/// Name of what is made for the CacheRuntime `runtime`, in its namespace: the StatefulSet of its workers, their Service,
/// the Secret with its key and the rest. `RUNTIME-forebay`, or, when that has more than [`MAX_OBJECT_NAME`] characters,
/// its beginning and 8 hexadecimal digits of a hash of `runtime`.
///
/// The two forms never meet: one ends with `forebay`, the other with hexadecimal digits.
pub fn object_name(runtime: &str) -> String {
    let name = format!("{runtime}-forebay");
    if name.len() <= MAX_OBJECT_NAME {
        return name;
    }
    let hash: String = Sha256::digest(runtime).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    // Runtimes are named in ASCII, so every index is a boundary; 1 for the dash.
    let kept = name.get(..MAX_OBJECT_NAME - hash.len() - 1).unwrap_or_default().trim_end_matches('-');
    format!("{kept}-{hash}")
}

/// Host and port at which any worker of a CacheRuntime answers.
pub fn service_address(namespace: &str, runtime: &str) -> String {
    format!("{}.{namespace}.svc:{WORKER_PORT}", object_name(runtime))
}

/// Port of a worker's pod for data and control.
pub const WORKER_PORT: u16 = 7400;
/// Port of a worker's pod for metrics and probes.
pub const WORKER_HTTP_PORT: u16 = 7401;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules;

    #[test]
    fn short_names_are_readable_and_long_ones_are_cut() {
        assert_eq!(object_name("gpu-pool"), "gpu-pool-forebay");
        assert_eq!(object_name(&"a".repeat(44)), format!("{}-forebay", "a".repeat(44)));
        let longest = "a".repeat(rules::MAX_LABEL);
        let name = object_name(&longest);
        assert_eq!(name.len(), MAX_OBJECT_NAME);
        assert!(name.starts_with(&"a".repeat(43)) && rules::is_label(&name), "{name}");
        assert_eq!(service_address("vision", "gpu-pool"), "gpu-pool-forebay.vision.svc:7400");
    }

    #[test]
    fn names_that_differ_at_their_end_stay_apart() {
        let name = |end: char| object_name(&format!("{}{end}", "a".repeat(62)));
        assert_ne!(name('a'), name('b'));
        // A cut that would end with a dash ends before it.
        let dashes = object_name(&format!("{}-----{}", "a".repeat(40), "b".repeat(18)));
        assert!(rules::is_label(&dashes) && !dashes.contains("--"), "{dashes}");
    }
}
