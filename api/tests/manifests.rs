//! Manifests as people write them: good ones, and bad ones with what is said about them.
#![allow(clippy::unwrap_used, reason = "the helpers of these tests fail the test")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use forebay_api::{
    Addressing, ConcurrencyPolicy, Medium, Policy,
    manifest::{self, Credentials, Manifest, ManifestError, S3, TierVolume, ValidatedPolicy},
};

/// Three documents that are right; each case of the table below spoils one line of it.
const GOOD: &str = "\
# A comment before the first document.
---
apiVersion: forebay.io/v1alpha1
kind: CacheRuntime
metadata:
  name: gpu-pool
  namespace: vision
spec:
  replicas: 3
  tiers:
  - name: nvme
    medium: SSD
    capacity: 2Ti
    volume:
      hostPath: {path: /mnt/nvme0}
    watermarks:
      highPercent: 90
---
apiVersion: v1
kind: Secret
metadata:
  name: reader
  namespace: vision
stringData:
  accessKeyId: AKIA
  secretAccessKey: very-secret
---
apiVersion: forebay.io/v1alpha1
kind: Dataset
metadata:
  name: imagenet
  namespace: vision
spec:
  runtimeRef:
    name: gpu-pool
  sources:
  - path: /
    uri: s3://imagenet/2012/
    secretRef:
      name: reader
    s3:
      endpoint: https://s3.example.com
      region: eu-west-1
      addressing: Path
  - path: /labels
    uri: file:///data/labels
  cache:
    policy: Hold
    quota: 1.5Gi
";

fn good() -> Manifest {
    manifest::parse("good.yaml", GOOD).unwrap()
}

/// Line of the marker, from 1.
fn marked(text: &str) -> usize {
    let lines: Vec<usize> = text.lines().enumerate().filter(|(_, l)| l.contains("# <-")).map(|(i, _)| i + 1).collect();
    assert_eq!(lines.len(), 1, "one line of the case is marked");
    lines[0]
}

#[test]
fn a_good_manifest_is_resolved() {
    let Manifest { runtimes, datasets, policies } = good();
    assert!(policies.is_empty());
    assert_eq!(runtimes.len(), 1);
    let runtime = &runtimes[0];
    assert_eq!((runtime.namespace.as_str(), runtime.name.as_str(), runtime.replicas), ("vision", "gpu-pool", 3));
    assert_eq!(runtime.tier.name, "nvme");
    assert_eq!(runtime.tier.medium, Medium::Ssd);
    assert_eq!(runtime.tier.capacity_bytes, 2 << 40);
    assert_eq!(runtime.tier.volume, TierVolume::HostPath("/mnt/nvme0".into()));
    assert_eq!((runtime.tier.high_percent, runtime.tier.low_percent), (90, 85));

    assert_eq!(datasets.len(), 1);
    let dataset = &datasets[0];
    assert_eq!((dataset.namespace.as_str(), dataset.name.as_str()), ("vision", "imagenet"));
    assert_eq!(
        (dataset.runtime.as_str(), dataset.policy, dataset.quota_bytes),
        ("gpu-pool", Policy::Hold, Some(3 << 29))
    );
    let [images, labels] = dataset.sources.as_slice() else { panic!("two sources") };
    assert_eq!((images.path.as_str(), images.uri.as_str()), ("/", "s3://imagenet/2012/"));
    let s3 = S3 {
        endpoint: Some("https://s3.example.com".into()),
        region: Some("eu-west-1".into()),
        addressing: Some(Addressing::Path),
    };
    assert_eq!(images.s3, Some(s3));
    let credentials =
        Credentials { access_key_id: "AKIA".into(), secret_access_key: "very-secret".into(), session_token: None };
    assert_eq!(images.credentials, Some(credentials));
    assert_eq!((labels.path.as_str(), labels.uri.as_str()), ("/labels", "file:///data/labels"));
    assert_eq!((&labels.s3, &labels.credentials), (&None, &None));
}

/// What loads the Dataset of [`GOOD`]; each case spoils one line of it.
const POLICY: &str = "\
---
apiVersion: forebay.io/v1alpha1
kind: PreloadPolicy
metadata: {name: before-work, namespace: vision}
spec:
  datasetRef: {name: imagenet}
  triggers:
  - datasetReady: {}
  - schedule: {cron: 0 5 * * 1-5, timeZone: Europe/Madrid}
  select: {include: ['train/**'], maxSize: 1Gi}
  deadline: 2h
";

