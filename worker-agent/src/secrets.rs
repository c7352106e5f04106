//! Credentials from Secrets, by name.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use forebay_under_store::S3Credentials;
use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use tokio::time::timeout;
use tracing::warn;

use crate::plan::Credentials;

/// How long the API server may take for one.
const CALL: Duration = Duration::from_secs(10);
/// Secrets that are asked for at once.
const AT_ONCE: usize = 8;
/// Keys of a Secret, as api/ describes them.
const ACCESS_KEY_ID: &str = "accessKeyId";
const SECRET_ACCESS_KEY: &str = "secretAccessKey";
const SESSION_TOKEN: &str = "sessionToken";

/// The Secrets that were read.
pub(crate) struct Secrets {
    api: Api<Secret>,
    pub(crate) known: HashMap<String, Credentials>,
}

impl Secrets {
    pub(crate) fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), known: HashMap::new() }
    }

    /// Asks for all of `names`, forgets the others. Gives whether all of them are known now: one that cannot be asked for
    /// stays what it was.
    pub(crate) async fn refresh(&mut self, names: &BTreeSet<String>) -> bool {
        self.known.retain(|name, _| names.contains(name));
        let api = &self.api;
        let asked = stream::iter(names.iter().cloned()).map(|name| async move {
            let answer = timeout(CALL, api.get_opt(&name)).await;
            (name, answer)
        });
        let answers: Vec<_> = asked.buffer_unordered(AT_ONCE).collect().await;
        for (name, answer) in answers {
            match answer {
                Ok(Ok(secret)) => {
                    self.known.insert(name, secret.map_or(Credentials::Missing, |secret| read(&secret)));
                }
                // An answer, and not one that passes by itself: the other sources are not to wait for it.
                Ok(Err(kube::Error::Api(status))) if status.is_forbidden() => {
                    self.known.insert(name, Credentials::Forbidden);
                }
                Ok(Err(error)) => warn!(secret = name, %error, "cannot be read"),
                Err(_) => warn!(secret = name, "the API server does not answer"),
            }
        }
        self.has_all(names)
    }

    /// Whether something is known of each of these.
    pub(crate) fn has_all(&self, names: &BTreeSet<String>) -> bool {
        names.iter().all(|name| self.known.contains_key(name))
    }

    /// Whether one is missing or incomplete.
    pub(crate) fn are_lacking(&self) -> bool {
        self.known.values().any(|credentials| !matches!(credentials, Credentials::Known(_)))
    }
}

/// The credentials in a Secret.
fn read(secret: &Secret) -> Credentials {
    let text = |key: &str| {
        let bytes = &secret.data.as_ref()?.get(key)?.0;
        let text = std::str::from_utf8(bytes).ok()?.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    // Two of them travel in headers.
    let plain = |key: &str| text(key).filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()));
    let Some(access_key_id) = plain(ACCESS_KEY_ID) else { return Credentials::Incomplete(ACCESS_KEY_ID) };
    let Some(secret_access_key) = text(SECRET_ACCESS_KEY) else { return Credentials::Incomplete(SECRET_ACCESS_KEY) };
    let session_token = plain(SESSION_TOKEN);
    // An empty one is none.
    if session_token.is_none() && text(SESSION_TOKEN).is_some() {
        return Credentials::Incomplete(SESSION_TOKEN);
    }
    Credentials::Known(S3Credentials { access_key_id, secret_access_key, session_token })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn secret(pairs: &[(&str, &[u8])]) -> Secret {
        let data = pairs.iter().map(|(key, value)| ((*key).to_owned(), ByteString(value.to_vec()))).collect();
        Secret { data: Some(data), ..Secret::default() }
    }

    #[test]
    fn both_keys_are_needed_and_have_to_be_texts() {
        let good = secret(&[(ACCESS_KEY_ID, b"id\n"), (SECRET_ACCESS_KEY, b"secret")]);
        let Credentials::Known(known) = read(&good) else { panic!() };
        assert_eq!((known.access_key_id.as_str(), known.secret_access_key.as_str()), ("id", "secret"));
        for (pairs, key) in [
            (&[][..], ACCESS_KEY_ID),
            (&[(ACCESS_KEY_ID, &b"id"[..])][..], SECRET_ACCESS_KEY),
            (&[(ACCESS_KEY_ID, &b"id"[..]), (SECRET_ACCESS_KEY, &b"\xff"[..])][..], SECRET_ACCESS_KEY),
            (&[(ACCESS_KEY_ID, &b" "[..]), (SECRET_ACCESS_KEY, &b"s"[..])][..], ACCESS_KEY_ID),
            (&[(ACCESS_KEY_ID, &b"a\nb"[..]), (SECRET_ACCESS_KEY, &b"s"[..])][..], ACCESS_KEY_ID),
            (&[(ACCESS_KEY_ID, &b"a"[..]), (SECRET_ACCESS_KEY, &b"s"[..]), (SESSION_TOKEN, b"a b")][..], SESSION_TOKEN),
        ] {
            assert!(matches!(read(&secret(pairs)), Credentials::Incomplete(missing) if missing == key));
        }
        assert!(matches!(read(&Secret::default()), Credentials::Incomplete(ACCESS_KEY_ID)));
    }
}
