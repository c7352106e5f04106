//! Rules that types and bounds cannot say, each twice: in CEL, which the API server evaluates, and as a function, which
//! [`crate::manifest`] calls.
//!
//! Invariants: the message is the same on both sides; what CEL refuses the function refuses (which may know more, such
//! as bytes instead of code points). The tests below and those of `manifest` run both over the same cases.

use crate::{
    Schedule,
    calendar::{self, Calendar},
};

/// A rule in CEL and what it says when it fails; this is what `kube` takes as a `Rule`.
pub type Rule = (&'static str, &'static str);

/// Longest path within a dataset, in bytes.
pub const MAX_PATH: usize = 1024;
/// Longest component of a path, in bytes.
pub const MAX_PATH_COMPONENT: usize = 255;
/// Longest URI of a source, in bytes.
pub const MAX_URI: usize = 2048;
/// Most sources of a dataset.
pub const MAX_SOURCES: usize = 64;
/// Most workers of a runtime.
pub const MAX_REPLICAS: u32 = 1000;
/// Longest DNS label, and longest value of a label of Kubernetes.
pub const MAX_LABEL: usize = 63;
/// Most pairs in a map of labels, annotations or resources.
pub const MAX_PAIRS: usize = 32;
/// Most tolerations.
pub const MAX_TOLERATIONS: usize = 32;

pub(crate) const LABEL: Rule = (
    "self.matches('^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$')",
    "must be a DNS label: up to 63 of a-z, 0-9 and '-', no '-' at the ends",
);
pub(crate) const SUBDOMAIN: Rule = (
    "self.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?([.][a-z0-9]([a-z0-9-]*[a-z0-9])?)*$')",
    "must be a DNS name: DNS labels joined by '.', up to 253 characters",
);
/// The API server has checked that the name is a DNS name before.
pub(crate) const DATASET_NAME: Rule = ("!self.metadata.name.contains('.') && size(self.metadata.name) <= 63", LABEL.1);
/// As [`DATASET_NAME`]. The workers' Service has a name that begins like it, and those begin with a letter.
pub(crate) const RUNTIME_NAME: Rule = (
    "self.metadata.name.matches('^[a-z][a-z0-9-]*$') && size(self.metadata.name) <= 63",
    "must be a DNS label of at most 63 characters that begins with a letter",
);
/// As [`DATASET_NAME`].
pub(crate) const POLICY_NAME: Rule = DATASET_NAME;
pub(crate) const DATASET_REF_IMMUTABLE: Rule = ("self == oldSelf", "cannot be changed: make another PreloadPolicy");
pub(crate) const ONE_TRIGGER: Rule = (
    "[has(self.datasetReady), has(self.sourceChanged), has(self.schedule)].exists_one(trigger, trigger)",
    "must have exactly one of datasetReady, sourceChanged and schedule",
);
pub(crate) const ORDER: Rule = (
    "!has(self.order) || self.order != 'Manifest' || has(self.select.manifest)",
    "order Manifest needs select.manifest",
);
pub(crate) const ONE_MANIFEST: Rule =
    ("has(self.path) != has(self.configMapRef)", "must have exactly one of path and configMapRef");
/// A key of a ConfigMap, as Kubernetes takes it.
pub(crate) const CONFIG_KEY: Rule = (
    r"self.matches(r'^[-._a-zA-Z0-9]+$') && self != '.' && self != '..'",
    "must be a key of a ConfigMap: letters, digits, '-', '_' and '.'",
);
pub(crate) const REPLICAS: Rule = ("!has(self.max) || self.max >= self.min", "max must not be below min");
pub(crate) const SYNC_INTERVAL: Rule = (
    "has(self.interval) == (has(self.mode) && self.mode == 'Periodic')",
    "interval goes with mode Periodic, and only with it",
);
/// Whether the fields name a time is not for CEL to say.
pub(crate) const CRON: Rule = (
    "self.matches('^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|[0-9A-Za-z*,/-]+( +[0-9A-Za-z*,/-]+){4})$')",
    "must be five fields of cron, such as 0 5 * * 1-5, or @hourly, @daily, @weekly, @monthly or @yearly",
);
pub(crate) const TIME_ZONE: Rule = (
    "self.matches('^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}$')",
    "must be the name of a time zone, such as Europe/Madrid",
);
pub(crate) const DURATION: Rule = (
    "self.matches('^([0-9]{1,5}h([0-9]{1,5}m)?([0-9]{1,5}s)?|[0-9]{1,5}m([0-9]{1,5}s)?|[0-9]{1,5}s)$')",
    "must be hours, minutes and seconds, such as 2h, 1h30m or 90s",
);
pub(crate) const RUNTIME_REF_IMMUTABLE: Rule =
    ("self == oldSelf", "cannot be changed: its bytes are on the workers of the runtime it was created with");