#[test]
fn a_policy_is_resolved_with_its_dataset() {
    let Manifest { policies, .. } = manifest::parse("m.yaml", &format!("{GOOD}{POLICY}")).unwrap();
    let [ValidatedPolicy { namespace, name, spec, manifest: None }] = policies.as_slice() else { panic!("one policy") };
    assert_eq!(
        (namespace.as_str(), name.as_str(), spec.dataset_ref.name.as_str()),
        ("vision", "before-work", "imagenet")
    );
    assert_eq!((spec.select.path.as_str(), spec.select.include.as_slice()), ("/", ["train/**".to_owned()].as_slice()));
    assert_eq!((spec.triggers.len(), spec.backoff_limit, spec.ttl_after_finished.as_str()), (2, 3, "1h"));
    assert_eq!((spec.concurrency_policy, spec.suspend), (ConcurrencyPolicy::Forbid, false));
}

/// What a policy may name.
const LISTS: &str = "\
---
apiVersion: v1
kind: ConfigMap
metadata: {name: lists, namespace: vision}
data:
  a: |
    train/one
    train/two
";

#[test]
fn a_manifest_in_a_config_map_is_resolved() {
    let policy = POLICY.replace("maxSize: 1Gi", "manifest: {configMapRef: {name: lists, key: a}}");
    let Manifest { policies, .. } = manifest::parse("m.yaml", &format!("{GOOD}{policy}{LISTS}")).unwrap();
    assert_eq!(policies[0].manifest.as_deref(), Some("train/one\ntrain/two\n"));
}