/// A component is anything without a slash but `.` and `..`.
pub(crate) const PATH: Rule = (
    "self.matches('^(/|(/([.]{0,2}[^/.][^/]*|[.]{3,}[^/]*))+)$') && self.split('/').all(name, size(name) <= 255)",
    "must be an absolute path without '.', '..', empty components or a '/' at the end",
);
pub(crate) const HOST_PATH: Rule = (
    "self.matches('^(/([.]{0,2}[^/.][^/]*|[.]{3,}[^/]*))+$')",
    "must be an absolute path below '/', without '.', '..', empty components or a '/' at the end",
);
pub(crate) const URI_SCHEME: Rule = (
    "self.startsWith('s3://') || self.startsWith('file://') || self.startsWith('http://') || \
     self.startsWith('https://')",
    "must begin with s3://, file://, http:// or https://",
);
pub(crate) const URI_S3: Rule = (
    "!self.startsWith('s3://') || \
     self.matches('^s3://[a-zA-Z0-9][a-zA-Z0-9._-]{2,254}(/([.]{0,2}[^/.][^/]*|[.]{3,}[^/]*))*/?$')",
    "must be s3://BUCKET/PREFIX/ with a bucket of 3 to 255 letters, digits, '.', '_' and '-', and a prefix without '.', \
     '..' or empty components",
);
pub(crate) const URI_FILE: Rule = (
    "!self.startsWith('file://') || self.matches('^file://(/([.]{0,2}[^/.][^/]*|[.]{3,}[^/]*))+/?$')",
    "must be file:///DIRECTORY, without a host and without '.', '..' or empty components",
);
pub(crate) const URI_HTTP: Rule = (
    "!(self.startsWith('http://') || self.startsWith('https://')) || \
     self.matches('^https?://([a-zA-Z0-9._-]+|\\\\[[0-9a-fA-F:.]+\\\\])(:[0-9]{1,5})?\
     (/([.]{0,2}[^/.][^/]*|[.]{3,}[^/]*))*/?$')",
    "must be http://HOST/DIRECTORY/ or https://HOST/DIRECTORY/, perhaps with a port, without a user and without '.', \
     '..' or empty components",
);
pub(crate) const URI_PLAIN: Rule = (
    r"!self.matches('[?#%\\\\[:cntrl:]]| $')",
    r"must not hold '?', '#', '%', '\' or control characters, which URIs do not take as they are, nor end with a space",
);
pub(crate) const ENDPOINT: Rule = (
    r"self.matches('^https?://([a-zA-Z0-9._-]+|\\[[0-9a-fA-F:.]+\\])(:[0-9]{1,5})?/?$')",
    "must be http:// or https://, a host and perhaps a port, nothing else",
);
pub(crate) const REGION: Rule = ("self.matches('^[a-z0-9-]{1,64}$')", "must be up to 64 of a-z, 0-9 and '-'");
pub(crate) const S3_OPTIONS: Rule =
    ("!has(self.s3) || self.uri.startsWith('s3://')", "s3 belongs to sources whose uri begins with s3://");
pub(crate) const SECRET_REF: Rule = (
    "!has(self.secretRef) || self.uri.startsWith('s3://')",
    "secretRef belongs to sources whose uri begins with s3://",
);
pub(crate) const ONE_VOLUME: Rule =
    ("has(self.hostPath) != has(self.emptyDir)", "must have exactly one of hostPath and emptyDir");
pub(crate) const WATERMARKS: Rule = ("self.lowPercent < self.highPercent", "lowPercent must be below highPercent");

pub(crate) const TIER_NAMES: Rule =
    ("self.map(tier, tier.name) == oldSelf.map(tier, tier.name)", "names of tiers cannot be changed");
/// Keys and values of labels, as Kubernetes takes them; a prefix is checked when the pods are made.
pub(crate) const LABEL_MAP: Rule = (
    "self.all(key, key.matches('^([a-z0-9][a-z0-9.-]{0,252}/)?[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?$') && \
     self[key].matches('^([a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?)?$'))",
    "must hold keys such as team or example.com/team, and values of up to 63 letters, digits, '-', '_' and '.' that \
     begin and end with a letter or digit",
);
pub(crate) const ANNOTATION_KEYS: Rule = (
    "self.all(key, key.matches('^([a-z0-9][a-z0-9.-]{0,252}/)?[a-zA-Z0-9]([a-zA-Z0-9._-]{0,61}[a-zA-Z0-9])?$'))",
    "must hold keys such as team or example.com/team",
);
/// What selects the pods, and what Kubernetes itself writes on them.
pub(crate) const POD_LABELS: Rule = (
    "self.all(key, !key.startsWith('forebay.io/') && !key.startsWith('app.kubernetes.io/') && \
     !key.startsWith('apps.kubernetes.io/') && !key.startsWith('statefulset.kubernetes.io/') && \
     key != 'controller-revision-hash')",
    "must not hold keys of forebay.io/, app.kubernetes.io/, apps.kubernetes.io/ and statefulset.kubernetes.io/ nor \
     controller-revision-hash, which are the operator's and Kubernetes' own",
);
pub(crate) const TOLERATION_KEY: Rule = (
    "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
    "key may be left out only with operator Exists, which then tolerates every taint",
);
pub(crate) const TOLERATION_VALUE: Rule =
    ("!has(self.value) || !has(self.operator) || self.operator == 'Equal'", "value does not go with operator Exists");
pub(crate) const TOLERATION_SECONDS: Rule = (
    "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
    "tolerationSeconds goes with effect NoExecute only",
);
/// An amount of any resource: what `resource.Quantity` of Kubernetes takes, without a sign.
pub(crate) const AMOUNT_PATTERN: &str =
    "^([0-9]+([.][0-9]*)?|[.][0-9]+)(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E|[eE][+-]?[0-9]+)?$";

/// `LABEL`.
pub fn is_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=MAX_LABEL).contains(&name.len()) && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-')
}

/// `SUBDOMAIN`. A label within it may be longer than [`MAX_LABEL`], as in Kubernetes.
pub fn is_subdomain(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    name.len() <= 253
        && name.split('.').all(|label| {
            !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
        })
}

/// Whether `name` can be one component of a path.
fn is_component(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains('\0')
}

/// `PATH`.
pub fn is_path(path: &str) -> bool {
    path == "/"
        || path.len() <= MAX_PATH
            && path
                .strip_prefix('/')
                .is_some_and(|rest| rest.split('/').all(|c| is_component(c) && c.len() <= MAX_PATH_COMPONENT))
}

/// `HOST_PATH`.
pub fn is_host_path(path: &str) -> bool {
    path.len() <= MAX_PATH && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_component))
}

/// `URI_SCHEME`.
pub fn is_uri_of_known_scheme(uri: &str) -> bool {
    ["s3://", "file://", "http://", "https://"].iter().any(|scheme| uri.starts_with(scheme))
}