#[test]
fn bad_policies_are_refused_with_place_and_remedy() {
    for (from, to, field, message, remedy) in [
        (
            "datasetRef: {name: imagenet}",
            "datasetRef: {name: x} # <-",
            "spec.datasetRef.name",
            "no Dataset 'x'",
            "imagenet",
        ),
        (
            "- datasetReady: {}",
            "- {sourceChanged: {}, datasetReady: {}}",
            "spec.triggers[0]",
            "exactly one of",
            "sourceChanged: {}",
        ),
        ("- datasetReady: {}", "- {} # <-", "spec.triggers[0]", "exactly one of datasetReady", "schedule: {cron"),
        ("cron: 0 5 * * 1-5", "cron: 0 5 * *", "spec.triggers[1].schedule.cron", "five fields", "@daily"),
        (
            "timeZone: Europe/Madrid",
            "timeZone: over there",
            "spec.triggers[1].schedule.timeZone",
            "time zone",
            "Europe/Madrid",
        ),
        ("['train/**']", "['']", "spec.select.include[0]", "is empty", "remove it"),
        ("maxSize: 1Gi", "maxSize: lots", "spec.select.maxSize", "no amount of bytes", "2Ti"),
        ("maxSize: 1Gi", "manifest: {}", "spec.select.manifest", "exactly one of path", "configMapRef: {name"),
        ("maxSize: 1Gi", "manifest: {path: lists/a}", "spec.select.manifest.path", "absolute path", "write it as /"),
        (
            "maxSize: 1Gi",
            "manifest: {configMapRef: {name: lists, key: a/b}}",
            "spec.select.manifest.configMapRef.key",
            "must be a key of a ConfigMap",
            "train.txt",
        ),
        (
            "maxSize: 1Gi",
            "manifest: {configMapRef: {name: none, key: a}}",
            "spec.select.manifest.configMapRef.name",
            "no ConfigMap 'none' in namespace 'vision'",
            "add a v1 ConfigMap",
        ),
        (
            "maxSize: 1Gi",
            "manifest: {configMapRef: {name: lists, key: b}}",
            "spec.select.manifest.configMapRef.key",
            "ConfigMap 'lists' has no text 'b'",
            "to the data",
        ),
        ("maxSize: 1Gi", "maxAge: 1d", "spec.select.maxAge", "must be hours", "90s"),
        ("deadline: 2h", "load: {pin: Sometimes}", "spec.load.pin", "'Sometimes'", "Never, Always"),
        ("deadline: 2h", "limits: {bandwidth: fast}", "spec.limits.bandwidth", "no amount of bytes", "2Ti"),
        ("deadline: 2h", "limits: {requestsPerSecond: 0}", "spec.limits.requestsPerSecond", "out of range", "1 to"),
        ("deadline: 2h", "deadline: 2 hours", "spec.deadline", "must be hours", "90s"),
        ("deadline: 2h", "concurrencyPolicy: Allow", "spec.concurrencyPolicy", "'Allow'", "Forbid, Replace"),
        ("deadline: 2h", "backoffLimit: 1000", "spec.backoffLimit", "out of range", "0 to 100"),
    ] {
        let bad = POLICY.replacen(from, to, 1);
        assert_ne!(bad, POLICY, "{field}: nothing was spoiled");
        let errors = manifest::parse("bad.yaml", &format!("{GOOD}{bad}{LISTS}")).expect_err(field);
        assert_eq!(errors.len(), 1, "{errors:#?}");
        let error = &errors[0];
        assert!(error.field == field && error.message.contains(message) && error.remedy.contains(remedy), "{error:#?}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let shown = format!("{:?}", good());
    assert!(shown.contains("AKIA") && shown.contains("<redacted>"));
    assert!(!shown.contains("very-secret"));
}

#[test]
fn what_is_left_out_has_its_default() {
    let text = "\
apiVersion: forebay.io/v1alpha1
kind: Dataset
metadata: {name: d}
spec:
  runtimeRef: {name: r}
  sources: [{path: /, uri: 's3://bucket'}]
---
apiVersion: forebay.io/v1alpha1
kind: CacheRuntime
metadata: {name: r}
spec:
  tiers: [{name: t, medium: HDD, capacity: 1073741824, volume: {emptyDir: {}}}]
";
    let Manifest { runtimes, datasets, .. } = manifest::parse("m.yaml", text).unwrap();
    assert_eq!((runtimes[0].namespace.as_str(), runtimes[0].replicas), ("default", 1));
    assert_eq!((runtimes[0].tier.high_percent, runtimes[0].tier.low_percent), (95, 85));
    assert_eq!((runtimes[0].tier.capacity_bytes, &runtimes[0].tier.volume), (1 << 30, &TierVolume::EmptyDir));
    assert_eq!((datasets[0].policy, datasets[0].quota_bytes), (Policy::Hold, None));
    assert_eq!((&datasets[0].sources[0].s3, &datasets[0].sources[0].credentials), (&None, &None));
}

#[test]
fn what_kubectl_prints_is_taken() {
    let text = GOOD.replace(
        "  name: imagenet\n",
        "  name: imagenet\n  uid: 5c0e\n  resourceVersion: '7'\n  generation: 2\n  creationTimestamp: null\n  \
         labels: {team.example.com/name: vision}\n  annotations: {a: b}\n",
    ) + "status:\n  phase: Ready\n  observedGeneration: 2\n";
    assert_eq!(manifest::parse("m.yaml", &text).unwrap(), good());
}

#[test]
fn data_is_base64_and_string_data_wins() {
    let data = "data:\n  accessKeyId: QUtJQQ==\n  secretAccessKey: b2xk\n  sessionToken: dG9rZW4=\nstringData:\n";
    let text = GOOD.replace("stringData:\n  accessKeyId: AKIA\n", data);
    let Manifest { datasets, .. } = manifest::parse("m.yaml", &text).unwrap();
    let credentials = datasets[0].sources[0].credentials.clone().unwrap();
    assert_eq!(credentials.access_key_id, "AKIA");
    assert_eq!(credentials.secret_access_key, "very-secret");
    assert_eq!(credentials.session_token.as_deref(), Some("token"));
}

#[test]
fn anchors_and_merges_are_understood() {
    let text = GOOD.replace(
        "    s3:\n      endpoint: https://s3.example.com\n      region: eu-west-1\n      addressing: Path\n",
        "    s3: &s3\n      endpoint: https://s3.example.com\n      region: eu-west-1\n  - path: /more\n    \
         uri: s3://more/\n    s3:\n      <<: *s3\n      region: us-east-1\n",
    );
    let Manifest { datasets, .. } = manifest::parse("m.yaml", &text).unwrap();
    let s3 = datasets[0].sources[1].s3.clone().unwrap();
    assert_eq!((s3.endpoint.as_deref(), s3.region.as_deref()), (Some("https://s3.example.com"), Some("us-east-1")));
}

#[test]
fn the_examples_load() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut files: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    assert!(files.len() >= 3);
    for file in files {
        match manifest::load(std::slice::from_ref(&file)) {
            Ok(manifest) => {
                assert!(!manifest.runtimes.is_empty() && !manifest.datasets.is_empty(), "{}", file.display())
            }
            // Some are for clusters: they have pods, which are refused here, and nothing else is wrong with them.
            Err(errors) => assert!(errors.iter().all(|error| error.field == "kind"), "{errors:?}"),
        }
    }
}

/// What is spoiled, how, which document and field, and what the message and the remedy hold. The line is marked.
struct Case(&'static str, &'static str, &'static str, usize, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const BAD: &[Case] = &[
    // Documents.
    Case("unknown kind", "kind: Dataset", "kind: Deployment # <-", 3, "kind", "'Deployment'", "another file"),
    Case("kind misspelt", "kind: Dataset", "kind: DataSet # <-", 3, "kind", "no kind", "write Dataset"),
    Case("a list of objects", "kind: Secret", "kind: List # <-", 2, "kind", "'List'", "document of its own"),
    Case("kind missing", "apiVersion: v1\nkind: Secret", "apiVersion: v1 # <-", 2, "kind", "missing", "CacheRuntime"),
    Case("version of the future", "apiVersion: forebay.io/v1alpha1\nkind: Dataset", "apiVersion: forebay.io/v1 # <-\nkind: Dataset", 3, "apiVersion", "'forebay.io/v1'", "apiVersion: forebay.io/v1alpha1"),
    Case("version missing", "apiVersion: forebay.io/v1alpha1\nkind: Dataset", "kind: Dataset # <-", 3, "apiVersion", "missing", "add it"),
    // Metadata.
    Case("name missing", "metadata:\n  name: imagenet", "metadata: # <-", 3, "metadata.name", "missing", "add it: Name of the object"),
    Case("name with upper case", "name: imagenet", "name: ImageNet # <-", 3, "metadata.name", "'ImageNet' must be a DNS label", "lower-case"),
    Case("name with a dot", "name: imagenet", "name: image.net # <-", 3, "metadata.name", "DNS label", "lower-case"),
    Case("name a number", "name: imagenet", "name: 2012 # <-", 3, "metadata.name", "must be text, not a number", "quotes"),
    Case("namespace invalid", "name: imagenet\n  namespace: vision", "name: imagenet\n  namespace: Vision # <-\n  #", 3, "metadata.namespace", "DNS label", "lower-case"),
    Case("label a number", "name: imagenet", "name: imagenet\n  labels:\n    example.com/year: 2012 # <-", 3, "metadata.labels[example.com/year]", "must be text", "quotes"),
    Case("unknown metadata", "name: imagenet", "name: imagenet\n  label: {a: b} # <-", 3, "metadata.label", "no field", "write labels"),
    Case("defined twice", "kind: Dataset", "kind: CacheRuntime\nmetadata: {name: gpu-pool, namespace: vision} # <-\nspec: {tiers: [{name: t, medium: SSD, capacity: 1Gi, volume: {emptyDir: {}}}]}\n---\napiVersion: forebay.io/v1alpha1\nkind: Dataset", 3, "metadata.name", "defined before, at bad.yaml:6", "another name"),
    // Fields.
    Case("unknown field", "  cache:", "  colour: red # <-\n  cache:", 3, "spec.colour", "no field", "the fields here are cache, runtimeRef, sources, sync"),
    Case("field misspelt", "    uri: s3://imagenet/2012/", "    uri: s3://imagenet/2012/\n    url: s3://x # <-", 3, "spec.sources[0].url", "no field", "write uri"),
    Case("field of the future", "    policy: Hold", "    policy: Hold\n    tier: nvme # <-", 3, "spec.cache.tier", "no field", "policy, priority, quota"),
    Case("field at the top", "kind: Dataset", "kind: Dataset\nsources: [] # <-", 3, "sources", "no field", "apiVersion, kind, metadata, spec, status"),
    Case("key twice", "    policy: Hold", "    policy: Hold\n    policy: Hold # <-", 3, "spec.cache.policy", "is given twice, first on line 48", "keep one"),
    Case("required field missing", "  - path: /\n    uri: s3://imagenet/2012/\n", "  - path: / # <-\n", 3, "spec.sources[0].uri", "is missing", "add it: The place"),
    Case("empty field", "    quota: 1.5Gi", "    quota: # <-", 3, "spec.cache.quota", "must be an amount of bytes, not empty", "2Ti"),
    Case("empty object", "  cache:\n    policy: Hold\n    quota: 1.5Gi", "  cache: # <-", 3, "spec.cache", "is empty", "remove the field"),
    Case("list where a map is", "  runtimeRef:\n    name: gpu-pool", "  runtimeRef: [gpu-pool] # <-", 3, "spec.runtimeRef", "must be a map, not a list", "indented"),
    Case("map where a list is", "  tiers:\n  - name: nvme\n    medium", "  tiers: # <-\n    medium", 1, "spec.tiers", "must be a list, not a map", "'- '"),
    Case("text where a number is", "replicas: 3", "replicas: three # <-", 1, "spec.replicas", "must be a whole number, not text", "digits"),
    Case("wrong enum", "policy: Hold", "policy: ARC # <-", 3, "spec.cache.policy", "'ARC' is no known value", "one of Hold, LRU, LFU, SIEVE, FIFO"),
    Case("wrong enum of a tier", "medium: SSD", "medium: ssd # <-", 1, "spec.tiers[0].medium", "'ssd'", "one of SSD, HDD"),
    Case("wrong addressing", "addressing: Path", "addressing: path # <-", 3, "spec.sources[0].s3.addressing", "'path'", "Path, VirtualHost"),
    // Amounts.
    Case("no workers", "replicas: 3", "replicas: 0 # <-", 1, "spec.replicas", "0 is out of range", "use 1 to 1000"),
    Case("too many workers", "replicas: 3", "replicas: 1001 # <-", 1, "spec.replicas", "out of range", "use 1 to 1000"),
    Case("bad quantity", "capacity: 2Ti", "capacity: lots # <-", 1, "spec.tiers[0].capacity", "'lots' is no amount", "2Ti"),
    Case("unit of no kind", "capacity: 2Ti", "capacity: 2TB # <-", 1, "spec.tiers[0].capacity", "unknown unit", "Ki, Mi, Gi"),
    Case("negative quantity", "quota: 1.5Gi", "quota: -1 # <-", 3, "spec.cache.quota", "'-1' is negative", "write a number"),
    Case("quantity of zero", "quota: 1.5Gi", "quota: 0 # <-", 3, "spec.cache.quota", "is zero", "at least one byte"),
    Case("fraction of a byte", "quota: 1.5Gi", "quota: 1.1Ki # <-", 3, "spec.cache.quota", "whole number of bytes", "smaller unit"),
    Case("too many bytes", "quota: 1.5Gi", "quota: 8Ei # <-", 3, "spec.cache.quota", "2^63", "less than 8Ei"),
    Case("quantity with a point", "quota: 1.5Gi", "quota: 1.5 # <-", 3, "spec.cache.quota", "not a number with a point", "1.5Gi"),
    Case("watermarks crossed", "highPercent: 90", "highPercent: 90\n      lowPercent: 90 # <-", 1, "spec.tiers[0].watermarks.lowPercent", "must be below", "lower lowPercent"),
    Case("watermark below the default", "    watermarks:\n      highPercent: 90", "    watermarks: # <-\n      highPercent: 80", 1, "spec.tiers[0].watermarks.lowPercent", "must be below", "85 and 95 when left out"),
    Case("watermark above 100", "highPercent: 90", "highPercent: 101 # <-", 1, "spec.tiers[0].watermarks.highPercent", "out of range", "1 to 100"),
    // Tiers.
    Case("no volume", "    volume:\n      hostPath: {path: /mnt/nvme0}", "    volume: {} # <-", 1, "spec.tiers[0].volume", "exactly one", "emptyDir: {}"),
    Case("two volumes", "    volume:\n", "    volume: # <-\n      emptyDir: {}\n", 1, "spec.tiers[0].volume", "exactly one", "hostPath"),
    Case("two tiers", "  tiers:\n", "  tiers: # <-\n  - {name: hdd, medium: HDD, capacity: 1Gi, volume: {emptyDir: {}}}\n", 1, "spec.tiers", "has 2 items", "at most 1"),
    Case("host path relative", "{path: /mnt/nvme0}", "{path: mnt/nvme0} # <-", 1, "spec.tiers[0].volume.hostPath.path", "absolute", "/mnt/nvme0"),
    Case("label of the operator", "  tiers:\n", "  template: {metadata: {labels: {forebay.io/runtime: a}}} # <-\n  tiers:\n", 1, "spec.template.metadata.labels", "must not hold keys", "other keys"),
    Case("label with a space", "  tiers:\n", "  template: {metadata: {labels: {team: a b}}} # <-\n  tiers:\n", 1, "spec.template.metadata.labels", "must hold keys", "team: vision"),
    Case("toleration of nothing", "  tiers:\n", "  template: {spec: {tolerations: [{value: a}]}} # <-\n  tiers:\n", 1, "spec.template.spec.tolerations[0].key", "may be left out only", "Exists"),
    Case("toleration of any value", "  tiers:\n", "  template: {spec: {tolerations: [{key: a, operator: Exists, value: b}]}} # <-\n  tiers:\n", 1, "spec.template.spec.tolerations[0].value", "does not go with", "Equal"),
    Case("toleration for a time", "  tiers:\n", "  template: {spec: {tolerations: [{key: a, tolerationSeconds: 1}]}} # <-\n  tiers:\n", 1, "spec.template.spec.tolerations[0].tolerationSeconds", "NoExecute only", "effect"),
    Case("amount of cpu", "  tiers:\n", "  template: {spec: {resources: {requests: {cpu: lots}}}} # <-\n  tiers:\n", 1, "spec.template.spec.resources.requests.cpu", "no amount", "500m"),
    Case("half a cpu", "  tiers:\n", "  template: {spec: {resources: {requests: {cpu: 0.5}}}} # <-\n  tiers:\n", 1, "spec.template.spec.resources.requests.cpu", "whole number or text", "quotes"),
    Case("affinity misspelt", "  tiers:\n", "  template: {spec: {affinity: {nodeAfinity: {}}}} # <-\n  tiers:\n", 1, "spec.template.spec.affinity.nodeAfinity", "no field", "nodeAffinity"),
    Case("runtime that begins with a digit", "apiVersion: v1\nkind: Secret", "apiVersion: forebay.io/v1alpha1\nkind: CacheRuntime\nmetadata: {name: 0a, namespace: vision} # <-\nspec: {tiers: [{name: t, medium: SSD, capacity: 1Gi, volume: {emptyDir: {}}}]}\n---\napiVersion: v1\nkind: Secret", 2, "metadata.name", "begins with a letter", "gpu-pool"),
    Case("host path the root", "{path: /mnt/nvme0}", "{path: /} # <-", 1, "spec.tiers[0].volume.hostPath.path", "below '/'", "/mnt/nvme0"),
    Case("option of an empty directory", "hostPath: {path: /mnt/nvme0}", "emptyDir: {medium: Memory} # <-", 1, "spec.tiers[0].volume.emptyDir.medium", "no field", "nothing can be set"),
    // Sources.
    Case("path twice", "path: /labels", "path: / # <-", 3, "spec.sources[1].path", "'/' is given twice, first on line 37", "a path of its own"),
    Case("path relative", "path: /labels", "path: labels # <-", 3, "spec.sources[1].path", "'labels' must be an absolute path", "/a/b"),
    Case("path with a slash at the end", "path: /labels", "path: /labels/ # <-", 3, "spec.sources[1].path", "absolute path", "/a/b"),
    Case("path with dots", "path: /labels", "path: /a/../b # <-", 3, "spec.sources[1].path", "'..'", "/a/b"),
    Case("path with an empty part", "path: /labels", "path: //labels # <-", 3, "spec.sources[1].path", "empty", "/a/b"),
    Case("store not supported", "uri: s3://imagenet/2012/", "uri: hdfs://namenode:8020/labels # <-", 3, "spec.sources[0].uri", "must begin with s3://, file://, http:// or https://", "not supported yet"),
    Case("credentials in the uri of a web server", "uri: file:///data/labels", "uri: https://me:hidden@host/labels # <-", 3, "spec.sources[1].uri", "the value must be http://HOST", "not supported"),
    Case("secret of a web server", "uri: file:///data/labels", "uri: https://host/labels\n    secretRef: {name: reader} # <-", 3, "spec.sources[1].secretRef", "s3://", "remove secretRef"),
    Case("s3 options of a web server", "uri: file:///data/labels", "uri: http://host/labels\n    s3: {region: auto} # <-", 3, "spec.sources[1].s3", "s3://", "remove s3"),
    Case("bucket invalid", "uri: s3://imagenet/2012/", "uri: s3://image+net/2012/ # <-", 3, "spec.sources[0].uri", "bucket", "s3://my-bucket/train/"),
    Case("credentials in the uri", "uri: s3://imagenet/2012/", "uri: s3://AKIA:hidden@imagenet/ # <-", 3, "spec.sources[0].uri", "the value must be s3://", "Secret"),
    Case("query in the uri", "uri: s3://imagenet/2012/", "uri: s3://imagenet/?versions # <-", 3, "spec.sources[0].uri", "'?'", "without these"),
    Case("file with a host", "uri: file:///data/labels", "uri: file://data/labels # <-", 3, "spec.sources[1].uri", "without a host", "three slashes"),
    Case("s3 options of a file", "uri: file:///data/labels", "uri: file:///data/labels\n    s3: {region: auto} # <-", 3, "spec.sources[1].s3", "s3://", "remove s3"),
    Case("secret of a file", "uri: file:///data/labels", "uri: file:///data/labels\n    secretRef: {name: reader} # <-", 3, "spec.sources[1].secretRef", "s3://", "remove secretRef"),
    Case("endpoint with a path", "endpoint: https://s3.example.com", "endpoint: https://s3.example.com/imagenet # <-", 3, "spec.sources[0].s3.endpoint", "a host and perhaps a port", "bucket stands in uri"),
    Case("endpoint with a password", "endpoint: https://s3.example.com", "endpoint: https://me:hidden@s3.example.com # <-", 3, "spec.sources[0].s3.endpoint", "the value must be", "Secret"),
    Case("region invalid", "region: eu-west-1", "region: EU West # <-", 3, "spec.sources[0].s3.region", "'EU West'", "us-east-1"),
    Case("no sources", "  cache:", "---\napiVersion: forebay.io/v1alpha1\nkind: Dataset\nmetadata: {name: other, namespace: vision}\nspec:\n  runtimeRef: {name: gpu-pool}\n  sources: [] # <-\n  cache:", 4, "spec.sources", "no items", "at least one"),
    // Synchronisation.
    Case("periodic without an interval", "  cache:", "  sync: {mode: Periodic} # <-\n  cache:", 3, "spec.sync.interval", "goes with mode Periodic", "interval: 5m"),
    Case("fewer copies at most than at least", "    policy: Hold", "    replicas: {min: 3, max: 2} # <-\n    policy: Hold", 3, "spec.cache.replicas.max", "below min", "leave max out"),
    Case("an interval of a snapshot", "  cache:", "  sync: {interval: 5m} # <-\n  cache:", 3, "spec.sync.interval", "goes with mode Periodic", "mode: Snapshot"),
    // References.
    Case("runtime unknown", "  runtimeRef:\n    name: gpu-pool", "  runtimeRef:\n    name: gpu-pol # <-", 3, "spec.runtimeRef.name", "no CacheRuntime 'gpu-pol' in namespace 'vision'", "or use gpu-pool"),
    Case("runtime elsewhere", "  name: gpu-pool\n  namespace: vision\n", "  name: gpu-pool\n  namespace: other\n", 3, "spec.runtimeRef.name", "no CacheRuntime", "is in namespace 'other'"),
    Case("secret unknown", "      name: reader", "      name: writer # <-", 3, "spec.sources[0].secretRef.name", "no Secret 'writer' in namespace 'vision'", "accessKeyId and secretAccessKey"),
    // Secrets: no value may be shown.
    Case("credential missing", "stringData:\n  accessKeyId: AKIA\n  secretAccessKey: very-secret", "stringData: # <-\n  accessKeyId: AKIA", 2, "stringData.secretAccessKey", "Dataset vision/imagenet needs it", "add it to stringData"),
    Case("credential missing in data", "stringData:\n  accessKeyId: AKIA\n  secretAccessKey: very-secret", "data: # <-\n  accessKeyId: QUtJQQ==", 2, "data.secretAccessKey", "needs it", "add it to data"),
    Case("credential a number", "accessKeyId: AKIA", "accessKeyId: 12345678 # <-", 2, "stringData.accessKeyId", "must be text, not a number", "quotes"),
    Case("credential empty", "accessKeyId: AKIA", "accessKeyId: '' # <-", 2, "stringData.accessKeyId", "is empty", "a value"),
    Case("credential with a line break", "stringData:\n  accessKeyId: AKIA", "data:\n  accessKeyId: QUtJQQo= # <-\nstringData:", 2, "data.accessKeyId", "line break", "printf"),
    Case("credential not in base64", "stringData:\n  accessKeyId: AKIA", "data:\n  accessKeyId: '****' # <-\nstringData:", 2, "data.accessKeyId", "base64", "stringData"),
    Case("credential with white space", "secretAccessKey: very-secret", "secretAccessKey: very secret # <-", 2, "stringData.secretAccessKey", "white space", "as the store gave it"),
    Case("secret with an unknown field", "stringData:", "strings: {a: b} # <-\nstringData:", 2, "strings", "no field", "data, immutable, kind, metadata, stringData, type"),
    // YAML.
    Case("not YAML", "    quota: 1.5Gi", "    quota: [1.5Gi # <-", 3, "", "no valid YAML", "correct the YAML"),
    Case("tag of no meaning", "policy: Hold", "policy: !custom Hold # <-", 3, "", "no valid YAML", "correct the YAML"),
];

#[test]
fn bad_manifests_are_refused_with_place_and_remedy() {
    let mut wrong = Vec::new();
    for Case(name, from, to, document, field, message, remedy) in BAD {
        let bad = GOOD.replacen(from, to, 1);
        assert_ne!(bad, GOOD, "{name}: nothing was spoiled");
        // What is spoiled in one document and breaks another has no mark.
        let line = if *name == "runtime elsewhere" { 35 } else { marked(&bad) };
        let errors = manifest::parse("bad.yaml", &bad).expect_err(name);
        let shown: Vec<String> = errors.iter().map(ToString::to_string).collect();
        let right = errors.len() == 1
            && errors[0].file == "bad.yaml"
            && errors[0].line == Some(line)
            && errors[0].document == Some(*document)
            && errors[0].field == *field
            && errors[0].message.contains(message)
            && errors[0].remedy.contains(remedy)
            && shown[0].starts_with(&format!("bad.yaml:{line}: document {document}"))
            && !["very-secret", "very secret", "hidden", "QUtJ", "12345678", "****"]
                .iter()
                .any(|s| shown[0].contains(s));
        if !right {
            wrong.push(format!("{name}, line {line}, {field}, {message:?}, {remedy:?}: {shown:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_errors_of_all_documents_are_found_at_once() {
    let bad = GOOD
        .replace("replicas: 3", "replicas: 0")
        .replace("capacity: 2Ti", "capacity: 2TB")
        .replace("name: gpu-pool\n  sources", "name: nobody\n  sources")
        .replace("accessKeyId: AKIA\n", "")
        .replace("path: /labels", "path: /labels/")
        .replace("policy: Hold", "policy: ARC\n    tier: nvme");
    let errors = manifest::parse("bad.yaml", &bad).unwrap_err();
    let places: Vec<(usize, &str)> = errors.iter().map(|e| (e.line.unwrap(), e.field.as_str())).collect();
    assert_eq!(
        places,
        [
            (9, "spec.replicas"),
            (13, "spec.tiers[0].capacity"),
            (24, "stringData.accessKeyId"),
            (34, "spec.runtimeRef.name"),
            (44, "spec.sources[1].path"),
            (47, "spec.cache.policy"),
            (48, "spec.cache.tier"),
        ]
    );
    assert_eq!(errors[6].object, "Dataset vision/imagenet");
}

#[test]
fn what_could_not_be_read_is_not_said_to_be_missing() {
    // The Secret and the Dataset are before the mistake, the CacheRuntime after it.
    let parts: Vec<&str> = GOOD.split("---\n").collect();
    let text = format!("{}---\n{}---\na: [\n---\n{}", parts[2], parts[3], parts[1]);
    let errors = manifest::parse("bad.yaml", &text).unwrap_err();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].document, Some(3));
}

#[test]
fn a_secret_that_two_datasets_need_is_reported_once() {
    let dataset = GOOD.split("---\n").last().unwrap().replace("name: imagenet", "name: other");
    let text = format!("{GOOD}---\n{dataset}").replace("  accessKeyId: AKIA\n", "");
    assert_eq!(manifest::parse("bad.yaml", &text).unwrap_err().len(), 1);
}

#[test]
fn garbage_fills_no_screen() {
    let head = "apiVersion: v1\nkind: Secret\nmetadata:\n  name: a\n";
    let unknown: String = (0..5_000).map(|i| format!("  f{i}: x\n")).collect();
    let twice = "  name: b\n".repeat(5_000);
    let known: String = (0..5_000).map(|i| format!("  k{i}: x\n")).collect();
    for (text, expected) in [(unknown, 100), (twice, 100), (format!("stringData:\n{known}"), 0)] {
        let errors = manifest::parse("bad.yaml", &format!("{head}{text}")).err().unwrap_or_default();
        assert_eq!(errors.len(), expected, "{:?}", errors.first());
    }
}

mod files {
    use super::*;

    fn write(directory: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    #[test]
    fn files_are_resolved_together() {
        let directory = tempfile::tempdir().unwrap();
        let parts: Vec<&str> = GOOD.split("---\n").collect();
        let files: Vec<PathBuf> =
            (1..4).rev().map(|i| write(directory.path(), &format!("{i}.yaml"), parts[i])).collect();
        assert_eq!(manifest::load(&files).unwrap(), good());
        let errors = manifest::load(&files[..2]).unwrap_err();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].file, files[0].display().to_string());
        assert_eq!((errors[0].line, errors[0].document), (Some(8), Some(1)));
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let good = write(directory.path(), "good.yaml", GOOD);
        let cases: [(&str, Option<Vec<u8>>, &str); 6] = [
            ("none.yaml", None, "cannot be read"),
            ("binary.yaml", Some(vec![0xff, 0xfe, 0x00]), "not UTF-8"),
            ("empty.yaml", Some(Vec::new()), "holds no object"),
            ("comment.yaml", Some(b"# nothing\n---\n".to_vec()), "holds no object"),
            ("large.yaml", Some(vec![b'#'; manifest::MAX_FILE_BYTES + 1]), "more than"),
            ("list.yaml", Some(b"- a\n".to_vec()), "is a list, not an object"),
        ];
        for (name, content, message) in cases {
            let file = directory.path().join(name);
            if let Some(content) = content {
                fs::write(&file, content).unwrap();
            }
            let errors: Vec<ManifestError> = manifest::load(&[good.clone(), file.clone()]).unwrap_err();
            assert_eq!(errors.len(), 1, "{name}: {errors:?}");
            assert!(errors[0].message.contains(message), "{name}: {}", errors[0]);
            assert_eq!(errors[0].file, file.display().to_string());
            assert!(!errors[0].remedy.is_empty());
        }
    }

    #[test]
    fn nothing_gives_nothing() {
        assert_eq!(manifest::load(&[]).unwrap(), Manifest::default());
    }
}