/// `URI_S3`: a well-formed `s3://` URI, or one of another scheme.
pub fn is_s3_uri_well_formed(uri: &str) -> bool {
    let Some(rest) = uri.strip_prefix("s3://") else {
        return true;
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let bucket_ok = (3..=255).contains(&bucket.len())
        && bucket.starts_with(|c: char| c.is_ascii_alphanumeric())
        && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    let prefix_ok = prefix.is_empty() || prefix.strip_suffix('/').unwrap_or(prefix).split('/').all(is_component);
    bucket_ok && prefix_ok
}

/// `URI_FILE`: a well-formed `file://` URI, or one of another scheme.
pub fn is_file_uri_well_formed(uri: &str) -> bool {
    let Some(path) = uri.strip_prefix("file://") else {
        return true;
    };
    let path = path.strip_suffix('/').unwrap_or(path);
    path.strip_prefix('/').is_some_and(|path| path.split('/').all(is_component))
}

/// `URI_HTTP`: a well-formed `http://` or `https://` URI, or one of another scheme.
pub fn is_http_uri_well_formed(uri: &str) -> bool {
    let Some(rest) = uri.strip_prefix("http://").or_else(|| uri.strip_prefix("https://")) else {
        return true;
    };
    let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path_ok = path.is_empty() || path.strip_suffix('/').unwrap_or(path).split('/').all(is_component);
    is_server(server) && path_ok
}

/// `URI_PLAIN`.
pub fn is_uri_plain(uri: &str) -> bool {
    !uri.contains(|c: char| "?#%\\".contains(c) || c.is_ascii_control()) && !uri.ends_with(' ')
}

/// `CONFIG_KEY`.
pub fn is_config_key(key: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    !key.is_empty() && key.bytes().all(inner) && !matches!(key, "." | "..")
}

/// `ENDPOINT`.
pub fn is_endpoint(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else {
        return false;
    };
    is_server(rest.strip_suffix('/').unwrap_or(rest))
}

/// Whether `server` is a host and perhaps a port.
fn is_server(server: &str) -> bool {
    let (host_ok, port) = if let Some((address, port)) = server.strip_prefix('[').and_then(|rest| rest.split_once(']'))
    {
        let in_address = |b: u8| b.is_ascii_hexdigit() || b == b':' || b == b'.';
        (!address.is_empty() && address.bytes().all(in_address), port)
    } else {
        let (host, port) = server.split_at(server.find(':').unwrap_or(server.len()));
        let in_host = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        (!host.is_empty() && host.bytes().all(in_host), port)
    };
    let port_ok = port.is_empty()
        || port.strip_prefix(':').is_some_and(|port| {
            (1..=5).contains(&port.len()) && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
        });
    host_ok && port_ok
}

/// What begins and ends with a letter or digit, and has letters, digits, '-', '_' and '.' between them; up to 63.
fn is_name_of_label(name: &str) -> bool {
    let outer = |c: char| c.is_ascii_alphanumeric();
    name.len() <= MAX_LABEL
        && name.starts_with(outer)
        && name.ends_with(outer)
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// `ANNOTATION_KEYS`, of one key.
pub fn is_label_key(key: &str) -> bool {
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let prefix_ok = prefix.is_none_or(|prefix| {
        prefix.len() <= 253
            && prefix.bytes().next().is_some_and(inner)
            && prefix.bytes().all(|b| inner(b) || b == b'.' || b == b'-')
    });
    prefix_ok && is_name_of_label(name)
}

/// `LABEL_MAP`, of one value.
pub fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_name_of_label(value)
}

/// `POD_LABELS`, of one key.
pub fn is_free_label(key: &str) -> bool {
    let taken = ["forebay.io/", "app.kubernetes.io/", "apps.kubernetes.io/", "statefulset.kubernetes.io/"];
    key != "controller-revision-hash" && !taken.iter().any(|prefix| key.starts_with(prefix))
}

/// `AMOUNT_PATTERN`.
pub fn is_amount(text: &str) -> bool {
    let end = text.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let (number, suffix) = text.split_at(end);
    let number_ok = number.bytes().any(|b| b.is_ascii_digit()) && number.matches('.').count() <= 1;
    let exponent = suffix.strip_prefix(['e', 'E']).map(|rest| rest.strip_prefix(['+', '-']).unwrap_or(rest));
    let suffixes = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "n", "u", "m", "k", "M", "G", "T", "P", "E"];
    let exponent_ok = exponent.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
    number_ok && (suffixes.contains(&suffix) || exponent_ok)
}

/// `CRON`, of fields that name a time.
pub fn is_cron(text: &str) -> bool {
    let schedule = Schedule { cron: text.to_owned(), time_zone: None };
    is_cron_well_formed(text) && Calendar::new(&schedule).is_ok()
}

/// `CRON`.
fn is_cron_well_formed(text: &str) -> bool {
    let named = ["@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually"];
    let is_field = |field: &str| field.bytes().all(|b| b.is_ascii_alphanumeric() || b"*,/-".contains(&b));
    let fields = || text.split(' ').filter(|field| !field.is_empty());
    named.contains(&text) || (text == text.trim_matches(' ') && fields().count() == 5 && fields().all(is_field))
}

/// `TIME_ZONE`, of one that is known.
pub fn is_time_zone(text: &str) -> bool {
    is_time_zone_well_formed(text) && calendar::zone(text).is_ok()
}

/// `TIME_ZONE`.
fn is_time_zone_well_formed(text: &str) -> bool {
    let is_part =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-".contains(&b));
    text.split('/').count() <= 3 && text.split('/').all(is_part)
}

/// Seconds of a `DURATION`; `None` if it is none.
pub fn seconds(text: &str) -> Option<u64> {
    let mut rest = text;
    let mut sum = 0;
    for (unit, factor) in [('h', 3600), ('m', 60), ('s', 1)] {
        if let Some((number, after)) = rest.split_once(unit) {
            if !(1..=5).contains(&number.len()) || !number.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            sum += number.parse::<u64>().ok()? * factor;
            rest = after;
        }
    }
    (rest.is_empty() && !text.is_empty()).then_some(sum)
}

/// `REGION`.
pub fn is_region(region: &str) -> bool {
    (1..=64).contains(&region.len())
        && region.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::cel::Validator;
    use proptest::prelude::*;
    use serde_json::json;

    fn cel(rule: Rule, text: &str) -> bool {
        let schema = json!({"type": "string", "x-kubernetes-validations": [{"rule": rule.0, "message": rule.1}]});
        match Validator::new().validate(&schema, &json!(text), None) {
            Ok(()) => true,
            Err(errors) => {
                // A rule that does not compile or fails to run would look like one that says no.
                assert!(errors.as_slice().iter().all(|e| e.message == rule.1), "{errors}");
                false
            }
        }
    }

    const AMOUNT: Rule = (
        "self.matches('^([0-9]+([.][0-9]*)?|[.][0-9]+)(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E|[eE][+-]?[0-9]+)?$')",
        "must be an amount",
    );

    #[test]
    fn the_rule_of_amounts_here_is_the_pattern() {
        assert_eq!(AMOUNT.0, format!("self.matches('{AMOUNT_PATTERN}')"));
    }

    /// Key, value, whether they are taken as labels.
    #[test]
    fn labels_are_judged_alike() {
        let long = "a".repeat(64);
        for (key, value, good) in [
            ("team", "vision", true),
            ("example.com/team", "a.b-c_d", true),
            ("a", "", true),
            ("Team", "A", true),
            ("", "a", false),
            ("-a", "a", false),
            ("a/b/c", "a", false),
            ("/a", "a", false),
            ("Example.com/a", "a", false),
            ("a", "-a", false),
            ("a", "a b", false),
            ("a", &long, false),
            (&long, "a", false),
        ] {
            let map = json!({key: value});
            let judged = |rule: Rule| {
                let schema = json!({"type": "object", "additionalProperties": {"type": "string"},
                    "x-kubernetes-validations": [{"rule": rule.0, "message": rule.1}]});
                Validator::new().validate(&schema, &map, None).is_ok()
            };
            assert_eq!(judged(LABEL_MAP), good, "{map}");
            assert_eq!(is_label_key(key) && is_label_value(value), good, "{map}");
            assert_eq!(judged(ANNOTATION_KEYS), is_label_key(key), "{map}");
            assert_eq!(judged(POD_LABELS), is_free_label(key), "{map}");
        }
        for key in ["forebay.io/runtime", "app.kubernetes.io/name", "controller-revision-hash"] {
            assert!(!is_free_label(key));
        }
        assert!(is_free_label("forebay.io.example.com/a"));
    }

    fn cel_uri(text: &str) -> bool {
        [URI_SCHEME, URI_S3, URI_FILE, URI_HTTP, URI_PLAIN].into_iter().all(|rule| cel(rule, text))
    }

    type Function = fn(&str) -> bool;

    /// Rule, function, what they take, what they refuse.
    type Case = (Rule, Function, &'static [&'static str], &'static [&'static str]);

    #[test]
    fn both_sides_take_and_refuse_the_same() {
        let cases: &[Case] = &[
            (LABEL, is_label, &["a", "0", "gpu-pool", "a--b"], &["", "-a", "a-", "A", "a.b", "a_b", "ä", "a\n"]),
            (
                SUBDOMAIN,
                is_subdomain,
                &["a", "a.b", "s3-reader", "0.1"],
                &["", ".", "a.", ".a", "a..b", "A", "-a", "a.-b", "a b"],
            ),
            (
                PATH,
                is_path,
                &["/", "/a", "/a/b", "/.a", "/..a", "/...", "/a b", "/ä", "/a.b", "/.../x", "/a\nb"],
                &["", "a", "a/b", "//", "/a/", "/a//b", "/.", "/..", "/a/.", "/a/..", "/../a", "/./a"],
            ),
            (HOST_PATH, is_host_path, &["/mnt/nvme0", "/a", "/.cache"], &["", "/", "a", "/a/", "/a/../b", "//a", "/."]),
            (
                ENDPOINT,
                is_endpoint,
                &[
                    "http://127.0.0.1:9000",
                    "https://s3.example.com",
                    "https://s3.example.com/",
                    "http://[::1]:9000",
                    "http://[::1]",
                    "http://my_store",
                ],
                &[
                    "",
                    "s3.example.com",
                    "ftp://a",
                    "http://",
                    "http:///",
                    "http://a/b",
                    "http://a//",
                    "http://a?x",
                    "http://user:secret@a",
                    "http://a:",
                    "http://a:x",
                    "http://a:123456",
                    "http://[]",
                    "http://[::1]x",
                    "http://[::1]:",
                    "http://a b",
                    "HTTP://a",
                ],
            ),
            (
                AMOUNT,
                is_amount,
                &["1", "0", "500m", "1.5Gi", "1.", ".5", "2e3", "2E-3", "1E", "100n"],
                &["", ".", "-1", "+1", "1.2.3", "1GB", "1 Gi", "1e", "e3", "m", "1K"],
            ),
            (REGION, is_region, &["us-east-1", "auto"], &["", "US", "a b", "eu_west"]),
            (
                CRON,
                is_cron,
                &["0 5 * * 1-5", "*/5 * * * *", "@daily", "0  0 1,15 JAN MON", "0 0 L * *"],
                &["", "@reboot", "* * * *", "0 5 * * * *", " 0 5 * * *", "0 5 * * * ", "0 5 * * $", "@daily x"],
            ),
            (
                TIME_ZONE,
                is_time_zone,
                &["UTC", "Europe/Madrid", "America/Argentina/La_Rioja", "Etc/GMT+3"],
                &["", "/", "Europe/", "/UTC", "a/b/c/d", "Europe Madrid", "../etc"],
            ),
            (
                DURATION,
                |text| seconds(text).is_some(),
                &["2h", "90s", "1h30m", "1h30m5s", "5m1s", "0s", "99999h"],
                &["", "2", "h", "1s1h", "1h1h", "-1h", "1.5h", "1d", "123456s", " 1h", "1h "],
            ),
        ];
        for (rule, function, good, bad) in cases {
            for text in *good {
                assert!(cel(*rule, text), "CEL refuses {text:?}: {}", rule.1);
                assert!(function(text), "refused: {text:?}: {}", rule.1);
            }
            for text in *bad {
                assert!(!cel(*rule, text), "CEL takes {text:?}: {}", rule.1);
                assert!(!function(text), "taken: {text:?}: {}", rule.1);
            }
        }
    }

    #[test]
    fn times_and_zones_that_are_none_are_refused_here_too() {
        for text in ["60 * * * *", "0 0 30 2 *", "a b c d e"] {
            assert!(cel(CRON, text) && !is_cron(text), "{text}");
        }
        assert!(cel(TIME_ZONE, "Mars/Olympus") && !is_time_zone("Mars/Olympus"));
    }

    #[test]
    fn durations_are_sums() {
        assert_eq!(seconds("1h30m5s"), Some(5405));
        assert_eq!(seconds("90s"), Some(90));
        assert_eq!(seconds("2h"), Some(7200));
    }

    fn broken_uri_rule(uri: &str) -> Option<Rule> {
        let rules: [(Rule, Function); 5] = [
            (URI_SCHEME, is_uri_of_known_scheme),
            (URI_S3, is_s3_uri_well_formed),
            (URI_FILE, is_file_uri_well_formed),
            (URI_HTTP, is_http_uri_well_formed),
            (URI_PLAIN, is_uri_plain),
        ];
        rules.into_iter().find(|(_, holds)| !holds(uri)).map(|(rule, _)| rule)
    }

    #[test]
    fn uris_are_judged_alike_and_by_the_right_rule() {
        for uri in [
            "s3://bucket",
            "s3://bucket/",
            "s3://bucket/a",
            "s3://bucket/a/b/",
            "s3://my.bucket-1/a b/ä",
            "s3://Old_Bucket/",
            "s3://bucket/...",
            "file:///data",
            "file:///data/sets/",
            "file:///a b",
            "http://host",
            "https://host/",
            "https://data.example.com:8443/a b/c/",
            "http://[::1]:8080/a",
            "http://127.0.0.1/...",
        ] {
            assert_eq!(broken_uri_rule(uri), None, "{uri}");
            assert!(cel_uri(uri), "{uri}");
        }
        for (uri, rule) in [
            ("", URI_SCHEME),
            ("bucket", URI_SCHEME),
            ("gs://bucket/", URI_SCHEME),
            ("S3://bucket/", URI_SCHEME),
            ("file:/data", URI_SCHEME),
            ("s3:/bucket", URI_SCHEME),
            ("s3://", URI_S3),
            ("s3:///a", URI_S3),
            ("s3://ab/", URI_S3),
            ("s3://-bucket/", URI_S3),
            ("s3://key:secret@bucket/", URI_S3),
            ("s3://bucket//", URI_S3),
            ("s3://bucket/a//", URI_S3),
            ("s3://bucket/a//b", URI_S3),
            ("s3://bucket/../b", URI_S3),
            ("s3://bucket/a/.", URI_S3),
            ("file://", URI_FILE),
            ("file:///", URI_FILE),
            ("file:////", URI_FILE),
            ("file://host/data", URI_FILE),
            ("file:///data/../x", URI_FILE),
            ("file:///data//", URI_FILE),
            ("http://", URI_HTTP),
            ("http:///a", URI_HTTP),
            ("https://me:hidden@host/", URI_HTTP),
            ("https://host:/", URI_HTTP),
            ("http://host:123456/", URI_HTTP),
            ("http://host//", URI_HTTP),
            ("http://host/a//b", URI_HTTP),
            ("http://host/a/../b", URI_HTTP),
            ("http://host/.", URI_HTTP),
            ("https://ho st/", URI_HTTP),
            ("http://host/a?b", URI_PLAIN),
            ("http://host/a%20b", URI_PLAIN),
            ("s3://bucket/a?b", URI_PLAIN),
            ("s3://bucket/a%20b", URI_PLAIN),
            ("file:///a#b", URI_PLAIN),
            ("file:///a\\b", URI_PLAIN),
            ("file:///a\tb", URI_PLAIN),
            ("s3://bucket/a\nb", URI_PLAIN),
            ("s3://bucket/a ", URI_PLAIN),
        ] {
            assert_eq!(broken_uri_rule(uri), Some(rule), "{uri}");
            assert!(!cel_uri(uri), "{uri}");
            assert!(!cel(rule, uri), "{uri}: {}", rule.1);
        }
    }

    #[test]
    fn lengths_are_bounded() {
        let long = "a".repeat(256);
        assert!(is_label(&long[..63]) && !is_label(&long[..64]));
        assert!(cel(LABEL, &long[..63]) && !cel(LABEL, &long[..64]));
        assert!(is_subdomain(&long[..253]) && !is_subdomain(&long[..254]));
        for (component, ok) in [(&long[..255], true), (&long[..], false)] {
            let path = format!("/x/{component}");
            assert_eq!(is_path(&path), ok);
            assert_eq!(cel(PATH, &path), ok);
        }
        assert!(!is_path(&"/abc".repeat(257)));
        assert!(is_region(&long[..64]) && !is_region(&long[..65]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn generated_paths_are_judged_alike(path in "/?([.]{0,3}[a/]{0,2}){0,4}/?") {
            prop_assert_eq!(is_path(&path), cel(PATH, &path), "{}", path);
            prop_assert_eq!(is_host_path(&path), cel(HOST_PATH, &path), "{}", path);
        }

        #[test]
        fn generated_uris_are_judged_alike(
            uri in "(s3://[a.-]{2,4}|file://|https?://[a.:\\[\\]@]{0,4}|gs://)(/([.]{0,3}[a?]{0,2})){0,3}/?") {
            prop_assert_eq!(broken_uri_rule(&uri).is_none(), cel_uri(&uri), "{}", uri);
        }

        #[test]
        fn generated_endpoints_are_judged_alike(url in "https?:/{1,2}[a.:\\[\\]@]{0,6}(:[0-9]{0,4})?/{0,2}") {
            prop_assert_eq!(is_endpoint(&url), cel(ENDPOINT, &url), "{}", url);
        }
    }
}
